"""ShardedLion's state_dicts: of this rank's part, and of the whole state as plain tensors on the CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import Optimizer

from .dtensors import is_dtensor, local, placed_like
from .lion_state import order_free
from .meshes import device_on
from .param_groups import Group
from .sharded_access import agreeing, check_last_steps
from .sharded_state import ordered, own_part
from .sharding.shard import Shard
from .state_dicts import map_tensors, with_named_dtypes

if TYPE_CHECKING:
    from .sharded_lion import ShardedLion

# Whole state by ``id`` of the parameter and by column name.
Gathered = Mapping[int, Mapping[str, Tensor]]


def shown(optimizer: ShardedLion) -> dict[str, Any]:
    """See `ShardedLion.state_dict`."""
    check_last_steps(optimizer)
    packed = Optimizer.state_dict(optimizer)  # its hooks may consolidate the state
    if optimizer._consolidated is not None:
        return whole(packed, optimizer.param_groups, optimizer._consolidated)
    return own_part(packed, optimizer.param_groups)


def full_state_dict(optimizer: ShardedLion, rank0_only: bool) -> dict[str, Any]:
    """See `ShardedLion.full_state_dict`."""
    # The argument is in the name of the call, since the ranks of meshes must have the same too.
    with agreeing(optimizer, f".full_state_dict(rank0_only={rank0_only})"):
        check_last_steps(optimizer)
    packed = Optimizer.state_dict(optimizer)  # on every rank, since its hooks may make collective calls
    gathered = _gather(optimizer, 0 if rank0_only else None)
    return {} if gathered is None else whole(packed, optimizer.param_groups, gathered)


def consolidate(optimizer: ShardedLion, to: int) -> Gathered | None:
    """Gathers the whole state on one rank, for `ShardedLion.consolidate_state_dict`; None on the others."""
    with agreeing(optimizer, f".consolidate_state_dict(to={to})"):
        check_last_steps(optimizer)
        world_size = dist.get_world_size(optimizer.process_group)
        if to not in range(world_size):
            last = world_size - 1
            raise ValueError(f"to must be the number of a rank in process_group, from 0 to {last}, got {to!r}")
    return _gather(optimizer, to)


def _gather(optimizer: ShardedLion, to: int | None) -> Gathered | None:
    optimizer._grads.settle()
    return gather_whole(optimizer._shards, optimizer.process_group, to)


def whole(packed: dict[str, Any], groups: Sequence[Group], gathered: Gathered) -> dict[str, Any]:
    """A state_dict as `Lion.state_dict` gives it, with whole state in place of this rank's part.

    Args:
        packed: as torch's state_dict returned it.
        groups: the optimizer's groups.
        gathered: as `gather_whole` returned it. Entries that other code keeps beside it are this rank's own; their
            tensors are copied to the CPU.
    """
    state = ordered(packed["state"])
    for i, p in enumerate(p for group in groups for p in group["params"]):
        if i in state:
            own = gathered.get(id(p), {})
            others = {key: map_tensors(_on_cpu, value) for key, value in state[i].items() if key not in own}
            state[i] = {**own, **others}
    return {**with_named_dtypes(packed), "state": state}


def _on_cpu(t: Tensor, _: Any) -> Tensor:
    return t.detach().to("cpu", copy=True)


def gather_whole(shards: Sequence[Shard], group: dist.ProcessGroup, to: int | None) -> Gathered | None:
    """The whole state on the CPU; a collective call.

    The tensors are contiguous; momenta and remainders are as `lion_state.as_shown` shows them.

    Args:
        to: the rank in the group that wants it, and of those in the meshes of DTensors the first; None: all ranks.

    Returns:
        None if this rank does not want it.
    """
    gathered: dict[int, dict[str, Tensor]] = {}
    # Only the ranks of the replica that keeps the state gather over the meshes.
    keeps = to in (None, dist.get_rank(group))
    wants = keeps and (to is None or not any(shard.placing.is_elsewhere for shard in shards))
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
    part = (t.float() if t.dtype == torch.int16 else t).to(device_on(p.device_mesh, local(p).device))
    shards: Any = placed_like(part, p)
    whole: Tensor = shards.full_tensor()
    return whole.cpu().contiguous() if wants else whole
