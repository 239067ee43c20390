"""The rule on CPU tensors with master weights or an 8-bit momentum: compiled where there is much to do.

Compiled, a step takes a quarter of the time that plain torch takes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...memory_order import flat
from ..codecs import BLOCK, GOLDEN
from ..reference import PER_BYTE, Scalars
from ..segments import Segment, StepTensors
from ..state import EXP_AVG, EXP_AVG_SCALE, REMAINDER
from . import compiled
from .batch import SIGNS
from .cpu import ALONE, COMPILE_FROM
from .plain import PlainBatch, Run

_PER_ELEMENT = {EXP_AVG_SCALE: BLOCK, SIGNS: PER_BYTE}  # elements of the parameter that share one of the state


class CodesBatch(PlainBatch):
    """Steps runs of 1-D memory. Runs of at least ALONE elements are compiled if together they have COMPILE_FROM."""

    def __init__(self, tensors: StepTensors, segments: Sequence[Segment]) -> None:
        super().__init__(tensors, segments, linear=True)
        lengths = [run.segment.length for run in self.runs]
        self._compiles = sum(n for n in lengths if n >= ALONE) >= COMPILE_FROM
        self._stacked: tuple[Scalars, Tensor] | None = None

    def _scalars(self, s: Scalars) -> Tensor:
        if self._stacked is None or self._stacked[0] is not s:
            self._stacked = s, torch.stack(s)
        return self._stacked[1]

    def _head(self, run: Run) -> int:
        """Number of elements that a compiled function may take: whole blocks, or none."""
        length = run.segment.length
        return length - length % BLOCK if self._compiles and length >= ALONE else 0

    def step_run(self, run: Run, g: Tensor, s: Scalars, seed: Tensor) -> None:
        head = self._head(run)
        if head:
            first, rest = _cut(run, head)
            tensors = [first.param, flat(g, 0, head), first.state[EXP_AVG], *_codes(first, seed)]
            function = compiled.step_codes_ if EXP_AVG_SCALE in run.state else compiled.step_master_
            if REMAINDER in run.state:
                tensors.append(first.state[REMAINDER])
                function = compiled.step_codes_master_ if EXP_AVG_SCALE in run.state else compiled.step_master_
            if function(tensors, self._scalars(s)):
                run, g = rest, g[head:]
        super().step_run(run, g, s, seed)

    def pack_run(self, run: Run, g: Tensor, packed: Tensor, s: Scalars, seed: Tensor) -> None:
        head = self._head(run) if EXP_AVG_SCALE in run.state else 0
        if head:
            first, rest = _cut(run, head)
            bytes_of_head = flat(packed, 0, head // PER_BYTE)
            tensors = [flat(g, 0, head), first.state[EXP_AVG], bytes_of_head, *_codes(first, seed)]
            if compiled.sign_step_codes_(tensors, self._scalars(s)):
                run, g, packed = rest, g[head:], packed[head // PER_BYTE :]
        super().pack_run(run, g, packed, s, seed)

    def apply_run(self, run: Run, s: Scalars) -> None:
        head = self._head(run) if REMAINDER in run.state else 0
        if head:
            first, rest = _cut(run, head)
            tensors = [first.param, first.state[SIGNS], first.state[REMAINDER]]
            if compiled.apply_signs_master_(tensors, self._scalars(s)):
                run = rest
        super().apply_run(run, s)


def _cut(run: Run, head: int) -> tuple[Run, Run]:
    """The first elements of a run, and the others."""
    s = run.segment
    # Not as views, which would be compiled anew for each shape of their base.
    first = {name: flat(t, 0, head // _PER_ELEMENT.get(name, 1)) for name, t in run.state.items()}
    rest = {name: t[head // _PER_ELEMENT.get(name, 1) :] for name, t in run.state.items()}
    after = s._replace(param_start=s.param_start + head, length=s.length - head)
    return run._replace(param=flat(run.param, 0, head), state=first), run._replace(
        segment=after, param=run.param[head:], state=rest
    )


def _codes(run: Run, seed: Tensor) -> list[Tensor]:
    """The scales of an 8-bit momentum and the seed of the run's first element, if it has such a momentum."""
    if EXP_AVG_SCALE not in run.state:
        return []
    # The compiled function counts elements from 0. See codecs.GOLDEN.
    return [run.state[EXP_AVG_SCALE], (seed + (run.segment.param_start * GOLDEN & 0xFFFFFFFF)) & 0xFFFFFFFF]
