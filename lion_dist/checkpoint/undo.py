"""Puts things back as they were, where a load has failed after some of them were changed."""

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

_SMALL = 4096  # elements of tensors that are copied
_LEFT_ALONE = (bool, int, float, str, nn.Module, type, ModuleType, FunctionType, MethodType, BuiltinFunctionType)


def remember(undo: ExitStack, *things: Any) -> None:
    """Has ``undo`` put back the attributes of objects, with the lists, dicts and small tensors within them, and the
    attributes of objects within that are called or loaded in their turn, as of schedulers in schedulers. Modules,
    functions, parameters and large tensors are left alone, and of an optimizer all but its groups and which entries its
    state has."""
    seen: set[int] = set()
    for thing in things:
        _remember(undo, thing, seen, outermost=True)


def _remember(undo: ExitStack, value: Any, seen: set[int], outermost: bool = False) -> None:
    if id(value) in seen or value is None or isinstance(value, _LEFT_ALONE):
        return
    seen.add(id(value))
    inner: list[Any] = []
    if isinstance(value, Tensor):
        if not isinstance(value, nn.Parameter) and value.numel() <= _SMALL and type(value) is Tensor:
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


def remember_state(undo: ExitStack, scheduler: Any) -> None:
    """Has ``undo`` load what a scheduler's state_dict() is now, and then put back its attributes as `remember` does:
    what the scheduler keeps in containers and objects of other kinds comes back through its own load_state_dict(),
    the rest, which it may refuse to load, as attributes. Of a state that cannot be copied, only the latter."""
    remember(undo, scheduler)
    with contextlib.suppress(Exception):  # such as LambdaLR's of a class, float, which has the class's __dict__
        undo.callback(_load_again, scheduler.load_state_dict, copy.deepcopy(scheduler.state_dict()))


def remember_module(undo: ExitStack, module: nn.Module) -> None:
    """Has ``undo`` put back a module's extra state, and its attributes as far as they are other objects then."""
    undo.callback(_put_back_dict, module.__dict__, dict(module.__dict__))
    undo.callback(_load_again, module.set_extra_state, copy.deepcopy(module.get_extra_state()))


def _load_again(load: Callable[[Any], object], before: Any) -> None:
    with contextlib.suppress(Exception):  # it may refuse any; what it refused is told
        load(before)


def _put_back_dict(live: dict[Any, Any], before: dict[Any, Any]) -> None:
    live.clear()
    live.update(before)


def _put_back_tensor(live: Tensor, before: Tensor) -> None:
    with torch.no_grad():
        live.copy_(before)


def remember_elements(undo: ExitStack, parts: list[Tensor]) -> None:
    """Has ``undo`` put back the elements of plain tensors, of which it keeps a copy on the CPU."""
    for part in parts:
        undo.callback(_put_back_tensor, part, part.detach().to("cpu", copy=True))
