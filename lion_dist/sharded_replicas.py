"""What ShardedLion does with whole replicas: broadcasts and comparisons."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import Tensor

from .sharded_access import agreeing
from .sharding.agreement import meet
from .sharding.replicas import broadcast, broadcast_dense, describe_dense, refuse_differing
from .sharding.shard import whole_state

if TYPE_CHECKING:
    from .sharded_lion import ShardedLion


def broadcast_given(optimizer: ShardedLion, buffers: Iterable[Tensor]) -> None:
    """`ShardedLion.broadcast_buffers`."""
    given = list(buffers)
    with agreeing(optimizer, ".broadcast_buffers()") as agreement:
        agreement.says(describe_dense(given, optimizer.process_group))
    optimizer._grads.settle()
    broadcast_dense(given, optimizer.process_group)


def compare_replicas(optimizer: ShardedLion) -> None:
    """`ShardedLion.check_replicas`."""
    optimizer._deferred.check(all=True)
    optimizer._grads.settle()
    refuse_differing(optimizer._params(), optimizer.process_group, whole_state(optimizer._shards))


def overwrite_replicas(optimizer: ShardedLion) -> None:
    """`ShardedLion.resync`."""
    meet(optimizer.process_group, "ShardedLion.resync()")
    optimizer._grads.settle()
    broadcast([*optimizer._params(), *(t for _, t in whole_state(optimizer._shards))], optimizer.process_group)
    optimizer._deferred.check(all=True)
