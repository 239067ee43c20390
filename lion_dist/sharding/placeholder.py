"""Zeros that take the place of a gradient which has left ``p.grad``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._torch_compat import SPEC, DisableTorchFunctionSubclass, amp_unscale_, data_getter
from ..dtensors import is_dtensor, local

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
        """A new placeholder in the shape, dtype and strides of a plain parameter, on its device."""
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


def placeholder_of(param: Any) -> Tensor:
    """A new placeholder for the gradient of a parameter."""
    if not is_dtensor(param):
        return Placeholder.of(param)
    made: Tensor = _dtensor_placeholder()(torch.zeros_like(local(param)), getattr(param, SPEC), requires_grad=False)
    return made


@functools.cache
def _dtensor_placeholder() -> Any:
    from torch.distributed.tensor import DTensor  # takes half a second if no DTensor has been made yet

    class DTensorPlaceholder(DTensor):
        """A `Placeholder` that FSDP2 and autograd add to.

        Functions on lists of DTensors raise no version, so it counts those that change it (`dtensors.changes_of`).

        Attributes:
            changes: number of calls of functions that may have changed it.
        """

        changes = 0

        @classmethod
        def __torch_function__(
            cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            if func == data_getter:
                raise RuntimeError(f"p.grad.data was read after the gradient had been reduced. {ADVICE}")
            name = getattr(func, "__name__", "")
            if name.endswith("_") and not name.endswith("__"):
                for t in args[0] if isinstance(args[0], (list, tuple)) else args[:1]:
                    if isinstance(t, DTensorPlaceholder):
                        t.changes += 1
            with DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))

    return DTensorPlaceholder
