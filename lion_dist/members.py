"""The parameters that `Lion` steps, and where their state is."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor

from .dtensors import is_dtensor, local_gradients, locals_of
from .frozen import takes_part
from .fsdp import new_state
from .param_groups import Group, check_kept_form, check_steppable, has_kept_form, kept_form, state_columns
from .update.segments import StepTensors
from .update.state import StateColumn

_DTYPE = attrgetter("dtype")


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
        mastered, dtypes: those of ``params`` whose groups have master weights, and their dtypes, which decide whether
            there is a remainder.
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
    mastered: list[Tensor]
    dtypes: list[torch.dtype]

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
            and self.dtypes == list(map(_DTYPE, self.mastered))
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


def find_members(
    param_groups: Sequence[Group], state: Mapping[Tensor, dict[str, Any]], only_taking_part: bool = False
) -> tuple[Members, dict[Tensor, dict[str, Tensor]]]:
    """Goes through an optimizer's groups.

    Args:
        param_groups, state: those of the optimizer.
        only_taking_part: leaves out frozen parameters that have state, too.

    Returns:
        The members, and new state for each parameter that lacks some, by column, which the caller puts into
        ``state``.

    Raises:
        TypeError, ValueError: Lion cannot step a parameter that takes part for the first time, a column has
            different blocks in different groups, or the form of a momentum is not that of its group.
    """
    given = [list(group["params"]) for group in param_groups]
    params: list[Tensor] = []
    states, groups, idle = [], [], []
    blocks: dict[str, int] = {}
    holders: dict[str, set[int]] = {}
    missing: dict[str, list[tuple[Tensor, StateColumn]]] = {}
    for i, group in enumerate(param_groups):
        for p in group["params"]:
            own, columns = state.get(p) or {}, state_columns(p, group)
            lacking = [column for column in columns if column.name not in own]
            if takes_part(p):
                check_kept_form(p, own, group)
            elif only_taking_part or lacking or not has_kept_form(p, own, group):
                idle.append(p)
                continue
            if lacking:
                check_steppable(p, f"parameter {len(params) + len(idle)}")
            for column in lacking:
                missing.setdefault(column.name, []).append((p, column))
            for column in columns:
                if blocks.setdefault(column.name, column.block) != column.block:
                    raise ValueError(
                        f"{column.name} has blocks of {blocks[column.name]} elements in one parameter group and of "
                        f"{column.block} in another; expected one size in all groups"
                    )
                holders.setdefault(column.name, set()).add(len(params))
            params.append(p)
            states.append(own)
            groups.append(i)
    new: dict[Tensor, dict[str, Tensor]] = {}
    for name, wanted in missing.items():
        stateless = [p for p, _ in wanted]
        for p, made in zip(stateless, new_state(stateless, [column for _, column in wanted]), strict=True):
            new.setdefault(p, {})[name] = made
    states = [{**own, **new[p]} if p in new else own for p, own in zip(params, states, strict=True)]
    entries = list(state.values())
    everyone = frozenset(range(len(params)))
    absent = {name: everyone - those for name, those in holders.items() if len(those) < len(params)}
    dtensors = any(map(is_dtensor, params))
    forms = list(map(kept_form, param_groups))
    mastered = [p for p, group in zip(params, groups, strict=True) if forms[group][1]]
    dtypes = list(map(_DTYPE, mastered))
    return Members(given, params, states, groups, blocks, absent, idle, dtensors, entries, forms, mastered, dtypes), new
