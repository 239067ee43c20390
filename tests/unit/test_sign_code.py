"""The 2-bit code of signs, and the rule's two halves."""

from __future__ import annotations

import math

import pytest
import torch

from lion_dist.update import reference
from lion_dist.update.hypers import hyper_table
from lion_dist.update.reference import pack_signs, unpack_signs
from tests.asserts import assert_same_bits
from tests.scenarios.mixes import HYPERS, MIXES, Mix, awkward, name

# NumPy, under the interpreter, warns of inf - inf, inf * 0 and what float16 cannot hold: all of it on purpose here.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")

CPU = torch.device("cpu")
NAN, INF = math.nan, math.inf
LENGTHS = [*range(10), 127, 129]


# -- The code


def test_codes_byte_by_byte() -> None:
    """Element i of a group of four in bits 2i and 2i + 1; zeros behind the last."""
    for sign, code in [(0.0, 0b00), (-0.0, 0b00), (1.0, 0b01), (-1.0, 0b10), (NAN, 0b11), (-NAN, 0b11)]:
        for i in range(4):
            alone = torch.zeros(4)
            alone[i] = sign
            assert pack_signs(alone).tolist() == [code << 2 * i]
    assert pack_signs(torch.tensor([1.0, -1.0, NAN, 0.0, -1.0])).tolist() == [0b00_11_10_01, 0b10]
    assert pack_signs(torch.zeros(0)).tolist() == []
    unpacked = unpack_signs(torch.tensor([0b11_10_01_00, 0b01], dtype=torch.uint8), 5)
    assert_same_bits(unpacked, torch.tensor([0.0, 1.0, -1.0, NAN, 1.0]))


@pytest.mark.parametrize("n", LENGTHS)
def test_round_trip(n: int) -> None:
    """Against arithmetic on Python's integers, at every length that ends a byte otherwise."""
    codes = torch.randint(4, (n,))
    sign = torch.tensor([0.0, 1.0, -1.0, NAN])[codes]
    packed = pack_signs(sign)
    assert packed.dtype == torch.uint8
    number = sum(code << 2 * i for i, code in enumerate(codes.tolist()))
    assert bytes(packed.tolist()) == number.to_bytes(-(-n // 4), "little")
    assert_same_bits(unpack_signs(packed, n), sign)
    garbage = torch.cat([packed, torch.tensor([0xFF], dtype=torch.uint8)])
    assert_same_bits(unpack_signs(garbage, n), sign, "what lies behind is not read")


# -- The halves


@pytest.mark.parametrize("grad_scale", [None, 0.37, -1.0, 1e38, NAN])
@pytest.mark.parametrize("mix", MIXES, ids=name)
def test_two_halves_give_the_bits_of_the_rule(mix: Mix, grad_scale: float | None) -> None:
    """Five groups' hyper-parameters: maximize, lr = 0, an lr tensor, betas of 0."""
    generator = torch.Generator().manual_seed(0)
    scale = None if grad_scale is None else torch.tensor(grad_scale)
    hypers = [*HYPERS, HYPERS[0]._replace(lr=1e-50)]  # the last is 0 in float32
    for row in hyper_table(hypers, CPU):
        s = reference.scalars(row, scale)
        p, g, m = (awkward((997,), dtype, generator) for dtype in mix)
        want_p, want_m = reference.lion_rule(p, g, m, s)
        sign, new_m = reference.momentum_rule(g, m, s)
        assert_same_bits(new_m, want_m, "momentum")
        assert_same_bits(reference.parameter_rule(p, sign, s), want_p, "parameter")
        before, packed = p.clone(), torch.empty(250, dtype=torch.uint8)
        reference.sign_step_(g, m, packed, s)
        assert_same_bits(m, want_m, "momentum, in place")
        assert_same_bits(p, before, "the parameter is not the owner's half to write")
        reference.apply_signs_(p, packed, s)
        assert_same_bits(p, want_p, "parameter, by packed signs")
