"""How to notice that somebody zeroed or scaled gradients which are no longer in ``p.grad``.

Once gradients have left for the shards, ``model.zero_grad()`` finds nothing to zero and torch's
``clip_grad_norm_`` nothing to scale, and neither says so. So one small parameter, the witness, keeps a gradient
of zeros in its place: whoever deals with "all gradients" deals with that one too, and leaves a trace.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_ADVICE = (
    "In stage 2 gradients leave p.grad as they arrive, so torch's clip_grad_norm_, clip_grad_value_, "
    "GradScaler.unscale_, model.zero_grad(set_to_none=False), DistributedDataParallel and the like do not reach them: "
    "use ShardedLion's own clip_grad_norm_() and zero_grad(), and a model that is not wrapped"
)


class Witness:
    """One of the parameters: the smallest that is trainable.

    Args:
        look: called when autograd is about to add to the witness's gradient, to ask `gone` in time.

    Attributes:
        index: its number.
        watches: whether gradients have left and it stands for them.
    """

    def __init__(self, params: Sequence[Tensor], look: Callable[[], None]) -> None:
        self.index = min(range(len(params)), key=lambda i: (not params[i].requires_grad, params[i].numel()))
        self._param = params[self.index]
        self._placeholder: Tensor | None = None  # the zeros that were put there
        self._seen: tuple[Tensor, int] | None = None  # the gradient as autograd last left it, and its version
        # Called before autograd adds to the witness's own gradient, which covers every trace.
        self._hook = self._param.register_hook(lambda _: look()) if self._param.requires_grad else None

    @property
    def watches(self) -> bool:
        return self._seen is not None

    @property
    def zeroed(self) -> bool:
        """Whether it watched, and gradients have been set to None since."""
        return self._seen is not None and self._param.grad is None

    def place(self) -> None:
        """Has the parameter keep the gradient it has, or zeros."""
        if self._param.grad is None:
            self._param.grad = self._placeholder = torch.zeros_like(self._param, requires_grad=False)
        self.saw()

    def saw(self) -> None:
        """Takes note of what autograd has just made of the gradient."""
        grad = self._param.grad
        assert grad is not None
        self._seen = (grad, grad._version)

    def holds_none(self) -> bool:
        """Whether the parameter's gradient is still the zeros that were put there, or None."""
        grad = self._param.grad
        return grad is None or (grad is self._placeholder and grad._version == 0)

    def gone(self) -> bool:
        """Whether the gradients have been set to None since.

        Raises:
            RuntimeError: they have been changed.
        """
        if self._seen is None:
            return False
        grad, version = self._seen
        now = self._param.grad
        if now is not None and (now is not grad or now._version != version):
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
