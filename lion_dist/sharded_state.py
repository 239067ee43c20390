"""ShardedLion's state as others see it: by parameter, in the shapes that the columns give to it.

Whole state is gathered into plain tensors on the CPU. A rank's own part is local: `BoxTensor`s that are views of the
shard. ``optimizer.state`` holds entries that make a BoxTensor whenever one is read, so that none outlives its shard.
State that every rank keeps whole (`Shard.whole`) is shown as the plain tensors that it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import Optimizer

from ._torch_compat import load_state_dict_post_hooks
from .dtensors import is_dtensor, local, placed_like
from .intake import new_shards
from .lion_state import order_free
from .meshes import of_same_boxes
from .param_groups import Group, describe_groups, state_columns
from .saved_momentum import in_kept_form
from .sharding.box_tensor import BoxTensor
from .sharding.replicas import comparable
from .sharding.shard import Column, Shard
from .state_dicts import check_and_wrap_state, map_tensors
from .update.state import EXP_AVG, EXP_AVG_SCALE, REMAINDER, StateColumn


class ShardEntry(MutableMapping[str, Any]):
    """One parameter's entry in ``optimizer.state``: a BoxTensor for each column, and what others keep beside them.

    The BoxTensors are views of the shard. A BoxTensor of the same cut, or a whole tensor of the same shape, that is
    assigned to a column is copied into the shard; between float dtypes it is cast, and anything else must have the
    column's own dtype. Columns cannot be deleted. Whole columns are plain tensors, and only whole tensors can be
    assigned to them.
    """

    def __init__(self, shard: Shard, param: int, rank: int, others: Mapping[str, Any]) -> None:
        self._place = shard, param, rank
        self.others = dict(others)

    def _column(self, key: str) -> Column | None:
        shard, _, _ = self._place
        return next((column for column in shard.columns if column.name == key), None)

    def _tensor(self, column: Column) -> Tensor:
        shard, param, rank = self._place
        return shard.state(param, column, rank)

    def __getitem__(self, key: str) -> Any:
        column = self._column(key)
        return self.others[key] if column is None else self._tensor(column)

    def __setitem__(self, key: str, value: Any) -> None:
        column = self._column(key)
        if column is None:
            self.others[key] = value
            return
        own = self._tensor(column)
        if not isinstance(value, Tensor) or value.shape != own.shape:
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"{key} must be a tensor of shape {tuple(own.shape)}, as its parameter requires, got {got}"
            )
        if value.dtype != own.dtype and not (value.is_floating_point() and own.is_floating_point()):
            raise TypeError(
                f"{key} is kept in {own.dtype}, got {value.dtype}: to assign would change the numbers. Give it in "
                f"{own.dtype}, or give a whole state to load_state_dict, which converts it"
            )
        with torch.no_grad():
            own.copy_(of_same_boxes(value, own) if is_dtensor(value) else value)

    def __delitem__(self, key: str) -> None:
        if self._column(key) is not None:
            raise TypeError(f"{key} is part of ShardedLion's shard, and cannot be deleted: assign zeros to it instead")
        del self.others[key]

    def __iter__(self) -> Iterator[str]:
        shard, _, _ = self._place
        return iter((*(column.name for column in shard.columns), *self.others))

    def __len__(self) -> int:
        shard, _, _ = self._place
        return len(shard.columns) + len(self.others)


def put_entries(state: MutableMapping[Any, Any], shards: Sequence[Shard], rank: int) -> None:
    """Puts an entry for every sharded parameter into ``state``, first and in the order of the shards.

    Entries that other code keeps in ``state`` stay.
    """
    before = dict(state)
    state.clear()
    for shard in shards:
        for i, p in enumerate(shard.params):
            entry = before.pop(p, {})
            others = entry.others if isinstance(entry, ShardEntry) else entry
            state[p] = ShardEntry(shard, i, rank, others)
    state.update(before)


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
            shown[i] = entry = {**entry, **decoded, EXP_AVG_SCALE: torch.ones((), device=codes.device)}
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


def whole(
    packed: Mapping[Any, Any], groups: Sequence[Group], gathered: Mapping[int, Mapping[str, Tensor]]
) -> dict[Any, Any]:
    """`ordered`, with whole state in place of this rank's part of it.

    Args:
        gathered: as `gather_whole` returned it. Entries that other code keeps beside it are this rank's own; their
            tensors are copied to the CPU.
    """
    state = ordered(packed)
    for i, p in enumerate(p for group in groups for p in group["params"]):
        if i in state:
            own = gathered.get(id(p), {})
            others = {key: map_tensors(_on_cpu, value) for key, value in state[i].items() if key not in own}
            state[i] = {**own, **others}
    return state


def _on_cpu(t: Tensor, _: Any) -> Tensor:
    return t.detach().to("cpu", copy=True)


def gather_whole(
    shards: Sequence[Shard], group: dist.ProcessGroup, rank0_only: bool
) -> dict[int, dict[str, Tensor]] | None:
    """The whole state on the CPU, by ``id`` of the parameter and by column name; a collective call.

    The tensors are contiguous; momenta and remainders are as `lion_state.as_shown` shows them.

    Args:
        rank0_only: whether only the group's first rank wants it, and of those in the meshes of DTensors the first.

    Returns:
        None if this rank does not want it.
    """
    gathered: dict[int, dict[str, Tensor]] = {}
    # With rank0_only, only the ranks of the first replica gather over the meshes.
    keeps = not rank0_only or dist.get_rank(group) == 0
    wants = keeps and not (rank0_only and any(shard.placing.is_elsewhere for shard in shards))
    for shard in shards:
        for p, state in zip(shard.params, shard.gather_state(group, keeps), strict=True):
            if not keeps:
                continue
            whole = {name: _over_mesh(t, p, wants) for name, t in order_free(state, is_dtensor(p)).items()}
            if wants:
                gathered[id(p)] = whole
    return gathered if wants else None


def _over_mesh(t: Tensor, p: Any, wants: bool) -> Tensor:
    """The whole tensor of state on the CPU, contiguous; a collective call for the ranks of p's mesh.

    Args:
        t: state of what this rank holds of the parameter, on the CPU.
        p: the parameter.
        wants: whether this rank wants the result.
    """
    if not is_dtensor(p) or (not t.dim() and p.dim()):
        return t.contiguous()
    part = (t.float() if t.dtype == torch.int16 else t).to(p.device_mesh.device_type)
    shards: Any = placed_like(part, p)
    whole: Tensor = shards.full_tensor()
    return whole.cpu().contiguous() if wants else whole


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
            return f"boxes of {t.dtype}" if isinstance(t, BoxTensor) else str(t.dtype)

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
