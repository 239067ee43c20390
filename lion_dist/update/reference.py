"""The Lion rule in plain torch: the definition that every kernel must match bit for bit.

    c = b1*m + (1-b1)*g          u = sign(c)
    p = p*(1 - lr*wd) - lr*u     m = b2*m + (1-b2)*g

p is a parameter, g its gradient and m its momentum (``exp_avg``), each stored as float32, bfloat16
or float16. Arithmetic is float32, every product and sum rounded on its own (no fused multiply-add),
each result rounded once more to its storage dtype. From Chen et al., "Symbolic Discovery of
Optimization Algorithms" (arXiv 2302.06675), algorithm 2.

Scalars derived from Python numbers (1-b1, 1-lr*wd, ...) are computed in float64 and rounded once to
float32. Before the rule the gradient is multiplied, in float32, by one scalar: the clipping
coefficient, negated where the group maximizes.

sign(+0) = sign(-0) = 0. Where c is not finite, or the new momentum is not finite once it is rounded to its storage
dtype, p and m become NaN: an infinite momentum would move its weight by lr at every later step, without a word. NaN
is stored in one canonical form a dtype (`NAN_BITS`). lr = 0 leaves p as it is, whatever it holds.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

# dtype -> (integer dtype of the same width, bits of the one NaN that is ever stored). Backends
# disagree about the NaN that a conversion makes (0x7FC0, 0x7FFF and 0xFFFF all occur for bfloat16).
NAN_BITS = {
    torch.float32: (torch.int32, 0x7FC00000),
    torch.bfloat16: (torch.int16, 0x7FC0),
    torch.float16: (torch.int16, 0x7E00),
}
STORAGE_DTYPES = tuple(NAN_BITS)
# dtype -> the smallest float32 that rounds to infinity there: the largest finite number and half a unit in its last
# place, a tie that goes to the even neighbour, which is infinity.
OVERFLOW = {
    torch.float32: math.inf,
    torch.bfloat16: 2.0**128 - 2.0**119,
    torch.float16: 2.0**16 - 2.0**4,
}


class HyperParameters(NamedTuple):
    """What one parameter group asks of one step. ``lr`` is a number or a tensor of one element;
    ``weight_decay`` is what lr is multiplied by (already divided where it was given decoupled)."""

    lr: float | Tensor
    weight_decay: float
    beta1: float
    beta2: float
    maximize: bool


# StepTensors of a hyper-parameter table, float64, one row a parameter group.
LR, WEIGHT_DECAY, BETA1, BETA2, GRAD_SIGN = range(5)
HYPER_COLUMNS = 5


class Scalars(NamedTuple):
    """The rule's scalars, each a float32 tensor of shape ()."""

    lr: Tensor
    decay: Tensor  # 1 - lr*wd
    beta1: Tensor
    one_minus_beta1: Tensor
    beta2: Tensor
    one_minus_beta2: Tensor
    grad_scale: Tensor


def scalars(row: Tensor, grad_scale: Tensor | None = None) -> Scalars:
    """The scalars of one row of a hyper-parameter table, on the row's device.

    Args:
        row: float64, shape (HYPER_COLUMNS,).
        grad_scale: float32, shape (); None is 1.
    """
    lr, weight_decay, beta1, beta2, sign = row.unbind()
    scale = sign.float()
    return Scalars(
        lr=lr.float(),
        decay=(1 - lr * weight_decay).float(),
        beta1=beta1.float(),
        one_minus_beta1=(1 - beta1).float(),
        beta2=beta2.float(),
        one_minus_beta2=(1 - beta2).float(),
        grad_scale=scale if grad_scale is None else scale * grad_scale,
    )


