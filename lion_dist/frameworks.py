"""Frameworks that save ``optimizer.state_dict()`` on the first rank alone, where `ShardedLion` has one rank's part."""

from __future__ import annotations

import inspect
import sys
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from ._torch_compat import state_dict_pre_hooks
from .param_groups import warn

if TYPE_CHECKING:
    from .sharded_lion import ShardedLion

# Optimizers whose first step has been checked, and those whose state lion_dist makes whole before the framework saves.
settled: WeakSet[ShardedLion] = WeakSet()


def check_saves(optimizer: ShardedLion) -> None:
    """Checks, in an optimizer's first step, whether the framework that makes the step can save its state.

    Under Accelerate's own Accelerator, and in an Engine of ignite, it warns, since the code around it decides how it
    saves.

    Raises:
        RuntimeError: the Trainer of transformers makes the step, and its first save would fail.
    """
    if optimizer in settled:
        return
    trainer = _caller("transformers.trainer", "Trainer", "train")
    if trainer is not None and _saves_part(trainer, optimizer):
        raise RuntimeError(
            "the Trainer cannot save a ShardedLion, whose state_dict() is one rank's part: use a class derived from "
            "lion_dist.huggingface.ShardedLionTrainerMixin and the Trainer, in this order, or set save_only_model=True "
            "or save_strategy='no'"
        )
    settled.add(optimizer)
    accelerated = _caller("accelerate.optimizer", "AcceleratedOptimizer", "step")
    if trainer is None and unwrapped(accelerated) is optimizer and not state_dict_pre_hooks(optimizer):
        warn(
            "Accelerator.save_state() fails with a ShardedLion, whose state_dict() is one rank's part, unless every "
            "rank calls consolidate_state_dict() before it. lion_dist.huggingface.ShardedLionAccelerator does so. With "
            "Accelerate's own, call register_state_dict_pre_hook(ShardedLion.consolidate_state_dict) on the "
            "ShardedLion after prepare(). lion_dist.checkpoint needs neither"
        )
    if _caller("ignite.engine.engine", "Engine", "run") is not None and not state_dict_pre_hooks(optimizer):
        warn(
            "ignite's Checkpoint fails with a ShardedLion, whose state_dict() is one rank's part, unless "
            "register_state_dict_pre_hook(ShardedLion.consolidate_state_dict) is called on the ShardedLion. "
            "lion_dist.checkpoint does not need it"
        )


def _saves_part(trainer: Any, optimizer: ShardedLion) -> bool:
    """Whether a Trainer saves what this optimizer's state_dict returns on the first rank."""
    save, args = "_save_optimizer_and_scheduler", trainer.args
    own = getattr(type(trainer), save, None) is getattr(sys.modules["transformers.trainer"].Trainer, save, None)
    return own and unwrapped(trainer.optimizer) is optimizer and args.save_strategy != "no" and not args.save_only_model


def unwrapped(optimizer: Any) -> Any:
    """The optimizer that Accelerate has wrapped; any other object as it is."""
    return getattr(optimizer, "optimizer", optimizer)


def _caller(module: str, cls: str, method: str) -> Any:
    """The object of a class whose method is among the callers of this function; None if there is none.

    Neither Accelerate nor the Trainer leaves a mark on the optimizer that it wraps.
    """
    found: Any = getattr(getattr(sys.modules.get(module), cls, None), method, None)
    frame = None if found is None else inspect.currentframe()
    while frame is not None and frame.f_code is not found.__code__:
        frame = frame.f_back
    return None if frame is None else frame.f_locals["self"]
