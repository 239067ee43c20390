"""The rule on CPU tensors: compiled where there is much to do, else in chunks of plain torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from ...memory_order import flat
from ..hypers import StepHypers
from ..reference import PER_BYTE, Scalars
from ..segments import Segment, StepTensors
from ..state import EXP_AVG
from . import compiled
from .batch import SIGNS, Mix, Prepared
from .chunks import F32, Chunks, Numbers
from .plain import PlainBatch, Run

# Shorter runs are stepped together, as copies: the calls for one run take as long as the work on so many elements.
LONG = 4096
# torch.compile takes seconds once a process and mix of dtypes; for so many elements it saves half a millisecond a step.
COMPILE_FROM = 1 << 19
# The call of a compiled function for one run takes as long as plain torch takes for so many elements.
ALONE = 32768
# Most elements that are stepped together. torch starts no threads for so few.
TOGETHER = 32767
# Elements of a chunk for each thread. Smaller chunks mean more calls; larger ones do not stay in the cache.
CHUNK = 1 << 17


class CpuBatch(PlainBatch):
    """Steps runs of 1-D memory of one mix of dtypes.

    Runs of at least LONG elements are compiled if together they have COMPILE_FROM elements or more, and parameters and
    state are float32: torch.compile makes no vector instructions of the canonical NaN in 16 bits. Everything else is
    stepped in chunks of plain torch.
    """

    def __init__(self, tensors: StepTensors, segments: Sequence[Segment], mix: Mix) -> None:
        super().__init__(tensors, segments, linear=True)
        self._short = [run for run in self.runs if run.segment.length < LONG]
        self._long = [run for run in self.runs if run.segment.length >= LONG]
        elements = sum(run.segment.length for run in self._long)
        # Packed signs are bytes.
        self._compiles = elements >= COMPILE_FROM and {mix.param, *mix.state} <= {F32, torch.uint8}
        self._calls = list(_calls(self._long)) if self._compiles else [[run] for run in self._long]
        self._chunks = Chunks()
        self._numbers: Numbers | None = None  # of the last run

    def _numbers_of(self, s: Scalars) -> Numbers:
        if self._numbers is None or self._numbers.scalars is not s:
            self._numbers = Numbers.of(s)
        return self._numbers

    def step(self, prepared: Prepared, hypers: StepHypers) -> None:
        grads = prepared.present()
        for call in self._calls:
            runs = [(run, g) for run, g in self.gradients(grads, call)]
            if runs:
                self._step_long(runs, hypers.scalars(runs[0][1].device, runs[0][0].group))
        short: dict[int, list[tuple[Run, Tensor]]] = {}
        for run, g in self.gradients(grads, self._short):
            short.setdefault(run.group, []).append((run, g))
        for group, runs in short.items():
            for some in _divided(runs):
                self._step_together(some, hypers.scalars(runs[0][1].device, group))

    def _step_long(self, runs: Sequence[tuple[Run, Tensor]], s: Scalars) -> None:
        """Steps long runs of one group, each with its gradient."""
        numbers = self._numbers_of(s)
        if self._compiles:
            # A view would be compiled anew for each shape of its base.
            flats = [(run.param, flat(g), run.state[EXP_AVG]) for run, g in runs]
            if compiled.step_.step(flats, numbers.stacked):
                return
        for run, g in runs:
            for p_chunk, g_chunk, m_chunk in _cut(run.param, g, run.state[EXP_AVG]):
                self._chunks.lion_step_(p_chunk, g_chunk, m_chunk, numbers)

    def _step_together(self, runs: Sequence[tuple[Run, Tensor]], s: Scalars) -> None:
        """Steps short runs of one group as one run of copies."""
        params, exp_avgs = [run.param for run, _ in runs], [run.state[EXP_AVG] for run, _ in runs]
        p, m = torch.cat(params), torch.cat(exp_avgs)
        self._chunks.lion_step_(p, torch.cat([g for _, g in runs]), m, self._numbers_of(s))
        sizes = [run.segment.length for run, _ in runs]
        torch.split_with_sizes_copy(p, sizes, out=params)
        torch.split_with_sizes_copy(m, sizes, out=exp_avgs)

    def pack_run(self, run: Run, g: Tensor, packed: Tensor, s: Scalars, seed: Tensor) -> None:
        m = run.state[EXP_AVG]
        numbers = self._numbers_of(s)
        if self._compiles and g.numel() >= ALONE:
            whole = g.numel() // PER_BYTE  # bytes; the compiled function takes no others
            head = whole * PER_BYTE
            if compiled.sign_step_([flat(g, 0, head), flat(m, 0, head), flat(packed, 0, whole)], numbers.stacked):
                g, m, packed = g[head:], m[head:], packed[whole:]
        for g_chunk, m_chunk, packed_chunk in _cut(g, m, packed):
            self._chunks.sign_step_(g_chunk, m_chunk, packed_chunk, numbers)

    def apply_run(self, run: Run, s: Scalars) -> None:
        p, packed = run.param, run.state[SIGNS]
        numbers = self._numbers_of(s)
        if self._compiles and p.numel() >= ALONE and compiled.apply_signs_([p, packed], numbers.stacked):
            return
        for p_chunk, packed_chunk in _cut(p, packed):
            self._chunks.apply_signs_(p_chunk, packed_chunk, numbers)


def _calls(runs: Sequence[Run]) -> Iterator[list[Run]]:
    """Divides runs, in their order, into parts that one call may step: of one group and without a common storage."""
    call: list[Run] = []
    storages: set[int] = set()
    for run in runs:
        own = {t.untyped_storage().data_ptr() for t in (run.param, *run.state.values())}
        if call and (len(call) == compiled.SLOTS or call[0].group != run.group or own & storages):
            yield call
            call, storages = [], set()
        call.append(run)
        storages |= own
    if call:
        yield call


def _divided(runs: Sequence[tuple[Run, Tensor]]) -> Iterator[list[tuple[Run, Tensor]]]:
    """Divides runs, in their order, into parts of at most TOGETHER elements."""
    part: list[tuple[Run, Tensor]] = []
    total = 0
    for run in runs:
        total += run[0].segment.length
        if part and total > TOGETHER:
            yield part
            part, total = [], run[0].segment.length
        part.append(run)
    if part:
        yield part


def _cut(*runs: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Cuts runs of one length, or their packed signs, into chunks of CHUNK elements for each thread."""
    size = CHUNK * torch.get_num_threads()
    if runs[0].numel() <= size:
        return (runs,)
    return zip(*(t.split(size // PER_BYTE if t.dtype == torch.uint8 else size) for t in runs), strict=True)
