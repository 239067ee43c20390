"""Batches that are kept between steps, and the check in each step that they are still valid.

Other code may move tensors at any time (`.to()`, `p.data = ...`, a load, FSDP). So each step compares addresses, dtypes
and strides of all tensors with those of the last step, in loops that run in C: about 0.5 us a tensor.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from itertools import repeat
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor

from ..memory_order import is_dense, laid_out_like
from .backends import make_batches
from .backends.batch import Batch, Prepared
from .segments import Segment, StepTensors, check_no_shared_memory

_ADDRESS, _STRIDE, _NUMEL, _DTYPE = Tensor.data_ptr, Tensor.stride, Tensor.numel, attrgetter("dtype")
_NONE = type(None)
_ALIVE = weakref.ref.__call__


def _map(method: Callable[[Tensor], Any], tensors: Sequence[Tensor | None], absent: Iterable[Any] | None) -> list[Any]:
    """Calls a method of every tensor.

    Args:
        method: the method.
        tensors: the tensors.
        absent: the results for tensors that are None; None if no tensor is None.
    """
    if absent is None:
        return list(map(method, tensors))  # type: ignore[arg-type]
    return [a if t is None else method(t) for t, a in zip(tensors, absent, strict=False)]


class _Column:
    """Addresses, dtypes and strides of the tensors of one state column.

    If the tensors are the same objects at the same addresses as in the last step, only the addresses are read again.
    The references to them are weak, so that other code which replaces tensors of the state frees their memory.
    """

    def __init__(self) -> None:
        self._tensors: list[weakref.ref[Tensor]] = []
        self._described: tuple[list[Any], ...] = ([], [], [])

    def describe(self, column: Sequence[Tensor | None]) -> tuple[list[Any], ...]:
        absent: list[bool] = []
        tensors: Sequence[Tensor] = column  # type: ignore[assignment]
        try:
            addresses = list(map(_ADDRESS, tensors))
        except TypeError:  # some entries lack the column
            absent = [t is None for t in column]
            tensors = [t for t in column if t is not None]
            addresses = list(map(_ADDRESS, tensors))
        before = self._tensors
        same = len(before) == len(tensors) and all(map(is_, map(_ALIVE, before), tensors))
        if not same or self._described[0] != addresses:
            self._tensors = list(map(weakref.ref, tensors))
            self._described = addresses, list(map(_DTYPE, tensors)), list(map(_STRIDE, tensors))
        return *self._described, absent


class Preparer:
    """Validates the tensors of each step, and keeps what steps them from one step to the next.

    Args:
        use_triton: as for `LionUpdate`.
    """

    def __init__(self, use_triton: bool | None) -> None:
        self._use_triton = use_triton
        self._key: list[Any] | None = None  # of the batches
        self._batches: list[Batch] = []
        self._columns: dict[str, _Column] = {}
        self._layout: tuple[list[Any], ...] = ()  # strides and numels of parameters and gradients
        self._relaying = False  # whether some of these gradients have another memory order than their parameters
        self._grad_dtypes: list[torch.dtype] = []
        self._grad_addresses: list[int] = []

    def prepare(self, tensors: StepTensors) -> Prepared:
        """See `LionUpdate.prepare`."""
        params, grads = tensors.params, tensors.grads
        strides, numels = list(map(_STRIDE, params)), list(map(_NUMEL, params))
        if len(self._grad_dtypes) != len(grads):
            self._grad_dtypes = [p.dtype for p in params]
        some_absent = _NONE in map(type, grads)
        try:
            # A gradient that is None must not cause a rebuild, so it counts as one like the last.
            grad_dtypes = _map(_DTYPE, grads, self._grad_dtypes if some_absent else None)
            layout = (
                strides,
                numels,
                _map(_STRIDE, grads, strides if some_absent else None),
                _map(_NUMEL, grads, numels if some_absent else None),
            )
            if self._relaying or layout != self._layout:
                laid = [None if g is None else _relaid(i, g, tensors) for i, g in enumerate(grads)]
                self._relaying = any(a is not b for a, b in zip(laid, grads, strict=True))
                self._layout = layout
                grads = laid
            addresses = _map(_ADDRESS, grads, repeat(0) if some_absent else None)
        except RuntimeError:  # a sparse gradient has no strides and no address
            _check_gradients(tensors)
            raise
        key = [
            list(map(_ADDRESS, params)), list(map(_DTYPE, params)), strides, numels, self._describe(tensors),
            grad_dtypes, tensors.groups, tensors.segments,
        ]  # fmt: skip
        if key != self._key:
            self._key = None
            _check_gradients(tensors)
            _check(tensors)
            segments = tensors.segments
            if segments is None:
                segments = [Segment(i, 0, 0, 0, numel) for i, numel in enumerate(numels)]
            self._batches = make_batches(tensors, segments, grad_dtypes, self._use_triton)
            self._grad_dtypes = grad_dtypes
            self._grad_addresses = []
            # The caller may change the list later, and the next step must compare with its present contents.
            key[-2] = list(tensors.groups)
            self._key = key
        if addresses != self._grad_addresses:
            for batch in self._batches:
                batch.set_gradients(grads)
            self._grad_addresses = addresses
        return Prepared(tensors, grads, self._batches, complete=not some_absent)

    def _describe(self, tensors: StepTensors) -> dict[str, tuple[list[Any], ...]]:
        described = {}
        for name, of_entry in tensors.state.items():
            column = self._columns.get(name)
            if column is None:
                column = self._columns[name] = _Column()
            described[name] = column.describe(of_entry)
        return described


def _check_gradients(tensors: StepTensors) -> None:
    for i, g in enumerate(tensors.grads):
        if g is not None:
            tensors.check_gradient(i, g)


def _relaid(entry: int, g: Tensor, tensors: StepTensors) -> Tensor:
    """A gradient in its parameter's memory order: itself, or a copy if it has another one."""
    p = tensors.params[entry]
    tensors.check_gradient(entry, g)
    if not is_dense(p):  # plain torch steps it as a whole, whatever the strides
        return g
    return laid_out_like(g, p) if g.shape == p.shape else g


def _check(tensors: StepTensors) -> None:
    """Raises TypeError or ValueError if parameters and state cannot be stepped together."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for i, p in enumerate(tensors.params):
        by_device.setdefault(p.device, []).append(p)
        if p.numel() and p.data_ptr() == 0:
            raise TypeError(
                f"parameter {tensors.number(i)} ({type(p).__name__}) has no memory of its own (it is a DTensor, a meta "
                "tensor or one whose storage was freed), so it cannot be stepped: materialise it before step()"
            )
        for name, t in tensors.state_of(i).items():
            tensors.check_state(i, name, t)
    for same_device in by_device.values():
        check_no_shared_memory(same_device)
