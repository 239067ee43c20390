"""ShardedLion's state in the memory of the CPU, while the device is needed for something else."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .sharded_access import agreeing, check_last_steps

if TYPE_CHECKING:
    from .sharded_lion import ShardedLion


def move_state(optimizer: ShardedLion, offload: bool) -> None:
    """Moves the state to the CPU, or back to where the parameters were when they were sharded; a collective call.

    Shards whose state is there already stay as they are. Every rank first makes its copies; only where all could does
    any rank change something.

    Raises:
        RuntimeError, ValueError: as for `ShardedLion.offload_state`.
    """
    with agreeing(optimizer, ".offload_state()" if offload else ".reload_state()") as agreement:
        check_last_steps(optimizer)
        shards = [shard for shard in optimizer._shards if shard.offloaded != offload]
        agreement.says([f"{len(shards)} shards to move"])
        copies = [shard.state_on("cpu" if offload else shard.device) for shard in shards]
    for shard, copied in zip(shards, copies, strict=True):
        shard.put_state(copied, offload)
    optimizer._stepper.forget_tables()
