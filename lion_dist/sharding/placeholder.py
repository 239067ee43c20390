"""Zeros that take the place of a gradient which has left ``p.grad``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._torch_compat import DisableTorchFunctionSubclass, amp_unscale_, data_getter
from ..fsdp import is_dtensor, local, placed_like

ADVICE = (
    "In stage 2 gradients leave p.grad as they arrive, so torch's clip_grad_norm_, clip_grad_value_, "
    "GradScaler.unscale_, model.zero_grad(set_to_none=False), DistributedDataParallel and the like do not reach them. "
    "Use ShardedLion's own clip_grad_norm_() and zero_grad() and do not wrap the model, or use stage=1"
)


class Placeholder(Tensor):
    """Zeros that raise where a change would leave no trace in their version counter.

    Two accesses leave none: torch's unscaling operator, and a write through ``.data``. Pickled or deep-copied, a
    placeholder becomes a plain tensor.
    """

    @staticmethod
    def of(param: Tensor) -> Tensor:
        """A new placeholder in the shape, dtype and strides of a parameter, on its device. That of a DTensor is a plain
        DTensor, since FSDP2 adds to no other, and shows changes by its versions alone (`fsdp.changes_of`)."""
        if is_dtensor(param):
            return placed_like(torch.zeros_like(local(param)), param)
        return torch.zeros_like(param, requires_grad=False).as_subclass(Placeholder)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is amp_unscale_:
            raise RuntimeError(
                "GradScaler.unscale_() was called, which does not reach the gradients of ShardedLion with stage=2, "
                "since they have left p.grad. Train in bfloat16 without GradScaler, or use stage=1 with "
                "DistributedDataParallel"
            )
        if func == data_getter:  # each access makes a new object
            raise RuntimeError(f"p.grad.data was read after the gradient had been reduced. {ADVICE}")
        with DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.as_subclass(Tensor).clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)