def _select(condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """a where the condition holds, else b, with all their bits; both of one storage dtype.

    Among 16-bit floats a compiler selects in float32, and the conversions rewrite NaN: so among integers. Among float32
    it selects as it is written, and makes vector instructions of that. Of a view as integers it makes none: five times
    the time on a CPU.
    """
    if a.dtype == torch.float32:
        return torch.where(condition, a, b)
    integer, _ = NAN_BITS[a.dtype]
    return torch.where(condition, a.view(integer), b.view(integer)).view(a.dtype)


def _stored(x: Tensor, is_number: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 x, rounded to its storage dtype, where ``is_number`` holds; elsewhere NaN in its canonical form."""
    integer, nan_bits = NAN_BITS[dtype]
    return _select(is_number, x.to(dtype), torch.full((), nan_bits, dtype=integer, device=x.device).view(dtype))


def momentum_rule(g: Tensor, m: Tensor, s: Scalars) -> tuple[Tensor, Tensor]:
    """The half of the rule that needs gradient and momentum, of any storage dtypes.

    Returns:
        The sign of c, float32: -1, 0, +1, or NaN where the parameter must become NaN; and the new momentum, in the
        dtype of m.
    """
    m32 = m.float()
    g32 = g.float() * s.grad_scale
    c = s.beta1 * m32 + s.one_minus_beta1 * g32
    m32 = s.beta2 * m32 + s.one_minus_beta2 * g32
    # Comparisons with NaN are false. abs, < and - become vector instructions on a CPU, in 16 bits too; isfinite and
    # torch.sign do not.
    finite = (c.abs() < math.inf) & (m32.abs() < OVERFLOW[m.dtype])
    sign = (c > 0).float() - (c < 0).float()
    return torch.where(finite, sign, math.nan), _stored(m32, finite, m.dtype)


def parameter_rule(p: Tensor, sign: Tensor, s: Scalars) -> Tensor:
    """The half that needs the parameter: what it becomes, in its dtype. ``sign`` as `momentum_rule` gives it."""
    p32 = p.float() * s.decay - s.lr * sign
    return _select(s.lr == 0, p, _stored(p32, p32 == p32, p.dtype))


def lion_rule(p: Tensor, g: Tensor, m: Tensor, s: Scalars) -> tuple[Tensor, Tensor]:
    """One step of the rule.

    Args:
        p, g, m: parameter, gradient, momentum: one shape, each of any storage dtype.
        s: scalars on the device of p (or on the CPU).

    Returns:
        The new parameter and the new momentum, in the dtypes of p and m.
    """
    sign, new_m = momentum_rule(g, m, s)
    return parameter_rule(p, sign, s), new_m


def lion_step_(p: Tensor, g: Tensor, m: Tensor, s: Scalars) -> None:
    """Writes the rule's results into p and m. Shapes, dtypes and devices as in `lion_rule`."""
    new_p, new_m = lion_rule(p, g, m, s)
    p.copy_(new_p)
    m.copy_(new_m)


# Codes of a sign, two bits each. Four share a byte: element i of a group of four is in bits 2i and 2i + 1.
ZERO, PLUS, MINUS, NOT_A_NUMBER = range(4)
PER_BYTE = 4


def pack_signs(sign: Tensor) -> Tensor:
    """float32 signs, 1-D, as `momentum_rule` gives them -> their codes, uint8, a quarter as many, rounded up."""
    code = torch.where(sign.isnan(), NOT_A_NUMBER, (sign > 0) * PLUS + (sign < 0) * MINUS).to(torch.uint8)
    code = torch.nn.functional.pad(code, (0, -code.numel() % PER_BYTE)).view(-1, PER_BYTE)
    return code[:, 0] | code[:, 1] << 2 | code[:, 2] << 4 | code[:, 3] << 6


def unpack_signs(packed: Tensor, numel: int) -> Tensor:
    """The first ``numel`` float32 signs of what `pack_signs` made."""
    code = torch.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], dim=1).flatten()[:numel]
    of_code = torch.tensor([0.0, 1.0, -1.0, torch.nan], device=packed.device)
    return of_code[code.long()]


def sign_step_(g: Tensor, m: Tensor, packed: Tensor, s: Scalars) -> None:
    """The owner's half of a step, on 1-D tensors: writes the new momentum, and the packed signs."""
    sign, new_m = momentum_rule(g, m, s)
    m.copy_(new_m)
    packed.copy_(pack_signs(sign))


def apply_signs_(p: Tensor, packed: Tensor, s: Scalars) -> None:
    """The other half, on every rank: writes the new parameter, 1-D. After both it is what `lion_step_` makes of it."""
    p.copy_(parameter_rule(p, unpack_signs(packed, p.numel()), s))


def checksum(hypers: Tensor, salt: int, grad_scale: Tensor | None = None) -> Tensor:
    """A number that ranks compare before they apply one another's step; int64, shape (), wrapping around.

    Args:
        hypers: a hyper-parameter table.
        salt: what else the ranks must have in common, in [0, 2**63).
        grad_scale: float32, shape (): its bits count as one more element of the table. None counts as nothing.
    """
    bits = hypers.flatten().view(torch.int64)
    total = (bits * (2 * torch.arange(bits.numel(), device=bits.device) + 1)).sum() + salt
    if grad_scale is None:
        return total
    return total + grad_scale.view(torch.int32).long() * (2 * bits.numel() + 1)


def sum_of_squares(g: Tensor) -> Tensor:
    """The sum of g*g, each product and sum in float64; float64, shape (). The squares of finite gradients cannot
    overflow, so it is infinite where a gradient is (NaN where one is NaN), and only there."""
    return g.double().square().sum()


def clip_coefficient(total: Tensor, max_norm: float) -> tuple[Tensor, Tensor]:
    """The gradient norm, and the scalar that brings it to at most max_norm.

    Args:
        total: sum of squares of all gradients, float64, shape ().

    Returns:
        (norm, coefficient), float32, shape (), each computed in float64 and rounded once:
        sqrt(total), and min(1, max_norm / (sqrt(total) + 1e-6)), NaN where total is NaN. As torch's
        ``clip_grad_norm_`` does: an infinite total gives 0, so that finite gradients become zeros and infinite ones
        NaN; with an infinite max_norm it gives NaN, and every gradient becomes NaN.
    """
    norm = total.sqrt()
    return norm.float(), (max_norm / (norm + 1e-6)).clamp(max=1.0).float()
