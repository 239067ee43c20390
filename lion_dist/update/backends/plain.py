"""The rule in plain torch: for devices without a kernel, and for tensors that are not 1-D memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ...memory_order import flat
from .. import reference
from ..hypers import StepHypers
from ..reference import PER_BYTE, Scalars
from ..segments import Segment, StepTensors
from ..state import EXP_AVG
from .batch import SIGNS, Prepared

CHUNK = 32768  # elements that sums of squares add up at a time; the sums of other chunks would have other bits


class PlainBatch:
    """Steps segments one after another, by reference.py.

    Args:
        tensors: what the segments are runs of.
        segments: runs of one device and one mix of dtypes.
        linear: whether the segments are runs of 1-D memory; otherwise each is a whole tensor, of any strides.
    """

    def __init__(self, tensors: StepTensors, segments: Sequence[Segment], linear: bool) -> None:
        self.segments = segments
        self.groups = [tensors.groups[s.entry] for s in segments]
        self.linear = linear
        self.params = [self._run(tensors.params[s.entry].detach(), s.param_start, s.length) for s in segments]
        self.state: dict[str, list[Tensor]] = {}
        for s in segments:
            for name, t in tensors.state_of(s.entry).items():
                block = tensors.blocks.get(name, 1)
                run = self._run(t, s.state_start // block, -(-s.length // block))
                self.state.setdefault(name, []).append(run)

    def _run(self, t: Tensor, start: int, length: int) -> Tensor:
        return flat(t, start, length) if self.linear else t

    def set_gradients(self, grads: Sequence[Tensor | None]) -> None:
        """Nothing: the gradients themselves come with each call."""

    def with_gradient(self, prepared: Prepared) -> Iterator[tuple[int, Tensor]]:
        """Numbers of the segments that have a gradient, and their runs of it."""
        grads = prepared.present()
        for i, s in enumerate(self.segments):
            g = grads[s.entry]
            if g is not None:
                # `flat` takes twice as long. Here a view does no harm.
                yield i, g.as_strided((s.length,), (1,), g.storage_offset() + s.grad_start) if self.linear else g

    def step(self, prepared: Prepared, hypers: StepHypers) -> None:
        for i, g in self.with_gradient(prepared):
            self.step_run(self.params[i], g, self.state[EXP_AVG][i], hypers.scalars(g.device, self.groups[i]))

    def step_run(self, p: Tensor, g: Tensor, m: Tensor, s: Scalars) -> None:
        reference.lion_step_(p, g, m, s)

    def pack_signs(self, prepared: Prepared, hypers: StepHypers, signs: Tensor, checksum: Tensor, salt: int) -> None:
        device = signs.device
        checksum.copy_(reference.hyper_checksum(hypers.table(device), salt, hypers.grad_scale(device)))
        for i, g in self.with_gradient(prepared):
            s = self.segments[i]
            packed = flat(signs, s.state_start // PER_BYTE, -(-s.length // PER_BYTE))
            self.pack_run(g, self.state[EXP_AVG][i], packed, hypers.scalars(device, self.groups[i]))

    def pack_run(self, g: Tensor, m: Tensor, packed: Tensor, s: Scalars) -> None:
        reference.sign_step_(g, m, packed, s)

    def apply_signs(self, active: Tensor | None, table: Tensor, agree: Tensor) -> None:
        if not agree:
            return
        flags = None if active is None else active.tolist()
        scalars = [reference.scalars(row) for row in table]
        for s, group, p, packed in zip(self.segments, self.groups, self.params, self.state[SIGNS], strict=True):
            if flags is None or flags[s.entry]:
                self.apply_run(p, packed, scalars[group])

    def apply_run(self, p: Tensor, packed: Tensor, s: Scalars) -> None:
        reference.apply_signs_(p, packed, s)

    def sum_of_squares(self, prepared: Prepared) -> Tensor | None:
        sums = []
        for _, g in self.with_gradient(prepared):
            sums.append(torch.stack([reference.sum_of_squares(x) for x in g.split(CHUNK)]).sum())
        return torch.stack(sums).sum() if sums else None
