"""Callbacks from autograd: a gradient has been accumulated, and a backward has ended.

[Note: Callbacks keep nothing alive]
Parameters keep their hooks alive and a running backward keeps its callbacks alive, and both may outlive the optimizer.
So everything that is registered here refers weakly to the object that it calls, and does nothing once that is deleted.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from .._torch_compat import (
    current_autograd_node,
    disable_dynamo,
    in_compiled_autograd,
    never_compiled,
    post_accumulate_grad_hooks,
    queue_backward_callback,
)


class _Hook:
    """A hook on one parameter, called when autograd has added to ``p.grad``: a hot path of the host.

    On a CPU, hooks run in the thread that calls backward(), which may lie in a function that torch.compile compiles.
    """

    def __init__(self, hooks: GradHooks, arrived: MethodType, index: int) -> None:
        self.hooks = weakref.ref(hooks)
        self._owner, self._arrived = weakref.ref(arrived.__self__), arrived.__func__
        self._index = index

    @never_compiled
    def __call__(self, _: Tensor) -> None:
        owner = self._owner()
        if owner is not None:
            self._arrived(owner, self._index)


class GradHooks:
    """Hooks on those of some parameters that are trainable. A parameter reports to one such object only, the last made.

    See [Note: Callbacks keep nothing alive].

    Args:
        params: the parameters. Torch refuses hooks on frozen ones; see `add`.
        arrived: a bound method, called with a parameter's index when autograd has added to its ``p.grad``.
        lost: a bound method, called when another object takes over one of the parameters.
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
            if (arrived := self._arrived()) is not None:
                self._handles[i] = p.register_post_accumulate_grad_hook(_Hook(self, arrived, i))

    def lacks_some(self) -> bool:
        """Whether a parameter has become trainable since the last `add`."""
        if len(self._handles) == len(self._params):
            return False
        return any(p.requires_grad and i not in self._handles for i, p in enumerate(self._params))

    def has(self, i: int) -> bool:
        """Whether the parameter has a hook."""
        return i in self._handles

    def reporting(self) -> set[int]:
        """The parameters for which a backward that reaches them will call ``arrived``."""
        params = self._params
        return {i for i in self._handles if params[i].requires_grad}

    def remove(self) -> None:
        """Removes all hooks."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()


class BackwardEnd:
    """Calls a method when the running backward ends, and another one if it raises.

    FSDP2 reduces the gradients of some modules, such as the first, in its own callbacks, one for each root module. Some
    of these callbacks may be registered later than this object. With ``after_others`` this object therefore registers
    itself a second time when it is first called, and so runs after all of them.

    A reentrant checkpoint's backward counts as one of its own. Autograd drops its callbacks uncalled when a backward
    raises, so this object is then deleted before it has been called. See [Note: Callbacks keep nothing alive].

    Args:
        ended: a bound method, called within the backward, after all its gradients.
        raised: a bound method.
        after_others: whether gradients arrive in other callbacks too.

    Raises:
        RuntimeError: under compiled autograd, which calls no callbacks.
    """

    def __init__(self, ended: Callable[[], None], raised: Callable[[], None], after_others: bool) -> None:
        self._after_others = after_others
        self._raised: weakref.WeakMethod[Any] | None = None
        if in_compiled_autograd():
            raise RuntimeError(
                "the backward runs under compiled autograd, which does not call the callbacks that ShardedLion with "
                "stage=2 needs: turn compiled autograd off, or use stage=1"
            )
        self._ended: weakref.WeakMethod[Any] = weakref.WeakMethod(ended)
        self._raised = weakref.WeakMethod(raised)
        queue_backward_callback(self)

    @disable_dynamo
    def __call__(self) -> None:
        if self._after_others:
            self._after_others = False
            queue_backward_callback(self)
            return
        method = self._ended()
        if method is not None:
            method()
        self._raised = None  # Only now: the other ranks must learn of an exception in `ended` too.

    def __del__(self) -> None:
        method = self._raised() if self._raised is not None else None
        if method is not None:
            method()


class _Once:
    """A pre-hook of an autograd node that removes itself when it is called."""

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
    """Whether the backward that is ending is that of a reentrant checkpoint: a node of the backward around it is still
    being executed."""
    return current_autograd_node() is not None


def when_outer_pass_goes_on(call: Callable[[], None]) -> None:
    """Arranges for a bound method to be called when the backward around a reentrant checkpoint executes its next node.

    Call this when the checkpoint's own backward ends. A callback for the end of the outer backward can only be queued
    while one of its nodes is executed, hence the detour.
    """
    method: weakref.WeakMethod[Any] = weakref.WeakMethod(call)
    node = current_autograd_node()
    for following, _ in node.next_functions:
        if following is None:
            continue

        once = _Once(method)
        once.handle = following.register_prehook(once)
