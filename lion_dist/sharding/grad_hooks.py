"""How autograd tells of a gradient: hooks on parameters, and the end of a backward.

Nothing here keeps its owner alive: parameters and backwards outlive optimizers.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._torch_compat import (
    current_autograd_node,
    disable_dynamo,
    in_compiled_autograd,
    post_accumulate_grad_hooks,
    queue_backward_callback,
)


class _Hook:
    """Of one parameter; called when its gradient has been added into ``p.grad``."""

    def __init__(self, hooks: GradHooks, index: int) -> None:
        self.hooks = weakref.ref(hooks)
        self._index = index

    def __call__(self, _: Tensor) -> None:
        hooks = self.hooks()
        if hooks is not None:
            hooks.arrived(self._index)


class _CPUHook(_Hook):
    """Runs in the thread that calls backward(), where a torch.compile around that call would trace it."""

    __call__ = disable_dynamo(_Hook.__call__)


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
        """Hooks parameters that have become trainable since the last call."""
        if len(self._handles) == len(self._params):
            return
        for i, p in enumerate(self._params):
            if i in self._handles or not p.requires_grad:
                continue
            for hook in post_accumulate_grad_hooks(p):
                other = hook.hooks() if isinstance(hook, _Hook) else None
                lost = other._lost() if other is not None else None
                if lost is not None:
                    lost()
            hook_type = _CPUHook if p.device.type == "cpu" else _Hook
            self._handles[i] = p.register_post_accumulate_grad_hook(hook_type(self, i))

    def lacks_some(self) -> bool:
        """Whether a parameter has become trainable since the last `add`."""
        if len(self._handles) == len(self._params):
            return False
        return any(p.requires_grad and i not in self._handles for i, p in enumerate(self._params))

    def has(self, i: int) -> bool:
        """Whether the parameter has a hook."""
        return i in self._handles

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

    Raises:
        RuntimeError: under compiled autograd.
    """

    def __init__(self, ended: Callable[[], None], raised: Callable[[], None]) -> None:
        self._raised: weakref.WeakMethod[Any] | None = None
        if in_compiled_autograd():
            raise RuntimeError("ShardedLion with stage=2 does not work under compiled autograd; use stage=1")
        self._ended: weakref.WeakMethod[Any] = weakref.WeakMethod(ended)
        self._raised = weakref.WeakMethod(raised)
        queue_backward_callback(self)

    @disable_dynamo
    def __call__(self) -> None:
        method = self._ended()
        if method is not None:
            method()
        self._raised = None  # not before: what that raises, the others must hear of too

    def __del__(self) -> None:
        method = self._raised() if self._raised is not None else None
        if method is not None:
            method()


class _Once:
    """A node's pre-hook that takes itself away."""

    def __init__(self, method: weakref.WeakMethod[Any]) -> None:
        self._method = method
        self.handle: Any = None

    @disable_dynamo
    def __call__(self, _: Any) -> None:
        self.handle.remove()
        method = self._method()
        if method is not None:
            method()


def in_reentrant_pass_end() -> bool:
    """Whether the backward that ends is that of a reentrant checkpoint: a node of the pass around it is running."""
    return current_autograd_node() is not None


def when_outer_pass_goes_on(call: Callable[[], None]) -> None:
    """At the end of a reentrant checkpoint's pass: has a bound method called when the pass around it takes its next
    node after the checkpoint. (Only there can one tell autograd anything about that pass.)"""
    method: weakref.WeakMethod[Any] = weakref.WeakMethod(call)
    node = current_autograd_node()
    for following, _ in node.next_functions:
        if following is None:
            continue

        once = _Once(method)
        once.handle = following.register_prehook(once)
