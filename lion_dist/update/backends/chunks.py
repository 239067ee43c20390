"""The rule on chunks of CPU tensors, in plain torch, with few passes over memory.

[Note: Finite numbers] The methods here perform the operations of reference.py in place, without its selections, which
would take three times as long. Where c, the momentum and the parameter are finite, the bits are the same. Sums tell
whether all of them are: a sum is finite only if each of its terms is. (It may overflow although they are, which only
costs time.) Where a sum is not finite, the functions of reference.py decide.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..reference import Scalars

F32 = torch.float32


class Numbers(NamedTuple):
    """The rule's scalars in the forms that a CPU needs."""

    scalars: Scalars
    stacked: Tensor  # all of them, float32, for compiled functions
    lr: float
    decays: bool  # whether the decay is not 1
    scales: bool  # whether grad_scale is not 1

    @classmethod
    def of(cls, s: Scalars) -> Numbers:
        return cls(s, torch.stack(s), s.lr.item(), s.decay.item() != 1, s.grad_scale.item() != 1)


class Chunks:
    """Steps chunks, 1-D tensors that fit into the cache. Keeps its scratch memory, as large as the largest chunk was.

    The methods are those of reference.py that have the same names, bit for bit.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(4, 0, dtype=F32, device="cpu")
        self._rows: dict[int, tuple[Tensor, ...]] = {}  # by length

    def _scratch(self, length: int) -> tuple[Tensor, ...]:
        """Four float32 tensors of a length."""
        if length > self._memory.shape[1] or len(self._rows) == 64:
            self._memory = torch.empty(4, max(length, self._memory.shape[1]), dtype=F32, device="cpu")
            self._rows = {}
        rows = self._rows[length] = self._memory[:, :length].unbind()
        return rows

    def _blend_(self, g: Tensor, m: Tensor, n: Numbers) -> tuple[Tensor, Tensor, Tensor, bool]:
        """Writes the new momentum. See [Note: Finite numbers].

        Returns:
            c; the new momentum before rounding; scratch memory, all float32; and whether all of c and of the stored
            momentum are finite.
        """
        length, s = m.numel(), n.scalars
        c, t, g32, m32 = self._rows.get(length) or self._scratch(length)
        if n.scales:
            g = torch.mul(g.float(), s.grad_scale, out=g32)
        elif g.dtype != F32:
            g = g32.copy_(g)
        new_m = m if m.dtype == F32 else m32.copy_(m)
        torch.mul(new_m, s.beta1, out=c)
        torch.mul(g, s.one_minus_beta1, out=t)
        c.add_(t)
        torch.mul(g, s.one_minus_beta2, out=t)
        new_m.mul_(s.beta2).add_(t)
        total = m.sum() if new_m is m else m.copy_(new_m).sum(dtype=F32)
        return c, new_m, t, math.isfinite(total) and math.isfinite(c.sum())

    @staticmethod
    def _move_(p: Tensor, sign: Tensor, n: Numbers, scratch: Tensor) -> None:
        """Writes the new parameter, by signs of which none is NaN. See [Note: Finite numbers]."""
        if n.lr == 0:
            return
        new_p = p if p.dtype == F32 else scratch.copy_(p)
        # The product of lr and a sign is exact, so a fused multiply-add rounds once, as the rule's difference does.
        if n.decays:
            new_p.mul_(n.scalars.decay)
        new_p.add_(sign, alpha=-n.lr)
        if not math.isfinite(new_p.sum()):
            p.copy_(reference.stored(new_p, new_p == new_p, p.dtype))
        elif new_p is not p:
            p.copy_(new_p)

    def lion_step_(self, p: Tensor, g: Tensor, m: Tensor, n: Numbers) -> None:
        c, new_m, scratch, finite = self._blend_(g, m, n)
        if finite:
            self._move_(p, c.sign_(), n, scratch)
        else:
            sign, stored_m = reference.judge(c, new_m, m.dtype)
            m.copy_(stored_m)
            p.copy_(reference.parameter_rule(p, sign, n.scalars))

    def sign_step_(self, g: Tensor, m: Tensor, packed: Tensor, n: Numbers) -> None:
        c, new_m, scratch, finite = self._blend_(g, m, n)
        if finite:
            sign = c.sign_()
            # 0, 1 and -1 become ZERO, PLUS and MINUS.
            code = torch.mul(sign, 1.5, out=scratch).sub_(0.5).mul_(sign)
            packed.copy_(reference.pack_codes(code.to(torch.uint8)))
        else:
            sign, stored_m = reference.judge(c, new_m, m.dtype)
            m.copy_(stored_m)
            packed.copy_(reference.pack_signs(sign))

    def apply_signs_(self, p: Tensor, packed: Tensor, n: Numbers) -> None:
        if (packed & packed >> 1 & 0x55).any():  # both bits of a code are set, so one is NOT_A_NUMBER
            reference.apply_signs_(p, packed, n.scalars)
            return
        length = p.numel()
        code, sign, scratch, _ = self._rows.get(length) or self._scratch(length)
        code.copy_(reference.unpack_codes(packed, length))
        # ZERO, PLUS and MINUS become 0, 1 and -1.
        torch.mul(code, -1.5, out=sign).add_(2.5).mul_(code)
        self._move_(p, sign, n, scratch)
