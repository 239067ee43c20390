"""What `ShardedLion` asks of frameworks that save ``optimizer.state_dict()`` of the first rank as the whole state."""

from __future__ import annotations

import inspect
import sys
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from ._torch_compat import state_dict_pre_hooks

if TYPE_CHECKING:
    from .sharded_lion import ShardedLion

# Optimizers that have been asked, and those whose state lion_dist makes whole before the framework saves it.
settled: WeakSet[ShardedLion] = WeakSet()


def check_saves(optimizer: ShardedLion) -> None:
    """Called by every step, and asks in the first.

    Raises:
        RuntimeError: Accelerate, or the Trainer on top of it, makes the step, and would save this rank's part of the
            state, which fails.
    """
    if optimizer in settled:
        return
    if _accelerate_steps() and not state_dict_pre_hooks(optimizer):
        raise RuntimeError(
            "Accelerate's own Accelerator cannot save a ShardedLion, whose state_dict() is this rank's part: use "
            "ShardedLionAccelerator, or ShardedLionTrainerMixin with the Trainer (both in lion_dist.huggingface), or "
            "after prepare() call optimizer.register_state_dict_pre_hook(ShardedLion.consolidate_state_dict) on the "
            "ShardedLion, which makes each state_dict() a collective call for the whole state"
        )
    settled.add(optimizer)


def _accelerate_steps() -> bool:
    """Whether the caller's step is one of Accelerate's wrapper, which leaves no mark on the optimizer that it wraps."""
    wrapper: Any = getattr(sys.modules.get("accelerate.optimizer"), "AcceleratedOptimizer", None)
    frame = None if wrapper is None else inspect.currentframe()
    while frame is not None and frame.f_code is not wrapper.step.__code__:
        frame = frame.f_back
    return frame is not None
