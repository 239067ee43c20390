"""The parameters that `Lion` steps, and where their state is."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any

from torch import Tensor

from .dtensors import local_gradients, locals_of
from .frozen import takes_part
from .param_groups import Group, kept_form
from .update.segments import StepTensors


@dataclass
class Members:
    """The parameters of the groups, as a step needs them; kept for the next step if nothing has changed.

    Attributes:
        given: all parameters, by group.
        params: the parameters that are stepped.
        states: ``optimizer.state`` of each of ``params``.
        groups: the numbers of their groups.
        blocks: as of `StepTensors`, for every state column that any of ``params`` has.
        lacking: for each column that some of ``params`` lack, their indices.
        idle: frozen parameters, which are not stepped.
        dtensors: whether any of ``params`` is a DTensor.
        entries: all values of ``optimizer.state``.
        forms: `param_groups.kept_form` of each group.
    """

    given: list[list[Tensor]]
    params: list[Tensor]
    states: list[dict[str, Any]]
    groups: list[int]
    blocks: dict[str, int]
    lacking: dict[str, frozenset[int]]
    idle: list[Tensor]
    dtensors: bool
    entries: list[Any]
    forms: list[tuple[bool, bool]]

    def hold(self, groups: Sequence[Group], state: Mapping[Any, Any]) -> bool:
        """Whether these are still the members of an optimizer with these groups and this state.

        A dict of the state that other code has put in the place of another is seen; what it has changed within a dict
        is read in each step.
        """
        return (
            len(self.given) == len(groups)
            and all(_same(params, group["params"]) for params, group in zip(self.given, groups, strict=True))
            and _same(self.entries, state.values())
            and not any(map(takes_part, self.idle))
            and self.forms == list(map(kept_form, groups))
        )

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


def _same(a: Sequence[Any], b: Collection[Any]) -> bool:
    """Whether two collections hold the same objects in the same order."""
    return len(a) == len(b) and all(map(is_, a, b))
