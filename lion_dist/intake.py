"""How parameters come into a ShardedLion: they are checked, made equal on all ranks, and sharded.

Frozen parameters wait in `FrozenParams` and are sharded once they are unfrozen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from .dtensors import local
from .frozen import is_plain, takes_part
from .fsdp import refuse_flat
from .meshes import check_orthogonal, describe_part
from .param_groups import (
    Group,
    check_params,
    complete_group,
    describe_groups,
    normalize_group,
    state_columns,
    warn_of_unknown_keys,
)
from .sharding.agreement import Agreement
from .sharding.replicas import broadcast, comparable, refuse_permuted
from .sharding.shard import Shard, check_shardable, make_shards
from .update.segments import check_no_shared_memory
from .update.state import StateColumn


def own_rank(process_group: dist.ProcessGroup | None) -> tuple[dist.ProcessGroup, int]:
    """The process group that an argument means, None being the default group, and this rank's number in it.

    Raises:
        RuntimeError: torch.distributed is not initialised.
        TypeError: the argument is no process group.
        ValueError: this rank is not in the group.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "ShardedLion needs an initialised process group: call torch.distributed.init_process_group() first "
            "(under torchrun), or use lion_dist.Lion on one process"
        )
    group: Any = dist.group.WORLD if process_group is None else process_group
    outside = dist.GroupMember.NON_GROUP_MEMBER  # what torch gives to ranks that are not in a group
    if group != outside and not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"process_group must be a process group of torch.distributed, got a {type(group).__name__}: of a "
            'DeviceMesh, give mesh["replicate"].get_group()'
        )
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError("this rank is not in process_group; make the optimizer on the group's ranks only")
    return group, rank


def listed(params: Any) -> tuple[Any, list[Tensor]]:
    """An optimizer's argument ``params`` in a form that can be read again, and the tensors in it. What torch refuses is
    left to it."""

    def kept(items: Any) -> Any:
        return list(items) if isinstance(items, Iterator) else items

    params = kept(params)
    if isinstance(params, (list, tuple)):
        params = [{**g, "params": kept(g["params"])} if isinstance(g, dict) and "params" in g else g for g in params]
    found, todo = [], [params]
    while todo:
        item = todo.pop()
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, dict):
            todo.append(item.get("params"))
        elif isinstance(item, (list, tuple)):
            todo += reversed(item)
    return params, found


def check_new(params: Sequence[Tensor], others: Sequence[Tensor], group: dist.ProcessGroup, averaged: bool) -> None:
    """Raises ValueError or TypeError for parameters that cannot be sharded together with others.

    Frozen parameters may be anything, and are checked once they take part. ``averaged``: see `check_orthogonal`.
    """
    refuse_flat(params)
    check_params(params, others)
    check_orthogonal(params, group, averaged)
    check_shardable(params, others, group)
    check_no_shared_memory([local(p) for p in (*others, *params) if takes_part(p)])


def complete_new_group(
    groups: Sequence[Group], defaults: Group, process_group: dist.ProcessGroup, averaged: bool
) -> None:
    """Completes the last parameter group, which is new, from the defaults, and checks it; ``averaged`` as for
    `check_new`.

    Raises:
        ValueError, TypeError: a hyper-parameter or parameter that ShardedLion cannot use.
    """
    *others, group = groups
    complete_group(group, defaults)
    normalize_group(group)
    check_new(group["params"], [p for other in others for p in other["params"]], process_group, averaged)
    for p in group["params"]:
        state_columns(p, group)
    warn_of_unknown_keys(group, others)


def describe_new(groups: Sequence[Group], first: int, group: dist.ProcessGroup) -> list[str]:
    """Lines about the parameter groups from number ``first`` on that must be the same on all ranks.

    They say which frozen parameters are broadcast and compared, since a rank that left one out would make other
    collectives than the rest.
    """
    params = [p for new in groups[first:] for p in new["params"]]
    reached = set(comparable(params, group))
    frozen = [
        f"frozen parameter {i} of the new ones is "
        + ("broadcast" if i in reached else "not broadcast, since it is on another device than the trainable ones")
        for i, p in enumerate(params)
        if not takes_part(p) and is_plain(local(p))
    ]
    parts = [f"parameter {i} of the new ones{part}" for i, p in enumerate(params) if (part := describe_part(p))]
    return [*describe_groups(groups, first), *parts, *frozen]


