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
from .batch import Mix, Prepared
from .chunks import F32, Chunks
from .plain import PlainBatch

# Elements of a chunk for each thread. More chunks would mean more calls, fewer would not stay in the cache.
CHUNK = 1 << 17
# torch starts no thread for fewer elements than this.
PARALLEL_FROM = 32768
# The calls for one run take as long as the work on so many elements, so shorter runs are stepped together.
GATHER_BELOW = 8192
# The call of a compiled function takes as long as plain torch takes for so many elements.
COMPILE_RUN = 32768
# torch.compile takes seconds once a process and mix of dtypes, and saves a millisecond a step for so many elements.
COMPILE_FROM = 1 << 20


class CpuBatch(PlainBatch):
    """Steps runs of 1-D memory of one mix of dtypes.

    Runs of at least COMPILE_RUN elements are compiled if together they have COMPILE_FROM elements and their parameters
    and state are float32: torch.compile makes no vector instructions of the canonical NaN in 16 bits.
    """

    def __init__(self, tensors: StepTensors, segments: Sequence[Segment], mix: Mix) -> None:
        super().__init__(tensors, segments, linear=True)
        self._chunks = Chunks()
        total = sum(s.length for s in segments if s.length >= COMPILE_RUN)
        # Packed signs are bytes.
        self._compiles = total >= COMPILE_FROM and {mix.param, *mix.state} <= {F32, torch.uint8}

    def _compiled(self, t: Tensor) -> bool:
        return self._compiles and t.numel() >= COMPILE_RUN

    def step(self, prepared: Prepared, hypers: StepHypers) -> None:
        scalars: dict[int, Scalars] = {}
        short: dict[int, list[tuple[int, Tensor]]] = {}
        for i, g in self.with_gradient(prepared):
            group = self.groups[i]
            if group not in scalars:
                scalars[group] = hypers.scalars(g.device, group)
            if g.numel() < GATHER_BELOW:
                short.setdefault(group, []).append((i, g))
            else:
                self.step_run(self.params[i], g, self.state[EXP_AVG][i], scalars[group])
        for group, runs in short.items():
            for filling in _fillings(runs):
                self._step_together(filling, scalars[group])

    def _step_together(self, runs: Sequence[tuple[int, Tensor]], s: Scalars) -> None:
        """Steps short runs of one group, by number and gradient, as one run of copies."""
        grads = [g for _, g in runs]
        params, exp_avgs = [self.params[i] for i, _ in runs], [self.state[EXP_AVG][i] for i, _ in runs]
        p, m = torch.cat(params), torch.cat(exp_avgs)
        self._chunks.lion_step_(p, torch.cat(grads), m, s)
        sizes = [g.numel() for g in grads]
        torch.split_with_sizes_copy(p, sizes, out=params)
        torch.split_with_sizes_copy(m, sizes, out=exp_avgs)

    def step_run(self, p: Tensor, g: Tensor, m: Tensor, s: Scalars) -> None:
        if self._compiled(p) and compiled.step_(p, flat(g), m, scalars=s):
            return
        for p_chunk, g_chunk, m_chunk in _cut(p, g, m):
            self._chunks.lion_step_(p_chunk, g_chunk, m_chunk, s)

    def pack_run(self, g: Tensor, m: Tensor, packed: Tensor, s: Scalars) -> None:
        if self._compiled(g):
            whole = g.numel() // PER_BYTE  # bytes; the compiled function takes no others
            head = whole * PER_BYTE
            if compiled.sign_step_(flat(g, 0, head), flat(m, 0, head), flat(packed, 0, whole), scalars=s):
                g, m, packed = g[head:], m[head:], packed[whole:]
        for g_chunk, m_chunk, packed_chunk in _cut(g, m, packed):
            self._chunks.sign_step_(g_chunk, m_chunk, packed_chunk, s)

    def apply_run(self, p: Tensor, packed: Tensor, s: Scalars) -> None:
        if self._compiled(p) and compiled.apply_signs_(p, packed, scalars=s):
            return
        for p_chunk, packed_chunk in _cut(p, packed):
            self._chunks.apply_signs_(p_chunk, packed_chunk, s)


def _fillings(runs: Sequence[tuple[int, Tensor]]) -> Iterator[list[tuple[int, Tensor]]]:
    """Divides runs, in their order, so that each part has less than PARALLEL_FROM elements."""
    filling: list[tuple[int, Tensor]] = []
    total = 0
    for run in runs:
        if total + run[1].numel() >= PARALLEL_FROM:
            yield filling
            filling, total = [], 0
        filling.append(run)
        total += run[1].numel()
    if filling:
        yield filling


def _cut(*runs: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Cuts runs of one length, or their packed signs, into chunks of CHUNK elements for each thread."""
    size = CHUNK * torch.get_num_threads()
    if runs[0].numel() <= size:
        return (runs,)
    return zip(*(t.split(size // PER_BYTE if t.dtype == torch.uint8 else size) for t in runs), strict=True)
