"""The parameters that `Lion` steps, and where their state is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .dtensors import local_gradients, locals_of
from .update.segments import StepTensors


@dataclass
class Members:
    """The parameters of the groups, as a step needs them; kept for the next step if nothing has changed.

    Attributes:
        ids: ids of all parameters, by group.
        params: the parameters that are stepped.
        states: ``optimizer.state`` of each of ``params``.
        groups: the numbers of their groups.
        blocks: as of `StepTensors`, for every state column that any of ``params`` has.
        lacking: for each column that some of ``params`` lack, their indices.
        idle: frozen parameters, which are not stepped.
        dtensors: whether any of ``params`` is a DTensor.
        state_ids: ids of all values of ``optimizer.state``.
        forms: `param_groups.kept_form` of each group.
    """

    ids: list[list[int]]
    params: list[Tensor]
    states: list[dict[str, Any]]
    groups: list[int]
    blocks: dict[str, int]
    lacking: dict[str, frozenset[int]]
    idle: list[Tensor]
    dtensors: bool
    state_ids: list[int]
    forms: list[tuple[bool, bool]]

    def tensors(self) -> StepTensors:
        """The tensors of this step; of DTensors, this rank's part."""
        params: list[Tensor] = self.params
        grads: list[Tensor | None] = [p.grad for p in params]
        state = {name: self._column(name) for name in self.blocks}
        if self.dtensors:
            grads = local_gradients(params, grads)
            params = locals_of(params)
            state = {name: locals_of(of_entry) for name, of_entry in state.items()}
        return StepTensors(params, grads, state, self.groups, blocks=self.blocks)

    def _column(self, name: str) -> list[Tensor | None]:
        lacking = self.lacking.get(name)
        if lacking is None:
            return [own[name] for own in self.states]
        return [None if i in lacking else own[name] for i, own in enumerate(self.states)]
