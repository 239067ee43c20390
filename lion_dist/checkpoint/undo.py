"""Puts things back as they were when a load fails after some of them were changed."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from contextlib import ExitStack
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

_MAX_COPIED = 4096  # elements of a tensor that is copied
_NOT_FOLLOWED = (bool, int, float, str, nn.Module, type, ModuleType, FunctionType, MethodType, BuiltinFunctionType)


def remember(undo: ExitStack, value: Any) -> None:
    """Makes ``undo`` put back the attributes of an object, with the lists, dicts and small tensors within them.

    It follows attributes that are callable or have load_state_dict, as schedulers within schedulers. It does not follow
    modules, functions, parameters and large tensors, and of an optimizer it puts back only the groups and which entries
    the state has.
    """
    _remember(undo, value, set(), outermost=True)


def _remember(undo: ExitStack, value: Any, seen: set[int], outermost: bool = False) -> None:
    if id(value) in seen or value is None or isinstance(value, _NOT_FOLLOWED):
        return
    seen.add(id(value))
    inner: list[Any] = []
    if isinstance(value, Tensor):
        if not isinstance(value, nn.Parameter) and value.numel() <= _MAX_COPIED and type(value) is Tensor:
            undo.callback(_put_back_tensor, value, value.detach().clone())
        return
    if isinstance(value, list):
        undo.callback(value.__setitem__, slice(None), list(value))
        inner = value
    elif isinstance(value, dict):
        undo.callback(_put_back_dict, value, dict(value))
        inner = list(value.values())
    elif isinstance(value, tuple):
        inner = list(value)
    elif isinstance(value, Optimizer):
        undo.callback(_put_back_dict, value.__dict__, dict(value.__dict__))
        undo.callback(_put_back_dict, value.state, dict(value.state))
        inner = [value.param_groups]
    elif hasattr(value, "__dict__") and (outermost or callable(value) or hasattr(value, "load_state_dict")):
        inner = [value.__dict__]
    for one in inner:
        _remember(undo, one, seen)


def remember_scheduler(undo: ExitStack, scheduler: Any) -> None:
    """Makes ``undo`` load the scheduler's present state_dict(), and then put back its attributes as `remember` does.

    The first brings back what the scheduler keeps in containers and objects of other types, the second what it may
    refuse to load. If the state cannot be copied, only the attributes are put back.
    """
    remember(undo, scheduler)
    with contextlib.suppress(Exception):  # such as LambdaLR with the class float, whose __dict__ is in the state
        undo.callback(_load_again, scheduler.load_state_dict, copy.deepcopy(scheduler.state_dict()))


def remember_module(undo: ExitStack, module: nn.Module) -> None:
    """Makes ``undo`` put back a module's extra state, and those of its attributes that were replaced."""
    undo.callback(_put_back_dict, module.__dict__, dict(module.__dict__))
    undo.callback(_load_again, module.set_extra_state, copy.deepcopy(module.get_extra_state()))


def remember_elements(undo: ExitStack, parts: list[Tensor]) -> None:
    """Makes ``undo`` put back the elements of plain tensors, from copies on the CPU."""
    for part in parts:
        undo.callback(_put_back_tensor, part, part.detach().to("cpu", copy=True))


def _load_again(load: Callable[[Any], object], before: Any) -> None:
    with contextlib.suppress(Exception):  # the error that is being raised says more
        load(before)


def _put_back_dict(live: dict[Any, Any], before: dict[Any, Any]) -> None:
    # By dict's own methods: ShardedLion's state refuses to lose entries, which are all in ``before``.
    dict.clear(live)
    dict.update(live, before)


def _put_back_tensor(live: Tensor, before: Tensor) -> None:
    with torch.no_grad():
        live.copy_(before)
