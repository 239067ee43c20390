"""How autograd tells of a gradient: hooks on parameters, and the end of a backward.

Nothing here keeps its owner alive: parameters and backwards outlive optimizers.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class _Hook:
    """Of one parameter; called when its gradient has been added into ``p.grad``."""

    def __init__(self, hooks: GradHooks, index: int) -> None:
        self.hooks = weakref.ref(hooks)
        self._index = index

    def __call__(self, _: Tensor) -> None:
        if torch.compiler.is_compiling():
            raise RuntimeError("ShardedLion with stage=2 does not work under compiled autograd; use stage=1")
        hooks = self.hooks()
        if hooks is not None:
            hooks.arrived(self._index)


class GradHooks:
    """Hooks on the trainable ones of some parameters. A parameter reports to one such object, the last made.

    Args:
        params: the parameters; frozen ones take no hook (see `add`).
        arrived: a bound method, called with the parameter's number.
        lost: a bound method, called when another object has taken over one of the parameters.
    """

    def __init__(self, params: Sequence[Tensor], arrived: Callable[[int], None], lost: Callable[[], None]) -> None:
        self._params = params
        self._arrived: weakref.WeakMethod[Any] = weakref.WeakMethod(arrived)
        self._lost: weakref.WeakMethod[Any] = weakref.WeakMethod(lost)
        self._handles: dict[int, torch.utils.hooks.RemovableHandle] = {}
        self.add()

    def add(self) -> None:
        """Hooks those that have become trainable since."""
        for i, p in enumerate(self._params):
            if i in self._handles or not p.requires_grad:
                continue
            for hook in list((getattr(p, "_post_accumulate_grad_hooks", None) or {}).values()):
                other = hook.hooks() if isinstance(hook, _Hook) else None
                lost = other._lost() if other is not None else None
                if lost is not None:
                    lost()
            self._handles[i] = p.register_post_accumulate_grad_hook(_Hook(self, i))

    def reports(self, i: int) -> bool:
        """Whether a backward that reaches the parameter calls ``arrived``."""
        return i in self._handles and self._params[i].requires_grad

    def arrived(self, i: int) -> None:
        method = self._arrived()
        if method is not None:
            method(i)

    def remove(self) -> None:
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()


class BackwardEnd:
    """Has autograd tell how the current backward ends.

    Args:
        ended: a bound method; it runs in the backward's last moments, of a reentrant checkpoint's too.
        raised: a bound method, called if the backward raises: autograd then drops its callbacks uncalled.
    """

    def __init__(self, ended: Callable[[], None], raised: Callable[[], None]) -> None:
        self._ended: weakref.WeakMethod[Any] = weakref.WeakMethod(ended)
        self._raised: weakref.WeakMethod[Any] | None = weakref.WeakMethod(raised)
        torch.autograd.Variable._execution_engine.queue_callback(self)

    def __call__(self) -> None:
        self._raised = None
        method = self._ended()
        if method is not None:
            method()

    def __del__(self) -> None:
        method = self._raised() if self._raised is not None else None
        if method is not None:
            method()
