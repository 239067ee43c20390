"""The rule in plain torch: for devices without a kernel, and for tensors that are not 1-D memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...memory_order import flat
from .. import reference
from ..hypers import StepHypers
from ..reference import PER_BYTE, Scalars
from ..segments import Segment, StepTensors
from ..state import EXP_AVG
from .batch import SIGNS, Prepared

CHUNK = 32768  # elements that `sum_of_squares` adds up at a time; chunks of another length would give other bits


class Run(NamedTuple):
    """A segment, and the tensors of it that stay from step to step: 1-D, or whole tensors of any strides.

    Attributes:
        segment: the segment.
        group: number of its parameter group.
        param: its elements of the parameter.
        state: its part of each state column, by name.
    """

    segment: Segment
    group: int
    param: Tensor
    state: dict[str, Tensor]


class PlainBatch:
    """Steps segments one after another, by reference.py.

    Args:
        tensors: what the segments are runs of.
        segments: runs of one device and one mix of dtypes.
        linear: whether the segments are runs of 1-D memory; otherwise each is a whole tensor, of any strides.
    """

    def __init__(self, tensors: StepTensors, segments: Sequence[Segment], linear: bool) -> None:
        self._linear = linear
        self.runs: list[Run] = []
        for s in segments:
            p, state = tensors.params[s.entry].detach(), tensors.state_of(s.entry)
            if linear:
                p = flat(p, s.param_start, s.length)
                for name, t in state.items():
                    block = tensors.blocks.get(name, 1)
                    state[name] = flat(t, s.state_start // block, -(-s.length // block))
            self.runs.append(Run(s, tensors.groups[s.entry], p, state))

    def set_gradients(self, grads: Sequence[Tensor | None]) -> None:
        """Does nothing: the other methods are given the gradients themselves."""

    def gradients(self, prepared: Prepared, runs: Sequence[Run]) -> Iterator[tuple[Run, Tensor]]:
        """The runs that have a gradient, each with its part of it."""
        grads = prepared.present()
        for run in runs:
            s = run.segment
            g = grads[s.entry]
            if g is None:
                continue
            if self._linear and (g.dim() != 1 or g.numel() != s.length):
                g = g.as_strided((s.length,), (1,), g.storage_offset() + s.grad_start)
            yield run, g

    def step(self, prepared: Prepared, hypers: StepHypers) -> None:
        for run, g in self.gradients(prepared, self.runs):
            reference.lion_step_(run.param, g, run.state[EXP_AVG], hypers.scalars(g.device, run.group))

    def pack_signs(self, prepared: Prepared, hypers: StepHypers, signs: Tensor, checksum: Tensor, salt: int) -> None:
        device = signs.device
        checksum.copy_(reference.hyper_checksum(hypers.table(device), salt, hypers.grad_scale(device)))
        for run, g in self.gradients(prepared, self.runs):
            s = run.segment
            packed = flat(signs, s.state_start // PER_BYTE, -(-s.length // PER_BYTE))
            self.pack_run(g, run.state[EXP_AVG], packed, hypers.scalars(device, run.group))

    def pack_run(self, g: Tensor, m: Tensor, packed: Tensor, s: Scalars) -> None:
        """The owner's half of the step of one run."""
        reference.sign_step_(g, m, packed, s)

    def apply_signs(self, active: Tensor | None, table: Tensor, agree: Tensor) -> None:
        if not agree:
            return
        flags = None if active is None else active.tolist()
        scalars = [reference.scalars(row) for row in table]
        for run in self.runs:
            if flags is None or flags[run.segment.entry]:
                self.apply_run(run.param, run.state[SIGNS], scalars[run.group])

    def apply_run(self, p: Tensor, packed: Tensor, s: Scalars) -> None:
        """The other half of the step of one run."""
        reference.apply_signs_(p, packed, s)

    def sum_of_squares(self, prepared: Prepared) -> Tensor | None:
        sums = [
            torch.stack([reference.sum_of_squares(chunk) for chunk in g.split(CHUNK)]).sum()
            for _, g in self.gradients(prepared, self.runs)
        ]
        return torch.stack(sums).sum() if sums else None
