"""The Lion rule in plain torch: the definition that every kernel must match bit for bit.

    c = b1*m + (1-b1)*g          u = sign(c)
    p = p*(1 - lr*wd) - lr*u     m = b2*m + (1-b2)*g

p is a parameter, g its gradient and m its momentum (``exp_avg``), each stored as float32, bfloat16 or float16.
Arithmetic is in float32. Every product and sum is rounded on its own (no fused multiply-add), and each result is
rounded once more to its storage dtype. From Chen et al., "Symbolic Discovery of Optimization Algorithms"
(arXiv 2302.06675), algorithm 2.

Scalars derived from Python numbers (1-b1, 1-lr*wd, ...) are computed in float64 and rounded once to float32. Before
the rule the gradient is multiplied, in float32, by one scalar: the clipping coefficient, negated where the group
maximizes.

sign(+0) = sign(-0) = 0. Where c is not finite, or the new momentum is not finite after it has been rounded to its
storage dtype, p and m become NaN: an infinite momentum would move its weight by lr in every later step, silently. NaN
is stored in one canonical form for each dtype (`NAN_BITS`). lr = 0 leaves p as it is, whatever it holds.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import codecs

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
    """Hyper-parameters of one parameter group in one step.

    Attributes:
        lr: a number, or a tensor of one element.
        weight_decay: the factor that lr is multiplied by (already divided by the constructor's lr where the group's
            decay is decoupled).
        beta1, beta2: the betas.
        maximize: whether the group ascends.
        seed: of the rounding of an 8-bit momentum (`codecs.seed_of`); 0 where no momentum has 8 bits.
    """

    lr: float | Tensor
    weight_decay: float
    beta1: float
    beta2: float
    maximize: bool
    seed: int = 0


# Columns of a hyper-parameter table, float64, with one row for each parameter group.
LR, WEIGHT_DECAY, BETA1, BETA2, GRAD_SIGN, SEED = range(6)
HYPER_COLUMNS = 6


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
    lr, weight_decay, beta1, beta2, sign, _ = row.unbind()
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


class EightBits(NamedTuple):
    """What belongs to the int8 codes of a momentum, 1-D, which `lion_step_` reads and writes.

    Attributes:
        scale: see `codecs.decode`.
        seed: of the step, int64, shape (); see `codecs.encode`.
        first: index in its parameter of the first element.
    """

    scale: Tensor
    seed: Tensor
    first: int


def _select(condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """a where the condition holds, else b, with all their bits; both of one storage dtype.

    Compilers convert 16-bit floats to float32 to select among them, and the conversions rewrite NaN, so 16-bit floats
    are selected as integers. float32 is selected as it is: inductor makes vector instructions of that, but not of a
    view as integers, which takes five times as long on a CPU.
    """
    if a.dtype == torch.float32:
        return torch.where(condition, a, b)
    integer, _ = NAN_BITS[a.dtype]
    return torch.where(condition, a.view(integer), b.view(integer)).view(a.dtype)


def stored(x: Tensor, is_number: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 x, rounded to its storage dtype, where ``is_number`` holds; elsewhere NaN in its canonical form."""
    integer, nan_bits = NAN_BITS[dtype]
    return _select(is_number, x.to(dtype), torch.full((), nan_bits, dtype=integer, device=x.device).view(dtype))


def blend(g: Tensor, m: Tensor, s: Scalars) -> tuple[Tensor, Tensor]:
    """c and the new momentum before rounding, both float32, of a gradient and momentum of any storage dtypes."""
    m32 = m.float()
    g32 = g.float() * s.grad_scale
    return s.beta1 * m32 + s.one_minus_beta1 * g32, s.beta2 * m32 + s.one_minus_beta2 * g32


