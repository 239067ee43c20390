"""The replicas of a ShardedLion's tensors: compared, and made equal. All functions are collective calls."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from .sharded_access import agreeing, params_of
from .sharding.agreement import meet
from .sharding.replicas import broadcast, broadcast_dense, describe_dense, refuse_differing
from .sharding.shard import whole_state

if TYPE_CHECKING:
    from .sharded_lion import ShardedLion


def check(optimizer: ShardedLion) -> None:
    """See `ShardedLion.check_replicas`."""
    optimizer._deferred.check(all=True)
    optimizer._grads.settle()
    refuse_differing(params_of(optimizer), optimizer.process_group, whole_state(optimizer._shards))


def resync(optimizer: ShardedLion) -> None:
    """See `ShardedLion.resync`."""
    group = optimizer.process_group
    meet(group, "ShardedLion.resync()")
    optimizer._grads.settle()
    broadcast([*params_of(optimizer), *(t for _, t in whole_state(optimizer._shards))], group)
    optimizer._consolidated = None
    optimizer._deferred.check(all=True)


def share_buffers(optimizer: ShardedLion, buffers: Sequence[Tensor]) -> None:
    """See `ShardedLion.broadcast_buffers`."""
    group = optimizer.process_group
    with agreeing(optimizer, ".broadcast_buffers()") as agreement:
        agreement.says(describe_dense(buffers, group))
    optimizer._grads.settle()
    broadcast_dense(buffers, group)


def share_unheld(optimizers: Sequence[ShardedLion], modules: Iterable[nn.Module]) -> None:
    """Broadcasts what none of the optimizers holds, buffers and parameters of modules, from the first one's first rank,
    as DistributedDataParallel does when it wraps a module; a collective call."""
    held = {id(p) for optimizer in optimizers for p in params_of(optimizer)}
    tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    optimizers[0].broadcast_buffers([t for t in tensors if id(t) not in held])
