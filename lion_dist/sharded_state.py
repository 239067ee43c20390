"""ShardedLion's state as others see it: by parameter, in the shapes that the columns give to it.

A rank's own part is shown as `BoxTensor`s that are views of the shard, without communication. State that every rank
keeps whole (`Shard.whole`) is shown as the plain tensors that it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import Optimizer

from ._torch_compat import load_state_dict_post_hooks
from .dtensors import is_dtensor, local
from .intake import new_shards
from .param_groups import Group, describe_groups, state_columns
from .saved_momentum import in_kept_form
from .sharded_access import agreeing, params_of, refuse_offloaded
from .sharding.box_tensor import BoxTensor
from .sharding.replicas import comparable
from .sharding.shard import Shard
from .state_dicts import check_and_wrap_state, check_is_dict, with_named_dtypes
from .state_entries import ShardEntry
from .update.state import EXP_AVG, EXP_AVG_SCALE, REMAINDER, StateColumn

if TYPE_CHECKING:
    from .sharded_lion import ShardedLion


def own_part(packed: dict[str, Any], groups: Sequence[Group]) -> dict[str, Any]:
    """A state_dict of this rank's part of the state, in the forms that torch.distributed.checkpoint can reshard.

    Args:
        packed: as torch's state_dict returned it.
        groups: the optimizer's groups.
    """
    return {**with_named_dtypes(packed), "state": order_free_boxes(ordered(packed["state"]), groups)}


def order_free_boxes(state: Mapping[Any, Any], groups: Sequence[Group]) -> dict[Any, Any]:
    """A copy of this rank's part of the state in which 8-bit momenta of DTensors, and of parameters that are not
    row-major, are decoded, and remainders of DTensors are float32: as `lion_state.as_shown` shows them.

    Momenta are float32 `BoxTensor`s of the same boxes, and copies, with one scale.

    Args:
        state: as `ordered` returned it.
        groups: the optimizer's groups.
    """
    shown, numbers = dict(state), (StateColumn(EXP_AVG, torch.float32),)
    for i, p in enumerate(p for group in groups for p in group["params"]):
        entry = shown.get(i, {})
        codes, sharded = entry.get(EXP_AVG), is_dtensor(p)
        if isinstance(codes, BoxTensor) and codes.dtype == torch.int8 and (sharded or not p.is_contiguous()):
            momentum = {name: entry[name] for name in (EXP_AVG, EXP_AVG_SCALE)}
            decoded = in_kept_form(i, momentum, p, numbers, {})
            one = torch.ones((), dtype=torch.float32, device=codes.device)
            shown[i] = entry = {**entry, **decoded, EXP_AVG_SCALE: one}
        if sharded and isinstance(remainder := entry.get(REMAINDER), Tensor):
            shown[i] = {**entry, REMAINDER: remainder.float()}
    return shown


def ordered(packed: Mapping[Any, Any]) -> dict[Any, Any]:
    """The state of a packed state_dict as plain dicts: first those of parameters, by their numbers."""
    numbered = sorted(i for i in packed if isinstance(i, int))
    return {
        i: dict(packed[i]) if isinstance(packed[i], ShardEntry) else packed[i]
        for i in (*numbered, *(i for i in packed if not isinstance(i, int)))
    }


def load(optimizer: ShardedLion, state_dict: dict[str, Any]) -> None:
    """See `ShardedLion.load_state_dict`."""
    group, sync = optimizer.process_group, optimizer._sync
    incoming = IncomingState(optimizer.param_groups, optimizer.defaults, optimizer.state)
    with incoming.receiving(optimizer):
        with agreeing(optimizer, ".load_state_dict()") as agreement:
            refuse_offloaded(optimizer, "load_state_dict()")
            check_is_dict(state_dict)
            Optimizer.load_state_dict(optimizer, state_dict)
            incoming.check(optimizer.param_groups, optimizer._shards, group)
            agreement.says(incoming.describe(optimizer.param_groups))
        optimizer._grads.settle()
        sync.check_load(params_of(optimizer), incoming.of_params())
    shards = incoming.choose_shards(optimizer.param_groups, optimizer._shards, group, sync.keeps_whole)
    optimizer._set_shards(shards)
    for shard in shards:
        shard.take_state(incoming.state, group)
    optimizer._stepper.set_clipping(None)
    optimizer._deferred.clear()
    with agreeing(optimizer, ".load_state_dict(), its post hooks"):
        incoming.run_post_hooks(optimizer)


class IncomingState:
    """A state_dict that is being loaded. It is checked, and Lion's state is kept back from what torch would do with it.

    Attributes:
        state: by ``id`` of the parameter and by column name: whole tensors, or BoxTensors.
        columns: what a parameter with such state will have, by its ``id``, once `check` has been called.
    """

    def __init__(self, groups: Sequence[Group], defaults: Group, state: Mapping[Any, Any]) -> None:
        self._groups, self._defaults, self._state = groups, defaults, state
        self._params: list[Tensor] = [p for group in groups for p in group["params"]]
        self.state: dict[int, dict[str, Tensor]] = {}
        self.columns: dict[int, tuple[StateColumn, ...]] = {}
        self._post_hooks: dict[int, Callable[[Optimizer], None]] = {}

    @contextmanager
    def receiving(self, optimizer: Optimizer) -> Iterator[None]:
        """Context manager around torch's load_state_dict, from which a last pre-hook keeps Lion's state back.

        After an error, the optimizer has its old groups and state. Within, it has no post hooks, because torch would
        run them before Lion's state is loaded.
        """
        previous = optimizer.param_groups, optimizer.state
        handle = optimizer.register_load_state_dict_pre_hook(self._take)
        try:
            yield
        except Exception:
            optimizer.param_groups, optimizer.state = previous
            raise
        finally:
            handle.remove()
            # Under their old handles and in their old order.
            load_state_dict_post_hooks(optimizer).update(self._post_hooks)

    def _take(self, optimizer: Optimizer, given: dict[str, Any]) -> dict[str, Any]:
        """A pre-hook of load_state_dict: returns what is not Lion's. Raises ValueError or TypeError for a misfit."""
        hooks = load_state_dict_post_hooks(optimizer)
        self._post_hooks.update(hooks)
        hooks.clear()
        checked = check_and_wrap_state(given, self._groups, self._defaults, self._state, (BoxTensor,))
        numbered = [(i, group) for group in checked["param_groups"] for i in group["params"]]
        for (i, group), p in zip(numbered, self._params, strict=True):
            entry = checked["state"].get(i, {})
            names = [column.name for column in state_columns(p, group)]
            own = {name: entry.pop(name).value for name in names if name in entry}
            if own:
                self.state[id(p)] = own
        return checked

    def check(self, groups: Sequence[Group], shards: Sequence[Shard], group: dist.ProcessGroup) -> None:
        """Checks what `_take` kept back, and decides on the columns.

        Args:
            groups: the parameter groups as they were loaded.
            shards: the optimizer's shards.
            group: its ranks.

        Raises:
            ValueError: state of a frozen parameter that cannot be sharded, or a BoxTensor that is not of these shards.
        """
        self._check_shardable(group)
        self._check_cut(groups, shards, dist.get_rank(group))

    def _check_shardable(self, group: dist.ProcessGroup) -> None:
        able = comparable(self._params, group)
        for i, p in enumerate(self._params):
            if id(p) in self.state and i not in able:
                raise ValueError(
                    f"the state_dict has state for parameter {i} (shape {tuple(p.shape)}), which is frozen here, "
                    f"and not dense or on another device (strides {p.stride()}, {p.device}), so ShardedLion cannot "
                    "shard it: make it contiguous, or leave its entry out of the state_dict"
                )

    def _check_cut(self, groups: Sequence[Group], shards: Sequence[Shard], rank: int) -> None:
        for group in groups:
            for p in group["params"]:
                if id(p) in self.state:
                    self.columns[id(p)] = _loaded_columns(p, group, self.state[id(p)])
        place = {id(p): (shard, i) for shard in shards for i, p in enumerate(shard.params)}
        fits = self._fits(shards)
        for number, p in enumerate(self._params):
            for column in self.columns.get(id(p), ()):
                given = self.state[id(p)].get(column.name)
                if not isinstance(given, BoxTensor):
                    continue
                shard, i = place.get(id(p), (None, 0))
                if not fits or shard is None or given.boxes != shard.boxes(i, column, rank).boxes:
                    raise ValueError(
                        f"{column.name} of parameter {number} is a BoxTensor of another cut (other ranks, parameters "
                        "or dtypes of state) than this ShardedLion's: go through lion_dist.checkpoint or "
                        "torch.distributed.checkpoint, into this optimizer's own state_dict(), or load a "
                        "full_state_dict()"
                    )

    def _fits(self, shards: Sequence[Shard]) -> bool:
        """Whether the shards can take the state as they are."""
        there = {id(p): shard.columns for shard in shards for p in shard.params}
        return all(there.get(p) == columns for p, columns in self.columns.items())

    def of_params(self) -> list[tuple[str, Tensor]]:
        """Whole tensors that are loaded into columns ``of_param``, each with its name, once `check` has been called."""
        return [
            (f"{column.name} of parameter {i}", local(given).contiguous())
            for i, p in enumerate(self._params)
            for column in self.columns.get(id(p), ())
            if column.of_param and (given := self.state[id(p)].get(column.name)) is not None
            if not isinstance(given, BoxTensor)
        ]

    def choose_shards(
        self, groups: Sequence[Group], shards: list[Shard], group: dist.ProcessGroup, keep_whole: bool
    ) -> list[Shard]:
        """The optimizer's shards, or new ones of zeros where those cannot take the state, once `check` has been called.

        Args:
            groups: the parameter groups as they were loaded.
            group, keep_whole: as for `new_shards`.
        """
        if self._fits(shards):
            return shards
        sharded = {id(p) for shard in shards for p in shard.params} | self.columns.keys()
        params = [p for p in self._params if id(p) in sharded]
        return new_shards(params, groups, self.columns, group, keep_whole)

    def run_post_hooks(self, optimizer: Optimizer) -> None:
        """Runs the post hooks of load_state_dict, once Lion's state is loaded."""
        for hook in list(load_state_dict_post_hooks(optimizer).values()):
            hook(optimizer)

    def describe(self, groups: Sequence[Group]) -> list[str]:
        """Lines about the loaded groups and the state that must be the same on all ranks."""

        def kind(t: Tensor) -> str:
            part = " in boxes, one rank's part (full_state_dict() and consolidate_state_dict() give whole tensors)"
            return f"{t.dtype}{part if isinstance(t, BoxTensor) else ''}"

        state = [
            f"state of parameter {i}: "
            + (", ".join(f"{name}: {kind(t)}" for name, t in self.state.get(id(p), {}).items()) or "none")
            for i, p in enumerate(self._params)
        ]
        return [*describe_groups(groups), *state]


def _loaded_columns(p: Tensor, group: Group, given: Mapping[str, Tensor]) -> tuple[StateColumn, ...]:
    """The columns of a parameter whose state is loaded, in the dtypes that they must have or else were saved in."""
    return tuple(
        replace(column, dtype=column.loaded_dtype(given[column.name].dtype)) if column.name in given else column
        for column in state_columns(p, group)
    )
