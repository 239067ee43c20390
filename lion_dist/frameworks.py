"""What `ShardedLion` asks of frameworks that save ``optimizer.state_dict()`` of the first rank as the whole state."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING
from weakref import WeakSet

from ._torch_compat import state_dict_pre_hooks

if TYPE_CHECKING:
    from .sharded_lion import ShardedLion

# Optimizers that this file has nothing more to ask of: they have been asked, or lion_dist makes their state whole when
# the framework saves.
settled: WeakSet[ShardedLion] = WeakSet()


def check_saves(optimizer: ShardedLion) -> None:
    """Called by every step, and asks in the first.

    Raises:
        RuntimeError: an Accelerator, which the Trainer has too, would save this rank's part: its first save would fail.
    """
    if optimizer in settled:
        return
    accelerate = sys.modules.get("accelerate.state")
    if accelerate is not None and accelerate.is_initialized() and not state_dict_pre_hooks(optimizer):
        raise RuntimeError(
            "Accelerate's own Accelerator cannot save a ShardedLion, whose state_dict() is this rank's part: use "
            "ShardedLionAccelerator, or ShardedLionTrainerMixin with the Trainer (both in lion_dist.huggingface), or "
            "after prepare() call optimizer.register_state_dict_pre_hook(ShardedLion.consolidate_state_dict) on the "
            "ShardedLion, which makes each state_dict() a collective call for the whole state"
        )
    settled.add(optimizer)