def make_equal(params: Sequence[Tensor], named: bool, group: dist.ProcessGroup) -> set[int]:
    """Gives every rank the parameters of the group's first rank; a collective call.

    Args:
        named: whether the ranks have compared the names of the parameters. Their order is judged by values otherwise.

    Returns:
        Indices of the parameters that were sent. The others are frozen ones whose bytes cannot be sent.

    Raises:
        ValueError: on every rank, where a rank has the parameters in another order; nothing was changed.
    """
    if not named:
        refuse_permuted(params, group)
    return set(broadcast(params, group))


def new_shards(
    params: Sequence[Tensor],
    groups: Sequence[Group],
    columns: Mapping[int, tuple[StateColumn, ...]],
    group: dist.ProcessGroup,
    keep_whole: bool,
) -> list[Shard]:
    """Shards of parameters, whose state is zeros.

    Args:
        groups: the optimizer's parameter groups, which say what state their parameters have.
        columns: the state, by ``id`` of the parameter, where it is not what the group says.
        group: the ranks to shard over.
        keep_whole: see `ParamSync.keeps_whole`.
    """
    all_columns = [columns.get(id(p)) or own for p, own in zip(params, _columns_of(params, groups), strict=True)]
    return make_shards(params, all_columns, dist.get_world_size(group), keep_whole)


def _columns_of(params: Sequence[Tensor], groups: Sequence[Group]) -> list[tuple[StateColumn, ...]]:
    """The state that the groups give to their parameters. Raises TypeError where a parameter cannot have it."""
    group_of = {id(p): group for group in groups for p in group["params"]}
    return [state_columns(p, group_of[id(p)]) for p in params]


class FrozenParams:
    """The parameters that are not sharded, because they were frozen when the optimizer was given them.

    Args:
        group: the ranks.
        averaged: see `check_orthogonal`.

    Attributes:
        params: in the order in which they were given.
    """

    def __init__(self, group: dist.ProcessGroup, averaged: bool) -> None:
        self.params: list[Tensor] = []
        self._group, self._averaged = group, averaged
        self._given: list[Tensor] = []  # `params`, and those that have been sharded since
        self._unequal: set[int] = set()  # ids of those that could not be broadcast when they were given

    def add(self, params: Sequence[Tensor], equal: set[int]) -> None:
        """Takes new parameters; trainable ones are left out.

        Args:
            equal: indices of the parameters that are equal on all ranks.
        """
        frozen = [p for p in params if not p.requires_grad]
        self._given += frozen
        self.params += frozen
        self._unequal |= {id(p) for i, p in enumerate(params) if i not in equal}

    def leave_out(self, shards: Sequence[Shard]) -> None:
        """Takes note of the parameters that are sharded now. All others are not."""
        sharded = {id(p) for shard in shards for p in shard.params}
        self.params = [p for p in self._given if id(p) not in sharded]

    def unfrozen(self) -> list[int]:
        """Indices of the parameters that take part by now."""
        return [i for i, p in enumerate(self.params) if takes_part(p)]

    def prepare(
        self, indices: Sequence[int], shards: Sequence[Shard], groups: Sequence[Group], call: str
    ) -> list[Tensor]:
        """Compares unfrozen parameters over the ranks and makes them equal, so that they can be sharded; a collective
        call.

        Args:
            indices: the unfrozen parameters.
            shards: the shards of all parameters that are sharded already.
            groups: the optimizer's parameter groups.
            call: the collective call, for error messages.

        Returns:
            The unfrozen parameters.

        Raises:
            ValueError, TypeError: on every rank, where the ranks unfroze different parameters or one cannot be sharded.
        """
        new = [self.params[i] for i in indices]
        with Agreement(self._group, call) as agreement:
            check_new(new, [p for shard in shards for p in shard.params], self._group, self._averaged)
            _columns_of(new, groups)
            agreement.says(
                [
                    f"unfrozen parameter {i}, shape {tuple(p.shape)}, {p.dtype}, {p.layout}, {p.device.type}, "
                    f"requires_grad={p.requires_grad}{describe_part(p)}"
                    for i, p in zip(indices, new, strict=True)
                ]
            )
        broadcast([p for p in new if id(p) in self._unequal], self._group)
        return new
