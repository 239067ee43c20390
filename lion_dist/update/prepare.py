"""Batches that are kept between steps, and the check in each step that they are still valid.

Other code may move tensors at any time (`.to()`, `p.data = ...`, a load, FSDP). So each step compares addresses,
dtypes, shapes and strides of all tensors with those of the last step.

[Note: Usual step] In most steps nothing is new but the addresses of gradients. Such a step is recognised by one call
that compares dtypes, devices, shapes and strides, and a loop in C over addresses. A flat buffer, which is the state or
the gradient of every entry, is compared once. Any other step is examined, which takes twice as long. Batches are made
anew only where that finds a difference. No tensor is kept for the comparison, so that memory which other code gives
back is free.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from operator import attrgetter, is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._torch_compat import tensors_alike
from ..memory_order import is_dense, laid_out_like
from ..upload import is_capturing
from .backends import make_batches
from .backends.batch import Batch, Prepared
from .segments import Segment, StepTensors, check_no_shared_memory

_ADDRESS, _STRIDE, _NUMEL, _DTYPE = Tensor.data_ptr, Tensor.stride, Tensor.numel, attrgetter("dtype")
_NONE = type(None)


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


class _Key(NamedTuple):
    """What batches are made for: they are valid as long as nothing of it changes. Lists have one entry for each
    parameter.

    Attributes:
        addresses, dtypes, strides, numels: of the parameters.
        state: addresses, dtypes and strides of each state column, by its name; None where an entry lacks it.
        grad_dtypes: dtypes of the gradients; of absent ones the last that was seen.
        groups, segments: as of `StepTensors`.
    """

    addresses: list[int]
    dtypes: list[torch.dtype]
    strides: list[tuple[int, ...]]
    numels: list[int]
    state: dict[str, tuple[list[Any], ...]]
    grad_dtypes: list[torch.dtype]
    groups: list[int]
    segments: Sequence[Segment] | None


@dataclass(frozen=True)
class _Usual:
    """What a usual step has in common with the one before; see [Note: Usual step].

    Attributes:
        alike: whether parameters, tensors of the state and gradients, in this order, are like those of that step.
        counts: how many tensors are compared: of the parameters and each state column, of these together without
            those that are lacking, and of the gradients.
        addresses: of parameters and state.
        absent: for each entry whether it has no gradient; empty if every entry has one.
        lacking: whether some entries lack a state column that others have.
    """

    alike: Callable[..., bool]
    counts: list[int]
    addresses: list[int]
    absent: list[bool]
    lacking: bool


class Preparer:
    """Validates the tensors of each step, and keeps what steps them from one step to the next.

    Args:
        use_triton: as for `LionUpdate`.
    """

    def __init__(self, use_triton: bool | None) -> None:
        self._use_triton = use_triton
        self._key: _Key | None = None  # of the batches
        self._usual: _Usual | None = None
        self._batches: list[Batch] = []
        self._layout: tuple[list[Any], ...] = ()  # strides and numels of parameters and gradients
        self._relaying = False  # whether some of these gradients have another memory order than their parameters
        self.absent: list[bool] = []  # as of `_Usual`, of the last step
        self._captured: list[Sequence[Batch]] = []  # [Note: Captured memory] (capture.py)
        self._grad_dtypes: list[torch.dtype] = []
        self._grad_addresses: list[int] = []

    def prepare(self, tensors: StepTensors) -> Prepared:
        """See `LionUpdate.prepare`."""
        grads = tensors.grads
        if not self._is_usual(tensors):
            grads = self._examine(tensors)
        addresses = _map(_ADDRESS, grads, repeat(0) if self.absent else None)
        if addresses != self._grad_addresses:
            for i, g in enumerate(tensors.grads if 0 in addresses else ()):
                if g is not None and not addresses[i]:
                    tensors.check_gradient(i, g)
            self._grad_addresses = []  # some batches have others if one of them raises
            for batch in self._batches:
                batch.set_gradients(addresses)
            self._grad_addresses = addresses
        if is_capturing():
            self._captured.append(self._batches)
            self._grad_addresses = []  # the next step must not read what belongs to the graph
        return Prepared(tensors, grads, self._batches, complete=not self.absent)

    def _is_usual(self, tensors: StepTensors) -> bool:
        """Whether nothing but the addresses of gradients can differ from the last step."""
        key, usual = self._key, self._usual
        if key is None or usual is None or tensors.state.keys() != key.state.keys():
            return False
        if usual.absent and [g is None for g in tensors.grads] != usual.absent:
            return False
        kept, grads, counts = _compared(tensors, usual.lacking, bool(usual.absent))
        return (
            counts == usual.counts
            and usual.alike(*kept, *grads)
            and list(map(_ADDRESS, kept)) == usual.addresses
            and tensors.groups == key.groups
            and tensors.segments == key.segments
        )

    def _examine(self, tensors: StepTensors) -> list[Tensor | None]:
        """Compares everything with what the batches were made for, and makes them anew where something differs.

        Returns:
            The gradients, in the memory order of their parameters.
        """
        self._usual = None
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
        except RuntimeError:  # a sparse gradient has no strides
            _check_gradients(tensors)
            raise
        if self._relaying or layout != self._layout:
            laid = [None if g is None else _relaid(i, g, tensors) for i, g in enumerate(grads)]
            self._relaying = any(a is not b for a, b in zip(laid, grads, strict=True))
            self._layout = layout
            grads = laid
        # The caller may change the list of groups later, and the next step must compare with its present contents.
        key = _Key(
            list(map(_ADDRESS, params)), list(map(_DTYPE, params)), strides, numels, _describe(tensors), grad_dtypes,
            list(tensors.groups), tensors.segments,
        )  # fmt: skip
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
            self._key = key
        absent = [g is None for g in grads] if some_absent else []
        # While gradients come and go, or are copied into another memory order, no step is usual.
        if absent == self.absent and not self._relaying:
            self._usual = _usual(tensors, absent)
        self.absent = absent
        return grads


def _usual(tensors: StepTensors, absent: list[bool]) -> _Usual:
    lacking = any(_NONE in map(type, column) for column in tensors.state.values())
    kept, grads, counts = _compared(tensors, lacking, bool(absent))
    return _Usual(tensors_alike([*kept, *grads]), counts, list(map(_ADDRESS, kept)), absent, lacking)


def _compared(tensors: StepTensors, lacking: bool, some_absent: bool) -> tuple[list[Any], Sequence[Any], list[int]]:
    """Parameters and state, gradients, and `_Usual.counts`; without a None where one is expected."""
    columns = [tensors.params, *map(_once, tensors.state.values())]
    kept, grads = list(chain.from_iterable(columns)), _once(tensors.grads)
    if lacking:
        kept = [t for t in kept if t is not None]
    if some_absent:
        grads = [g for g in grads if g is not None]
    return kept, grads, [*map(len, columns), len(kept), len(grads)]


def _once(column: Sequence[Any]) -> Sequence[Any]:
    """A column without its repetitions, if all entries are one object."""
    return column[:1] if column and all(map(is_, column, repeat(column[0]))) else column


def _describe(tensors: StepTensors) -> dict[str, tuple[list[Any], ...]]:
    described = {}
    for name, column in tensors.state.items():
        absent = repeat(None) if _NONE in map(type, column) else None
        described[name] = tuple(_map(method, column, absent) for method in (_ADDRESS, _DTYPE, _STRIDE))
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
