"""How to notice that somebody zeroed or scaled gradients which are no longer in ``p.grad``.

Once gradients have left for the shards, ``model.zero_grad()`` finds nothing to zero and torch's
``clip_grad_norm_`` nothing to scale, and neither says so. So one small parameter, the sentinel, keeps a gradient
of zeros in its place: whoever deals with "all gradients" deals with that one too, and leaves a trace. The sentinel is
a parameter whose gradient has left, so that others, whose gradients are None, can be given one by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._torch_compat import DisableTorchFunctionSubclass, amp_unscale_, data_getter, version_of

_ADVICE = (
    "In stage 2 gradients leave p.grad as they arrive, so torch's clip_grad_norm_, clip_grad_value_, "
    "GradScaler.unscale_, model.zero_grad(set_to_none=False), DistributedDataParallel and the like do not reach them: "
    "use ShardedLion's own clip_grad_norm_() and zero_grad(), and a model that is not wrapped; or use stage=1"
)


class _Zeros(Tensor):
    """Zeros in the place of a gradient, which refuse what would change them without a trace: to be unscaled, by an
    operator that does not count as a change of the tensor, and ``.data``, whose changes are not counted here. Pickled
    they are a plain tensor."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is amp_unscale_:
            raise RuntimeError(
                "GradScaler.unscale_() does not reach the gradients of ShardedLion with stage=2, which have left "
                "p.grad: train in bfloat16 without GradScaler, or use stage=1 with DistributedDataParallel"
            )
        if func == data_getter:  # a new object each time
            raise RuntimeError(f"p.grad.data is not that of a gradient that has been reduced. {_ADVICE}")
        with DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.as_subclass(Tensor).clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)


class Sentinel:
    """One of the parameters: the smallest of those whose gradients have left.

    Args:
        look: called when autograd is about to add to the sentinel's gradient, to ask `gone` in time.

    Attributes:
        index: its number; -1 before the first `watch`.
    """

    def __init__(self, params: Sequence[Tensor], look: Callable[[], None]) -> None:
        self.index = -1
        self._params = params
        self._look = look
        # Autograd never adds to frozen parameters, and zeroing may leave them out.
        self._order = sorted(range(len(params)), key=lambda i: (not params[i].requires_grad, params[i].numel()))
        self._placeholder: Tensor | None = None  # the zeros that were put there
        self._seen: tuple[Tensor, int] | None = None  # the gradient as autograd last left it, and its version
        self._has_left = False
        self._hook: torch.utils.hooks.RemovableHandle | None = None

    def watch(self, left: Sequence[int]) -> None:
        """Begins, if it does not watch already.

        Args:
            left: for each parameter, whether its gradient has left. If none has, any parameter will do; it may be
                given a gradient by hand nevertheless.
        """
        if self.watches:
            return
        index = next((i for i in self._order if left[i]), self._order[0])
        if index != self.index or self._hook is None:
            self.dismiss()
            self.index = index
            self.hook()
        self.place()
        self._has_left = bool(left[index])

    def hook(self) -> None:
        """Has `look` called before autograd adds to the sentinel's own gradient, which covers every trace. A frozen
        parameter takes no hook: to be called again once it may have been unfrozen."""
        if self._hook is None and self.index >= 0 and self._param.requires_grad:
            look = self._look
            self._hook = self._param.register_hook(lambda _: look())

    @property
    def replaced(self) -> bool:
        """Whether autograd has put a new gradient where another was set to None, and `look` was not called: the
        parameter was frozen when it began to watch."""
        return self._hook is None and self._seen is not None and self._param.grad is not self._seen[0]

    @property
    def _param(self) -> Tensor:
        return self._params[self.index]

    @property
    def watches(self) -> bool:
        """Whether it stands for gradients that have left."""
        return self._seen is not None

    @property
    def zeroed(self) -> bool:
        """Whether it watched, and gradients have been set to None since."""
        return self.watches and self._param.grad is None

    def place(self) -> None:
        """Has the parameter keep the gradient it has, or zeros in the place of one that has left."""
        self._has_left = True
        if self._param.grad is None:
            self._placeholder = torch.zeros_like(self._param, requires_grad=False).as_subclass(_Zeros)
            self._param.grad = self._placeholder
        self.saw()

    def saw(self) -> None:
        """Takes note of what autograd has just made of the gradient."""
        grad = self._param.grad
        assert grad is not None
        self._seen = (grad, version_of(grad))

    def holds_none(self) -> bool:
        """Whether the parameter's gradient is still the zeros that were put there, or None."""
        grad = self._param.grad
        return grad is None or (grad is self._placeholder and version_of(grad) == 0)

    def gone(self) -> bool:
        """Whether the gradients have been set to None since.

        Raises:
            RuntimeError: they have been changed.
        """
        if self._seen is None:
            return False
        grad, version = self._seen
        now = self._param.grad
        if now is not None and now is not grad and not self._has_left:
            self.saw()  # made by hand
        elif now is not None and (now is not grad or version_of(now) != version):
            raise RuntimeError(f"gradients were changed after they had been reduced. {_ADVICE}")
        return now is None

    def remove(self) -> None:
        """Takes its zeros away again."""
        if self._placeholder is not None and self.holds_none():
            self._param.grad = None
        self._placeholder = self._seen = None

    def dismiss(self) -> None:
        """For good: its hook too."""
        self.remove()
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
