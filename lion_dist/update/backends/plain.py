"""The rule in plain torch: for devices without a kernel, and for tensors that are not 1-D memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...memory_order import flat, is_dense, laid_out_like, same_layout
from .. import reference, sums
from ..codecs import BLOCK
from ..hypers import StepHypers
from ..reference import PER_BYTE, EightBits, Scalars
from ..segments import Segment, StepTensors
from ..state import EXP_AVG, EXP_AVG_SCALE, REMAINDER
from ..sums import Key, Signs
from .batch import SIGNS, Prepared, key_of

PIECE = 1 << 20  # elements that are stepped at a time, a multiple of BLOCK: the rule needs a dozen temporary tensors
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
                    state[name] = flat(t, tensors.start_in(name, s), -(-s.length // tensors.blocks.get(name, 1)))
            self.runs.append(Run(s, tensors.groups[s.entry], p, state))

    def set_gradients(self, addresses: Sequence[int]) -> None:
        """Does nothing: the other methods are given the gradients themselves."""

    def gradients(self, grads: Sequence[Tensor | None], runs: Sequence[Run]) -> Iterator[tuple[Run, Tensor]]:
        """The runs that have a gradient, each with its part of it. ``grads``: those of all entries."""
        for run in runs:
            if (g := self.gradient(grads, run)) is not None:
                yield run, g

    def gradient(self, grads: Sequence[Tensor | None], run: Run) -> Tensor | None:
        """A run's part of its entry's gradient, or None. ``grads``: those of all entries."""
        s = run.segment
        g = grads[s.entry]
        if g is not None and self._linear and (g.dim() != 1 or g.numel() != s.length):
            g = g.as_strided((s.length,), (1,), g.storage_offset() + s.grad_start)
        return g

    def step(self, prepared: Prepared, hypers: StepHypers) -> None:
        for run, g in self.gradients(prepared.present(), self.runs):
            s, seed = hypers.scalars(g.device, run.group), hypers.seed(g.device, run.group)
            if self._linear:
                self.step_run(run, g, s, seed)
            else:
                _step_strided(run, g, s, seed)

    def step_run(self, run: Run, g: Tensor, s: Scalars, seed: Tensor) -> None:
        """The step of one run of 1-D memory."""
        remainder = run.state.get(REMAINDER)
        for at, p_piece, g_piece, m_piece in _pieces(run.param, g, run.state[EXP_AVG]):
            n = p_piece.numel()
            of_piece = None if remainder is None else remainder[at : at + n]
            reference.lion_step_(p_piece, g_piece, m_piece, s, _eight_bits(run, seed, at, n), of_piece)

    def pack_signs(self, prepared: Prepared, hypers: StepHypers, signs: Tensor, checksum: Tensor, salt: int) -> None:
        device = signs.device
        checksum.copy_(reference.hyper_checksum(hypers.table(device), salt, hypers.grad_scale(device)))
        for run, g in self.gradients(prepared.present(), self.runs):
            s = run.segment
            packed = flat(signs, s.state_start // PER_BYTE, -(-s.length // PER_BYTE))
            self.pack_run(run, g, packed, hypers.scalars(device, run.group), hypers.seed(device, run.group))

    def pack_run(self, run: Run, g: Tensor, packed: Tensor, s: Scalars, seed: Tensor) -> None:
        """The owner's half of the step of one run."""
        for at, g_piece, m_piece in _pieces(g, run.state[EXP_AVG]):
            n = g_piece.numel()
            bytes_of_piece = packed[at // PER_BYTE : -(-(at + n) // PER_BYTE)]
            reference.sign_step_(g_piece, m_piece, bytes_of_piece, s, _eight_bits(run, seed, at, n))

    def apply_signs(self, active: Tensor | None, table: Tensor, agree: Tensor) -> None:
        if not agree:
            return
        flags = None if active is None else active.tolist()
        scalars = [reference.scalars(row) for row in table]
        for run in self.runs:
            if flags is None or flags[run.segment.entry]:
                self.apply_run(run, scalars[run.group])

    def apply_run(self, run: Run, s: Scalars) -> None:
        """The other half of the step of one run."""
        packed, remainder = run.state[SIGNS], run.state.get(REMAINDER)
        for at, p_piece in _pieces(run.param):
            n = p_piece.numel()
            bytes_of_piece = packed[at // PER_BYTE : -(-(at + n) // PER_BYTE)]
            reference.apply_signs_(p_piece, bytes_of_piece, s, None if remainder is None else remainder[at : at + n])

    def sum_of_squares(self, prepared: Prepared) -> Tensor | None:
        squares = [
            torch.stack([reference.sum_of_squares(chunk) for chunk in g.split(CHUNK)]).sum()
            for _, g in self.gradients(prepared.present(), self.runs)
        ]
        return torch.stack(squares).sum() if squares else None

    def add_up(
        self, prepared: Prepared, hypers: StepHypers, last: Mapping[Key, Tensor], kept: Signs | None
    ) -> tuple[list[int], Tensor]:
        grads, found = prepared.present(), []
        for run in self.runs:
            key, s = key_of(prepared.tensors, run.segment), hypers.scalars(run.param.device, run.group)
            of_run, packed = sums.of_run(run.param, run.state, self.gradient(grads, run), s, last.get(key))
            found.append(of_run)
            if kept is not None and packed is not None:
                kept[key] = packed
        return [run.segment.entry for run in self.runs], torch.stack(found)


def is_linear(tensors: StepTensors, entry: int) -> bool:
    """Whether an entry's segments are runs of 1-D memory in its parameter and its state alike."""
    p = tensors.params[entry]
    if tensors.segments is not None:  # which are given for dense tensors alone
        return True
    return is_dense(p) and all(same_layout(p, t) for t in tensors.state_of(entry).values() if t.shape == p.shape)


def _pieces(*runs: Tensor) -> Iterator[tuple[Any, ...]]:
    """Cuts runs of one length into pieces: the index of the first element of each, and its part of each run."""
    for at, *parts in zip(count(0, PIECE), *(run.split(PIECE) for run in runs), strict=False):
        yield at, *parts


def _eight_bits(run: Run, seed: Tensor, start: int, length: int) -> EightBits | None:
    """What belongs to the int8 codes of elements of a run; None if its momentum has other dtypes."""
    scale = run.state.get(EXP_AVG_SCALE)
    if scale is None:
        return None
    return EightBits(scale[start // BLOCK : -(-(start + length) // BLOCK)], seed, run.segment.param_start + start)


def _step_strided(run: Run, g: Tensor, s: Scalars, seed: Tensor) -> None:
    """The step of a whole tensor, of any strides. Blocks are counted in the memory order of the momentum."""
    m, remainder = run.state[EXP_AVG], run.state.get(REMAINDER)
    eight = _eight_bits(run, seed, 0, m.numel())
    if eight is None:
        reference.lion_step_(run.param, g, m, s, None, remainder)
        return
    p, g = laid_out_like(run.param, m), laid_out_like(g, m)
    r = None if remainder is None else laid_out_like(remainder, m)
    reference.lion_step_(flat(p), flat(g), flat(m), s, eight, None if r is None else flat(r))
    run.param.copy_(p)
    if remainder is not None and r is not None:
        remainder.copy_(r)
