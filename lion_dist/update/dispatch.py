"""Chooses how the rule runs: fused Triton on a GPU, torch.compile for large CPU tensors, else plain
torch. The only place that tries to import triton.

A `LionUpdate` keeps what can be kept between steps (segment tables, flat views) and finds out at each
step whether it still holds: tensors move under an optimizer's feet (`.to()`, `p.data = ...`, a load,
FSDP), so addresses, dtypes, shapes and strides are compared every time, about 0.5 us a tensor.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import repeat
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor

from .._torch_compat import recompile_limit
from ..memory_order import flat, is_dense, laid_out_like, same_layout
from ..upload import upload
from . import reference
from .reference import HYPER_COLUMNS, LR, HyperParameters
from .segments import (
    Segment,
    SegmentTable,
    StepTensors,
    check_no_shared_memory,
)
from .state import EXP_AVG

try:
    from . import triton_norm, triton_step
    from . import triton_signs as triton_signs
except ImportError:  # no triton: macOS, Windows, some CPU installations
    HAS_TRITON = False
else:
    HAS_TRITON = True

# The rule makes a dozen passes over memory in plain torch; in chunks they stay in the cache.
CHUNK = 32768
# torch.compile takes seconds once a process and dtype mix, and saves 20 ms a step for this many elements.
COMPILE_FROM = 1 << 20
# There are 27 mixes of dtypes, each a graph; torch's own limit is 8.
RECOMPILE_LIMIT = 64


def interpreting() -> bool:
    """Whether Triton runs its kernels in its interpreter, on CPU tensors (TRITON_INTERPRET=1)."""
    if not HAS_TRITON:
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


_compiled: Callable[..., None] | None = None
_not_compiled: set[tuple[torch.dtype, ...]] = set()  # mixes of dtypes that torch.compile failed on


def _packed_step_(p: Tensor, g: Tensor, m: Tensor, packed: Tensor) -> None:
    # One tensor of scalars, not seven: fewer guards to check at a call, fewer addresses to keep in registers.
    reference.lion_step_(p, g, m, reference.Scalars(*packed.unbind()))


def _compiled_step_(p: Tensor, g: Tensor, m: Tensor, s: reference.Scalars) -> None:
    """`reference.lion_step_` through torch.compile, on 1-D CPU tensors: one graph for all lengths.
    Where it cannot be compiled (no C++ compiler), a warning says so once, and plain torch does the work."""
    global _compiled
    if _compiled is None:
        _compiled = torch.compile(_packed_step_, dynamic=True, fullgraph=True)
    mix = (p.dtype, g.dtype, m.dtype)
    if mix not in _not_compiled:
        try:
            with recompile_limit(RECOMPILE_LIMIT):
                _compiled(p, g, m, torch.stack(s))
            return
        except Exception as error:  # compilation precedes every write, so nothing has been changed
            if not _not_compiled:
                reason = (str(error).strip().splitlines() or [""])[0]
                warnings.warn(
                    "lion_dist: torch.compile failed, so steps on the CPU run as plain torch, several times slower. "
                    f"Usually a C++ compiler such as g++ is missing. {type(error).__name__}: {reason}",
                    stacklevel=2,
                )
            _not_compiled.add(mix)
    _chunked_step_(p, g, m, s)


def _chunked_step_(p: Tensor, g: Tensor, m: Tensor, s: reference.Scalars) -> None:
    for chunk in zip(p.split(CHUNK), g.split(CHUNK), m.split(CHUNK), strict=True):
        reference.lion_step_(*chunk, s)


def hyper_table(hypers: Sequence[HyperParameters], device: torch.device) -> Tensor:
    """float64, shape (groups, HYPER_COLUMNS), on ``device``; an lr tensor is copied there without a
    host synchronisation if it is on a GPU."""
    rows = [
        (
            0.0 if isinstance(h.lr, Tensor) and h.lr.is_cuda else float(h.lr),
            h.weight_decay,
            h.beta1,
            h.beta2,
            -1.0 if h.maximize else 1.0,
        )
        for h in hypers
    ]
    assert all(len(row) == HYPER_COLUMNS for row in rows)
    table = upload(rows, torch.float64, device)
    for i, h in enumerate(hypers):
        if isinstance(h.lr, Tensor) and h.lr.is_cuda:
            table[i, LR].copy_(h.lr.reshape(()), non_blocking=device.type == "cuda")
    return table


@dataclass
class _Plain:
    """Segments stepped one after another by torch: 1-D views of dense tensors, or any strides whole."""

    segments: list[Segment]
    params: list[Tensor]
    exp_avgs: list[Tensor]
    one_dimensional: bool


# Through C loops: they run over every tensor of every step.
_ADDRESS, _STRIDE, _NUMEL, _DTYPE = Tensor.data_ptr, Tensor.stride, Tensor.numel, attrgetter("dtype")
_NONE = type(None)


def _of_each(method: Callable[[Tensor], Any], tensors: Sequence[Tensor | None], absent: Iterable[Any]) -> list[Any]:
    """The method of every tensor; where there is none, what ``absent`` has in its place."""
    if _NONE in map(type, tensors):
        return [a if t is None else method(t) for t, a in zip(tensors, absent, strict=False)]
    return list(map(method, tensors))  # type: ignore[arg-type]


def check_use_triton(use_triton: bool | None) -> None:
    """Raises TypeError or ValueError for an argument ``use_triton`` that cannot be satisfied."""
    if use_triton is not None and not isinstance(use_triton, bool):
        raise TypeError(f"use_triton must be None, True or False, got {type(use_triton).__name__} {use_triton!r}")
    if use_triton and not HAS_TRITON:
        raise ValueError("use_triton=True, but triton cannot be imported: pip install triton, or use_triton=None")


class LionUpdate:
    """Applies the rule to the columns of one step.

    Args:
        use_triton: None: wherever it can (CUDA tensors). True: everywhere, an error where it cannot.
            False: nowhere.

    Attributes:
        fused: (Mix, SegmentTable): what takes a launch each.
        plain: what plain torch steps.
        grads: of the prepared columns, each laid out as its parameter.
    """

    def __init__(self, use_triton: bool | None) -> None:
        check_use_triton(use_triton)
        self.use_triton = use_triton
        self._prepared: StepTensors | None = None
        self._key: list[Any] | None = None
        self._exp_avgs: list[Tensor] = []
        self._described: tuple[list[Any], ...] = ([], [], [])
        self._layout: tuple[list[Any], ...] = ()  # strides and numels of parameters and gradients
        self._relaying = False  # whether some of these gradients lie otherwise than their parameters
        self._grad_dtypes: list[torch.dtype] = []
        self.fused: list[tuple[Any, SegmentTable]] = []
        self.plain: list[_Plain] = []
        self.grads: list[Tensor | None] = []
        self._grad_addresses: list[int] = []
        self._hypers: dict[torch.device, tuple[list[HyperParameters], Tensor]] = {}
        self._scalars: dict[tuple[torch.device, int], tuple[Tensor, reference.Scalars]] = {}  # with their table

    def prepare(self, columns: StepTensors) -> None:
        """Validates the columns and brings tables and views up to date. Changes no parameter and no
        momentum; what it raises, it raises before anything else happens.

        Raises:
            TypeError: a sparse gradient, or a dtype that is not a storage dtype.
            ValueError: shapes or devices that do not match, parameters that share memory,
                use_triton=True on tensors that Triton cannot reach.
        """
        params, grads, exp_avgs = columns.params, columns.grads, columns.state[EXP_AVG]
        strides, numels = list(map(_STRIDE, params)), list(map(_NUMEL, params))
        if len(self._grad_dtypes) != len(grads):
            self._grad_dtypes = [p.dtype for p in params]
        try:
            # An absent gradient is no reason to rebuild: it is taken for one like the last.
            grad_dtypes = _of_each(_DTYPE, grads, self._grad_dtypes)
            layout = (strides, numels, _of_each(_STRIDE, grads, strides), _of_each(_NUMEL, grads, numels))
            if self._relaying or layout != self._layout:
                laid = [None if g is None else self._relaid(i, g, columns) for i, g in enumerate(grads)]
                self._relaying = any(a is not b for a, b in zip(laid, grads, strict=True))
                self._layout = layout
                grads = laid
            addresses = _of_each(_ADDRESS, grads, repeat(0))
        except RuntimeError:  # a sparse gradient has no strides and no address
            self._check_gradients(columns)
            raise
        key = [
            list(map(_ADDRESS, params)), list(map(_DTYPE, params)), strides, numels, self._describe(exp_avgs),
            grad_dtypes, columns.groups, columns.segments,
        ]  # fmt: skip
        if key != self._key:
            self._key = None
            self._check_gradients(columns)
            self._grad_dtypes = grad_dtypes
            self._build(columns)
            # Lists the caller may go on to change must be compared by what they hold now.
            key[-2] = list(columns.groups)
            self._key = key
            self._grad_addresses = []
        if addresses != self._grad_addresses:
            for _, table in self.fused:
                table.set_gradients(grads)
            self._grad_addresses = addresses
        self.grads = grads
        self._prepared = columns

    def _describe(self, exp_avgs: list[Tensor]) -> tuple[list[Any], ...]:
        """Addresses, dtypes and strides; of the tensors of the last time, where they lie as they did, no more than
        that is asked."""
        addresses = list(map(_ADDRESS, exp_avgs))
        before = self._exp_avgs
        if len(before) != len(exp_avgs) or not all(map(is_, before, exp_avgs)) or self._described[0] != addresses:
            self._exp_avgs = list(exp_avgs)
            self._described = addresses, list(map(_DTYPE, exp_avgs)), list(map(_STRIDE, exp_avgs))
        return self._described

    def prepare_once(self, columns: StepTensors) -> None:
        """`prepare`, unless these very columns have just been prepared."""
        if self._prepared is not columns:
            self.prepare(columns)

    @staticmethod
    def _check_gradients(columns: StepTensors) -> None:
        for i, g in enumerate(columns.grads):
            if g is not None:
                columns.check_gradient(i, g)

    @staticmethod
    def _relaid(index: int, g: Tensor, columns: StepTensors) -> Tensor:
        """A gradient in its parameter's memory order: itself, or a copy if it lies otherwise."""
        p = columns.params[index]
        columns.check_gradient(index, g)
        if not is_dense(p):  # stepped whole by torch, whatever the strides
            return g
        return laid_out_like(g, p) if g.shape == p.shape else g

    def _build(self, columns: StepTensors) -> None:
        params, exp_avgs = columns.params, columns.state[EXP_AVG]
        by_device: dict[torch.device, list[Tensor]] = {}
        for i, (p, m) in enumerate(zip(params, exp_avgs, strict=True)):
            by_device.setdefault(p.device, []).append(p)
            if p.numel() and p.data_ptr() == 0:
                raise TypeError(
                    f"parameter {i} ({type(p).__name__}) has no memory of its own (a DTensor, a meta tensor or one "
                    "whose storage was freed), so it cannot be stepped"
                )
            if m.device != p.device:
                raise ValueError(
                    f"parameter {i} is on {p.device} and its momentum on {m.device}: move the model before making "
                    "the optimizer, or load the optimizer's state_dict again after moving it"
                )
            if columns.segments is None and m.shape != p.shape:
                raise ValueError(
                    f"parameter {i} has shape {tuple(p.shape)} and its momentum {tuple(m.shape)}: the parameter was "
                    "replaced by another; make a new optimizer"
                )
        for same_device in by_device.values():
            check_no_shared_memory(same_device)
        segments = columns.segments
        if segments is None:
            segments = [Segment(i, 0, 0, 0, p.numel()) for i, p in enumerate(params)]
        fused: dict[tuple[torch.device, Any], list[Segment]] = {}
        views = _Plain([], [], [], one_dimensional=True)
        whole = _Plain([], [], [], one_dimensional=False)
        for s in segments:
            p, m = params[s.entry], exp_avgs[s.entry]
            if s.length == 0:
                continue
            if columns.segments is None and not (is_dense(p) and same_layout(p, m)):
                whole.segments.append(s)
                whole.params.append(p.detach())
                whole.exp_avgs.append(m)
            elif self.takes_triton(p.device):
                mix = triton_step.Mix(p.dtype, self._grad_dtypes[s.entry], m.dtype)
                fused.setdefault((p.device, mix), []).append(s)
            else:
                views.segments.append(s)
                views.params.append(flat(p, s.param_start, s.length))
                views.exp_avgs.append(flat(m, s.state_start, s.length))
        self.plain = [plain for plain in (views, whole) if plain.segments]
        self.fused = [(mix, SegmentTable(columns, of_mix, device)) for (device, mix), of_mix in fused.items()]

    def takes_triton(self, device: torch.device) -> bool:
        reachable = HAS_TRITON and (device.type == "cuda" or (device.type == "cpu" and interpreting()))
        if self.use_triton and not reachable:
            raise ValueError(f"use_triton=True needs parameters on a GPU, got {device}; use_triton=None falls back")
        # The interpreter is for tests: it is taken where asked for, never because a variable is set.
        return self.use_triton is True or (self.use_triton is None and reachable and device.type == "cuda")

    def hyper_table(self, hypers: list[HyperParameters], device: torch.device) -> Tensor:
        kept = self._hypers.get(device)
        constant = not any(isinstance(h.lr, Tensor) for h in hypers)  # a tensor is filled in place
        if constant and kept is not None and kept[0] == hypers:
            return kept[1]
        table = hyper_table(hypers, device)
        if constant:
            self._hypers[device] = (list(hypers), table)
        else:
            self._hypers.pop(device, None)
        return table

    def _scalars_of(
        self, hypers: list[HyperParameters], device: torch.device, group: int, grad_scale: Tensor | None
    ) -> reference.Scalars:
        table = self.hyper_table(hypers, device)
        if grad_scale is not None:
            return reference.scalars(table[group], grad_scale.to(device))
        kept = self._scalars.get((device, group))
        if kept is None or kept[0] is not table:  # one that has been kept has not been written to
            kept = self._scalars[device, group] = table, reference.scalars(table[group])
        return kept[1]

    def step(self, columns: StepTensors, hypers: list[HyperParameters], grad_scale: Tensor | None = None) -> None:
        """Steps every parameter that has a gradient: one launch a device and mix of dtypes on GPUs.
        To be called without gradients enabled (torch.no_grad).

        Args:
            columns: see `prepare`, which this calls if need be.
            hypers: one a parameter group, indexed by ``columns.groups``.
            grad_scale: float32, shape (), multiplied into every gradient; None is 1.
        """
        self.prepare_once(columns)
        for mix, table in self.fused:
            scale = None if grad_scale is None else grad_scale.to(table.device, non_blocking=True)
            triton_step.lion_step(table, mix, self.hyper_table(hypers, table.device), scale, columns.active)
        self.silence_plain(columns)
        for plain in self.plain:
            self._plain_step(plain, columns.groups, hypers, grad_scale)
        # Autograd does not see writes by address, and a graph that saved a weight must not use it changed.
        params = columns.params
        if 0 in self._grad_addresses:
            params = [p for p, g in zip(params, self.grads, strict=True) if g is not None]
        torch.autograd.graph.increment_version(params)
        self.forget_gradients()

    def forget_gradients(self) -> None:
        """After their use: gradients die when their owner drops them."""
        self.grads = []
        self._prepared = None

    def forget_momenta(self) -> None:
        """Between steps, where others may put new ones into the state and count on the old ones' memory."""
        self._exp_avgs = []

    def silence_plain(self, columns: StepTensors) -> None:
        """Leaves out the gradients of inactive entries, for plain torch: kernels read ``columns.active`` themselves.
        The host waits for the flags if they are on a GPU, so nothing is read where every segment is fused."""
        if self.plain and columns.active is not None:
            flags = columns.active.tolist()
            self.grads = [g if flag else None for g, flag in zip(self.grads, flags, strict=False)]

    def _plain_step(
        self, plain: _Plain, groups: list[int], hypers: list[HyperParameters], grad_scale: Tensor | None
    ) -> None:
        by_group: dict[tuple[torch.device, int], reference.Scalars] = {}
        for s, p, m in zip(plain.segments, plain.params, plain.exp_avgs, strict=True):
            g, at = self.grads[s.entry], (p.device, groups[s.entry])
            if g is None:
                continue
            if at not in by_group:
                by_group[at] = self._scalars_of(hypers, *at, grad_scale)
            if plain.one_dimensional:
                g = flat(g, s.grad_start, s.length)
            if p.device.type != "cpu" or not plain.one_dimensional:
                reference.lion_step_(p, g, m, by_group[at])
            elif s.length >= COMPILE_FROM:
                _compiled_step_(p, g, m, by_group[at])
            else:
                _chunked_step_(p, g, m, by_group[at])

    @torch.no_grad()
    def sum_of_squares(self, columns: StepTensors) -> Tensor | None:
        """The sum of squares of the gradients' segments: float64, shape (), or None where there are
        no segments. StepTensors must be on one device."""
        self.prepare(columns)
        sums = [triton_norm.sum_of_squares(table, mix.grad, columns.active) for mix, table in self.fused]
        self.silence_plain(columns)
        for plain in self.plain:
            for s in plain.segments:
                g = self.grads[s.entry]
                if g is None:
                    continue
                run = flat(g, s.grad_start, s.length) if plain.one_dimensional else g
                sums.append(torch.stack([reference.sum_of_squares(x) for x in run.split(CHUNK)]).sum())
        self.forget_gradients()
        return torch.stack(sums).sum() if sums else None
