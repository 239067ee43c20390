"""Notices that the user has zeroed or scaled gradients that are no longer in ``p.grad``.

[Note: Sentinel]
Once gradients have left for the shards, ``model.zero_grad()`` finds nothing to zero and torch's ``clip_grad_norm_``
nothing to scale, and neither says so. So one small parameter, the sentinel, keeps a placeholder of zeros in its
``p.grad``. Code that walks over all gradients reaches the placeholder too and leaves a trace: ``p.grad`` is None, or
another tensor, or the same one with another version.

- The sentinel is a parameter whose gradient has left, if there is one. All others keep ``p.grad is None``, so that the
  user can still set those gradients by hand.
- Autograd adds to the placeholder as to any gradient. A tensor hook on the sentinel runs just before that, and asks for
  traces, which would look like autograd's own work afterwards. `ParamGrads` records what autograd has left.
- A frozen parameter takes no such hook, and FSDP2, which adds to the gradients of its parameters itself, calls none. A
  zeroing before the next addition then shows as another tensor in ``p.grad`` than the recorded one (see
  `Sentinel.replaced`), and other changes as more than FSDP2's one (see `Sentinel.arrived`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from ..dtensors import is_dtensor
from .param_grads import GradState, ParamGrads
from .placeholder import ADVICE

_CHANGED = f"p.grad of a parameter was changed after gradients had been reduced. {ADVICE}"


class Sentinel:
    """One of the parameters, which stands for the gradients that have left.

    Args:
        grads: the gradients of the parameters.
        look: called just before autograd adds to the sentinel's ``p.grad``; it calls `noticed_zeroing`.

    Attributes:
        index: index of the parameter; -1 before the first `watch`.
    """

    def __init__(self, grads: ParamGrads, look: Callable[[], None]) -> None:
        self.index = -1
        self._grads = grads
        self._look = look
        # The smallest first, frozen parameters last: autograd never adds to those, and zeroing may leave them out.
        params = grads.params
        self._order = sorted(range(len(params)), key=lambda i: (not params[i].requires_grad, params[i].numel()))
        self._hook: torch.utils.hooks.RemovableHandle | None = None
        self._looked = False  # whether `look` has been called since the last `arrived`

    def watch(self) -> None:
        """Begins to watch, unless it does so already or there are no parameters. See [Note: Sentinel]."""
        if self.watches or not self._order:
            return
        states = self._grads.states
        index = next((i for i in self._order if states[i] is not GradState.LOCAL), self._order[0])
        if index != self.index or self._hook is None:
            self.dismiss()
            self.index = index
            self.hook()
        self._grads.keep_filled(index)

    def hook(self) -> None:
        """Hooks the sentinel, if it is trainable and has no hook. Call it again when it may have been unfrozen."""
        if self._hook is None and self.index >= 0 and self._grads.params[self.index].requires_grad:
            self_ref = weakref.ref(self)

            def called(_: Tensor) -> None:
                sentinel = self_ref()
                if sentinel is not None:
                    sentinel._looked = True
                    sentinel._look()

            self._hook = self._grads.params[self.index].register_hook(called)

    @property
    def watches(self) -> bool:
        """Whether the sentinel stands for gradients that have left."""
        return self._grads.stand_in >= 0

    @property
    def replaced(self) -> bool:
        """Whether a new gradient has been put where the previous one was set to None, and `look` was not called. Ask
        when the sentinel's gradient has arrived, and then call `arrived`."""
        return not self._looked and self.watches and not self._grads.is_recorded_tensor(self.index)

    def arrived(self) -> None:
        """Takes note that the sentinel's gradient has arrived.

        Raises:
            RuntimeError: `look` was not called, and more has changed the gradient than FSDP2's one addition.
        """
        looked, self._looked = self._looked, False
        unseen = not looked and self.watches and is_dtensor(self._grads.params[self.index])
        if unseen and self._grads.changes(self.index) > 1:
            raise RuntimeError(_CHANGED)

    @property
    def zeroed(self) -> bool:
        """Whether gradients have been set to None since `watch`; unlike `noticed_zeroing` this never raises."""
        return self.watches and self._grads.peek(self.index) is None

    def noticed_zeroing(self) -> bool:
        """Whether gradients have been set to None since `watch`.

        Raises:
            RuntimeError: gradients have been changed in another way.
        """
        if not self.watches:
            return False
        grads, i = self._grads, self.index
        if grads.peek(i) is None:
            return True
        if grads.is_as_recorded(i):
            return False
        if grads.states[i] is GradState.LOCAL and not grads.is_recorded_tensor(i):
            grads.accept(i)  # The user made it: no gradient had left, so any parameter became the sentinel.
            return False
        raise RuntimeError(_CHANGED)

    def remove(self) -> None:
        """Stops watching, and removes the placeholder."""
        self._grads.stop_filling()

    def dismiss(self) -> None:
        """Stops watching for good: removes the hook too."""
        self.remove()
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
