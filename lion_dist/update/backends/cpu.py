"""The rule on CPU tensors: compiled where there is much to do, else plain torch in few passes over memory.

[Note: Finite numbers] The functions for chunks make the operations of reference.py, in place, but not its selections,
which would take three times as long. As long as c, the momentum and the parameter are finite, the bits are the same. A
sum tells: it is finite only where all of its terms are. (It may overflow over finite terms, which costs time alone.)
Where it is not finite, the functions of reference.py decide.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ...memory_order import flat
from .. import reference
from ..hypers import StepHypers
from ..reference import PER_BYTE, Scalars
from ..segments import Segment, StepTensors
from ..state import EXP_AVG
from . import compiled
from .batch import Mix, Prepared
from .plain import CHUNK, PlainBatch

# The calls for one chunk take as long as the work on so many elements, so shorter runs are stepped together.
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
        total = sum(s.length for s in segments if s.length >= COMPILE_RUN)
        # Packed signs are bytes.
        self._compiles = total >= COMPILE_FROM and {mix.param, *mix.state} <= {torch.float32, torch.uint8}

    def _compiled(self, t: Tensor) -> bool:
        return self._compiles and t.numel() >= COMPILE_RUN

    def step(self, prepared: Prepared, hypers: StepHypers) -> None:
        short: dict[int, list[tuple[int, Tensor]]] = {}
        for i, g in self.with_gradient(prepared):
            if g.numel() < GATHER_BELOW:
                short.setdefault(self.groups[i], []).append((i, g))
            else:
                self.step_run(self.params[i], g, self.state[EXP_AVG][i], hypers.scalars(g.device, self.groups[i]))
        for group, runs in short.items():
            for filling in _fillings(runs):
                self._step_together(filling, hypers.scalars(runs[0][1].device, group))

    def _step_together(self, runs: Sequence[tuple[int, Tensor]], s: Scalars) -> None:
        """Steps short runs of one group, by number and gradient, as one run of copies."""
        grads = [g for _, g in runs]
        params, exp_avgs = [self.params[i] for i, _ in runs], [self.state[EXP_AVG][i] for i, _ in runs]
        p, m = torch.cat(params), torch.cat(exp_avgs)
        step_chunk_(p, torch.cat(grads), m, s)
        sizes = [g.numel() for g in grads]
        torch.split_with_sizes_copy(p, sizes, out=params)
        torch.split_with_sizes_copy(m, sizes, out=exp_avgs)

    def step_run(self, p: Tensor, g: Tensor, m: Tensor, s: Scalars) -> None:
        if self._compiled(p) and compiled.step_(p, g, m, scalars=s):
            return
        for p_chunk, g_chunk, m_chunk in _chunks(p, g, m):
            step_chunk_(p_chunk, g_chunk, m_chunk, s)

    def pack_run(self, g: Tensor, m: Tensor, packed: Tensor, s: Scalars) -> None:
        if self._compiled(g):
            whole = g.numel() // PER_BYTE  # bytes; the compiled function takes no others
            head = whole * PER_BYTE
            if compiled.sign_step_(flat(g, 0, head), flat(m, 0, head), flat(packed, 0, whole), scalars=s):
                g, m, packed = g[head:], m[head:], packed[whole:]
        for g_chunk, m_chunk, packed_chunk in _chunks(g, m, packed):
            pack_chunk_(g_chunk, m_chunk, packed_chunk, s)

    def apply_run(self, p: Tensor, packed: Tensor, s: Scalars) -> None:
        if self._compiled(p) and compiled.apply_signs_(p, packed, scalars=s):
            return
        for p_chunk, packed_chunk in _chunks(p, packed):
            apply_chunk_(p_chunk, packed_chunk, s)


def _fillings(runs: Sequence[tuple[int, Tensor]]) -> Iterator[list[tuple[int, Tensor]]]:
    """Divides runs, in their order, so that each part has less than CHUNK elements: for so few torch starts no
    threads."""
    filling: list[tuple[int, Tensor]] = []
    total = 0
    for run in runs:
        if total + run[1].numel() >= CHUNK:
            yield filling
            filling, total = [], 0
        filling.append(run)
        total += run[1].numel()
    if filling:
        yield filling


def _chunks(*runs: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Cuts runs of one length, or their packed signs, into chunks that stay in the cache. For each CHUNK of elements
    torch can start a thread."""
    size = CHUNK * torch.get_num_threads()
    if runs[0].numel() <= size:
        yield runs
        return
    yield from zip(*(t.split(size // PER_BYTE if t.dtype == torch.uint8 else size) for t in runs), strict=True)


def _blend_(g: Tensor, m: Tensor, s: Scalars) -> tuple[Tensor, Tensor, bool]:
    """Writes the new momentum. See [Note: Finite numbers].

    Returns:
        c and the new momentum before rounding, float32; whether all of c and of the stored momentum are finite.
    """
    g32, m32 = g.float(), m.float()
    if s.grad_scale.item() != 1:
        g32 = g32 * s.grad_scale
    c, t = m32 * s.beta1, g32 * s.one_minus_beta1
    c.add_(t)
    torch.mul(g32, s.one_minus_beta2, out=t)
    m32.mul_(s.beta2).add_(t)
    if m32 is not m:
        m.copy_(m32)
    return c, m32, math.isfinite(c.sum()) and math.isfinite(m.sum(dtype=torch.float32))


def _move_(p: Tensor, sign: Tensor, s: Scalars) -> None:
    """Writes the new parameter, by signs of which none is NaN. See [Note: Finite numbers]."""
    lr = s.lr.item()
    if lr == 0:
        return
    p32 = p.float()
    # The product of lr and a sign is exact, so a fused multiply-add rounds once, as the rule's difference does.
    p32.mul_(s.decay).add_(sign, alpha=-lr)
    if not math.isfinite(p32.sum()):
        p.copy_(reference.stored(p32, p32 == p32, p.dtype))
    elif p32 is not p:
        p.copy_(p32)


def step_chunk_(p: Tensor, g: Tensor, m: Tensor, s: Scalars) -> None:
    """`reference.lion_step_`, on 1-D tensors that fit into the cache."""
    c, m32, finite = _blend_(g, m, s)
    if finite:
        _move_(p, c.sign_(), s)
    else:
        sign, new_m = reference.judge(c, m32, m.dtype)
        m.copy_(new_m)
        p.copy_(reference.parameter_rule(p, sign, s))


def pack_chunk_(g: Tensor, m: Tensor, packed: Tensor, s: Scalars) -> None:
    """`reference.sign_step_`, on 1-D tensors that fit into the cache."""
    c, m32, finite = _blend_(g, m, s)
    if finite:
        sign = c.sign_()
        code = (sign * 1.5).sub_(0.5).mul_(sign)  # 0, 1 and -1 become ZERO, PLUS and MINUS
        packed.copy_(reference.pack_codes(code.to(torch.uint8)))
    else:
        sign, new_m = reference.judge(c, m32, m.dtype)
        m.copy_(new_m)
        packed.copy_(reference.pack_signs(sign))


def apply_chunk_(p: Tensor, packed: Tensor, s: Scalars) -> None:
    """`reference.apply_signs_`, on 1-D tensors that fit into the cache."""
    if (packed & packed >> 1 & 0x55).any():  # both bits of a code are set, so one is NOT_A_NUMBER
        reference.apply_signs_(p, packed, s)
    else:
        code = reference.unpack_codes(packed, p.numel()).float()
        _move_(p, (code * -1.5).add_(2.5).mul_(code), s)  # ZERO, PLUS and MINUS become 0, 1 and -1