def judge(c: Tensor, m32: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The sign of c and the stored momentum, both NaN where either number is not finite.

    Args:
        c, m32: as `blend` returns them.
        dtype: storage dtype of the momentum.

    Returns:
        The sign, float32: -1, 0, +1 or NaN; and the new momentum in ``dtype``.
    """
    # Comparisons with NaN are false. abs, < and - become vector instructions on a CPU, in 16 bits too; isfinite and
    # torch.sign do not.
    finite = (c.abs() < math.inf) & (m32.abs() < OVERFLOW[dtype])
    sign = (c > 0).float() - (c < 0).float()
    return torch.where(finite, sign, math.nan), stored(m32, finite, dtype)


def momentum_rule(g: Tensor, m: Tensor, s: Scalars) -> tuple[Tensor, Tensor]:
    """The half of the rule that needs gradient and momentum, of any storage dtypes.

    Returns:
        The sign of c, float32: -1, 0, +1, or NaN where the parameter must become NaN; and the new momentum, in the
        dtype of m.
    """
    return judge(*blend(g, m, s), m.dtype)


def parameter_rule(p: Tensor, sign: Tensor, s: Scalars) -> Tensor:
    """The half of the rule that needs the parameter.

    Args:
        p: parameter, of any storage dtype.
        sign: float32, as `momentum_rule` returns it.

    Returns:
        The new parameter, in the dtype of p.
    """
    p32 = p.float() * s.decay - s.lr * sign
    return _select(s.lr == 0, p, stored(p32, p32 == p32, p.dtype))


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


def lion_step_(
    p: Tensor, g: Tensor, m: Tensor, s: Scalars, eight: EightBits | None = None, remainder: Tensor | None = None
) -> None:  # fmt: skip
    """Writes the rule's results into p and its state. Shapes, dtypes and devices as in `lion_rule`.

    Args:
        p, g, m: parameter, gradient, momentum. An int8 momentum is 1-D, and so are p and g then.
        s: scalars.
        eight: of an int8 momentum; None for others.
        remainder: of the master weights, int16, in the shape of p, or None; written too. See `codecs.join`.
    """
    sign = momentum_step_(g, m, s, eight)
    parameter_step_(p, sign, s, remainder)


def momentum_step_(g: Tensor, m: Tensor, s: Scalars, eight: EightBits | None = None) -> Tensor:
    """Writes the new momentum, and its scale. Arguments as for `lion_step_`.

    Returns:
        The sign of c, as `momentum_rule` returns it.
    """
    if eight is None:
        sign, new_m = momentum_rule(g, m, s)
        m.copy_(new_m)
        return sign
    c, m32 = blend(g, codecs.decode(m, eight.scale), s)
    sign, stored_m = judge(c, m32, torch.float32)
    codes, new_scale = codecs.encode(m32, stored_m == stored_m, eight.seed, eight.first)
    m.copy_(codes)
    eight.scale.copy_(new_scale)
    return sign


def parameter_step_(p: Tensor, sign: Tensor, s: Scalars, remainder: Tensor | None = None) -> None:
    """Writes the new parameter, and its remainder. Arguments as for `lion_step_` and `parameter_rule`."""
    if remainder is None:
        p.copy_(parameter_rule(p, sign, s))
        return
    high, low = codecs.split(parameter_rule(codecs.join(p, remainder), sign, s))
    p.copy_(_select(s.lr == 0, p, high))
    remainder.copy_(torch.where(s.lr == 0, remainder, low))


# Codes of a sign, two bits each. Four share a byte: element i of a group of four is in bits 2i and 2i + 1.
ZERO, PLUS, MINUS, NOT_A_NUMBER = range(4)
PER_BYTE = 4


def pack_signs(sign: Tensor) -> Tensor:
    """Packs signs into two bits each.

    Args:
        sign: float32, shape (n,), as `momentum_rule` returns it.

    Returns:
        Codes of the signs, uint8, shape (ceil(n / PER_BYTE),).
    """
    # Selections among float32 become vector instructions on a CPU.
    code = torch.where(sign == sign, torch.where(sign < 0, float(MINUS), sign), float(NOT_A_NUMBER))
    return pack_codes(code.to(torch.uint8))


def pack_codes(code: Tensor) -> Tensor:
    """Packs codes, uint8, shape (n,), into bytes, uint8, shape (ceil(n / PER_BYTE),)."""
    if code.numel() % PER_BYTE:  # compiled, padding would keep all of it from becoming vector instructions
        code = torch.nn.functional.pad(code, (0, -code.numel() % PER_BYTE))
    # Four codes as one little-endian integer: the i-th is in bits 8i and 8i + 1.
    word = code.view(torch.int32)
    return (word | word >> 6 | word >> 12 | word >> 18).to(torch.uint8)


def unpack_codes(packed: Tensor, numel: int) -> Tensor:
    """The first ``numel`` codes, uint8, of bytes that `pack_codes` returned."""
    word = packed.to(torch.int32)
    return ((word | word << 6 | word << 12 | word << 18) & 0x03030303).view(torch.uint8)[:numel]


def unpack_signs(packed: Tensor, numel: int) -> Tensor:
    """The first ``numel`` signs, float32, of bytes that `pack_signs` returned."""
    code = unpack_codes(packed, numel).float()
    return torch.where(code == NOT_A_NUMBER, math.nan, torch.where(code == MINUS, -1.0, code))


def sign_step_(
    g: Tensor, m: Tensor, packed: Tensor, s: Scalars, eight: EightBits | None = None
) -> None:  # fmt: skip
    """The first half of a step, on 1-D tensors: writes the new momentum and the packed signs. Arguments as for
    `lion_step_`."""
    packed.copy_(pack_signs(momentum_step_(g, m, s, eight)))


def apply_signs_(p: Tensor, packed: Tensor, s: Scalars, remainder: Tensor | None = None) -> None:
    """The second half of a step, on 1-D tensors: writes the new parameter, and its remainder. After both halves they
    have the bits that `lion_step_` gives them."""
    parameter_step_(p, unpack_signs(packed, p.numel()), s, remainder)


def hyper_checksum(hypers: Tensor, salt: int, grad_scale: Tensor | None = None) -> Tensor:
    """A checksum of the bits of a hyper-parameter table and a gradient scale; int64, shape (), wrapping around.

    Args:
        hypers: a hyper-parameter table.
        salt: integer in [0, 2**63), which is added to the checksum.
        grad_scale: float32, shape (). Its bits count as one more element of the table; None adds nothing.
    """
    bits = hypers.flatten().view(torch.int64)
    total = (bits * (2 * torch.arange(bits.numel(), device=bits.device) + 1)).sum() + salt
    if grad_scale is None:
        return total
    return total + grad_scale.view(torch.int32).long() * (2 * bits.numel() + 1)


def sum_of_squares(g: Tensor) -> Tensor:
    """The sum of g*g, each product and sum in float64; float64, shape (). The squares of finite gradients cannot
    overflow, so the sum is infinite only where a gradient is infinite, and NaN only where one is NaN."""
    return g.double().square().sum()


def clip_coefficient(total: Tensor, max_norm: float) -> tuple[Tensor, Tensor]:
    """The gradient norm, and the scalar that brings it to at most max_norm.

    Args:
        total: sum of squares of all gradients, float64, shape ().

    Returns:
        (norm, coefficient), float32, shape (), each computed in float64 and rounded once:
        sqrt(total), and min(1, max_norm / (sqrt(total) + 1e-6)), NaN where total is NaN. As in torch's
        ``clip_grad_norm_``, an infinite total gives 0, so that finite gradients become zeros and infinite ones
        NaN; with an infinite max_norm it gives NaN, and every gradient becomes NaN.
    """
    norm = total.sqrt()
    return norm.float(), (max_norm / (norm + 1e-6)).clamp(max=1.0).float()
