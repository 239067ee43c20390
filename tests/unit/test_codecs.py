"""The codecs of master weights and of 8-bit momenta, bit for bit."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from lion_dist.update import codecs
from lion_dist.update.codecs import (
    BLOCK,
    LARGEST_LEVEL,
    NAN_CODE,
    NEAREST,
    SCALE_BITS,
    SMALLEST_SCALE,
    decode,
    encode,
    join,
    seed_of,
    split,
)
from tests.asserts import assert_same_bits

CANONICAL_NAN = 0x7FC00000
LARGEST_SCALE = (2.0**128 - 2.0**104) / LARGEST_LEVEL


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def floats_of(bits: Tensor) -> Tensor:
    """The float32 numbers of bits in [0, 2**32)."""
    return torch.where(bits >= 1 << 31, bits - (1 << 32), bits).to(torch.int32).view(torch.float32)


def seed(step: int) -> Tensor:
    return torch.tensor(seed_of(step))


# -- Master weights


@pytest.fixture(scope="module")
def masters() -> Tensor:
    """Random bits, and every 16-bit half beside awkward other halves: ties, denormals, infinities, NaN."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(1 << 32, (1 << 20,), generator=generator)
    halves = torch.arange(1 << 16)
    low = [halves + (high << 16) for high in (0, 1, 0x7F, 0x80, 0x3F80, 0x7F7F, 0x7F80, 0x8000, 0x807F, 0xFF7F, 0xFF80)]
    high = [(halves << 16) + low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]
    return floats_of(torch.cat([drawn, *low, *high]))


def test_parts_of_a_master_weight_give_it_back(masters: Tensor) -> None:
    p, remainder = split(masters)
    assert p.dtype == torch.bfloat16
    assert remainder.dtype == torch.int16
    canonical = floats_of(torch.full(masters.shape, CANONICAL_NAN))
    assert_same_bits(join(p, remainder), torch.where(masters.isnan(), canonical, masters), "joined")


def test_a_parameter_is_its_master_weight_rounded_half_away(masters: Tensor) -> None:
    masters = masters[~masters.isnan()]
    p, remainder = split(masters)
    toward_zero = (masters.view(torch.int32) & -0x10000).view(torch.float32)
    away = torch.nextafter(toward_zero.bfloat16(), masters.sign().bfloat16() * math.inf)
    distance = masters.double() - toward_zero.double()
    step = torch.where(away.isinf(), 2.0**120, (away.double() - toward_zero.double()).abs())  # as if exponents went on
    expected = torch.where(distance.abs() < step / 2, toward_zero.bfloat16(), away)
    expected = torch.where((distance == 0) | masters.isinf(), masters.bfloat16(), expected)
    assert_same_bits(p, expected, "rounded")
    # Nothing that join would take for a zero written by other code.
    assert not ((p == 0) & (remainder < 0)).any()


def test_a_zero_that_others_wrote() -> None:
    """Its remainder is that of the weight that was there. A negative one would make it NaN."""
    remainder = torch.tensor([-1, -32768, -5, -5, 7, 7, 0, 0], dtype=torch.int16)
    p = torch.tensor([0.0, 0.0, 0.0, -0.0, 0.0, -0.0, 0.0, -0.0], dtype=torch.bfloat16)
    tiny = 7 * 2.0**-149
    assert_same_bits(join(p, remainder), torch.tensor([0.0, 0.0, 0.0, -0.0, tiny, -tiny, 0.0, -0.0]))


def test_nan_has_no_remainder() -> None:
    p, remainder = split(floats_of(torch.tensor([0x7F800001, 0x7FFF8001, 0xFFFFFFFF, 0xFF80FFFF, CANONICAL_NAN])))
    assert set(p.view(torch.int16).tolist()) == {0x7FC0}
    assert not remainder.any()


# -- 8-bit momentum

EVERY_CODE = torch.arange(-127, 128, dtype=torch.int8)


def scales(count: int) -> Tensor:
    """Scales from the smallest to the largest, of which most have SCALE_BITS significant bits."""
    generator = torch.Generator().manual_seed(1)
    exponents = torch.linspace(-126, 119, count).round().double()
    mantissas = torch.randint(1 << (SCALE_BITS - 1), 1 << SCALE_BITS, (count,), generator=generator).double()
    largest = math.floor(LARGEST_SCALE / 2.0 ** (120 - SCALE_BITS + 1)) * 2.0 ** (120 - SCALE_BITS + 1)
    powers = torch.tensor([SMALLEST_SCALE, 2.0**-100, 1.0, 2.0**120, largest], dtype=torch.float64)
    return torch.cat([2**exponents * (mantissas / 2 ** (SCALE_BITS - 1)), powers]).float()


def test_encoding_a_decoded_momentum_loses_nothing() -> None:
    """Every level at every place of a block, over all scales."""
    scale = scales(500)
    generator = torch.Generator().manual_seed(2)
    codes = torch.randint(-127, 128, (len(scale), BLOCK), generator=generator).to(torch.int8)
    codes[torch.arange(len(scale)), torch.arange(len(scale)) % BLOCK] = 127
    codes[::2] *= -1
    codes[::3, 5] = NAN_CODE
    codes[::3, 6] = 127
    m = decode(codes.flatten(), scale)
    assert m.abs().nan_to_num().max() < math.inf
    again, scale_again = encode(m, seed=NEAREST)
    assert_same_bits(scale_again, scale, "scales")
    assert_same_bits(again, codes.flatten(), "codes")


@pytest.mark.parametrize("numel", [1, 127, 128, 129, 1000])
def test_encoding_any_momentum_twice_is_encoding_it_once(numel: int) -> None:
    for power, step in itertools.product((-149, -133, -126, -100, -20, 0, 60, 126), range(3)):
        m = random(numel, seed=step).clamp(-1.99, 1.99) * 2.0**power
        codes, scale = encode(m, seed=seed(step))
        again, scale_again = encode(decode(codes, scale))
        assert_same_bits(again, codes, f"codes at 2**{power}")
        # Below a sixteenth of the smallest scale a whole block may become 0, whose scale is 0 then.
        alive = torch.nn.functional.pad(codes, (0, -numel % BLOCK)).view(-1, BLOCK).any(1)
        assert_same_bits(scale_again, torch.where(alive, scale, 0.0), f"scales at 2**{power}")
        if power >= -100:
            assert alive.all()
            assert (torch.nn.functional.pad(codes, (0, -numel % BLOCK)).view(-1, BLOCK).abs().amax(1) == 127).all()


def test_levels() -> None:
    """As the module's note says: the floats of 4 fraction bits from 1 on, less 1."""
    w = [2**exponent * (1 + fraction / 16) for exponent in range(8) for fraction in range(16)]
    levels = torch.tensor([x - 1 for x in w])
    codes = torch.arange(128, dtype=torch.int8)
    assert_same_bits(decode(codes, torch.ones(1)), levels)
    assert_same_bits(decode(-codes[1:], torch.ones(1)), -levels[1:])
    assert levels[-1] == LARGEST_LEVEL


def test_nearest_is_nearest() -> None:
    """In units of the scale; halves away from zero. A block's largest sets the scale."""
    levels = decode(torch.arange(128, dtype=torch.int8), torch.ones(1))
    middles = (levels[1:] + levels[:-1]) / 2
    for nudge, expected in ((0.0, 1), (-1e-3, 0), (1e-3, 1)):
        x = middles * (1 + nudge)
        blocks = torch.cat([x[:64], levels[-1:].expand(64), x[64:], levels[-1:].expand(65)])
        codes, scale = encode(blocks)
        assert (scale == 1).all()
        got = torch.cat([codes[:64], codes[128:191]])
        assert torch.equal(got, torch.arange(127, dtype=torch.int8) + expected)
        assert torch.equal(encode(-blocks)[0], -codes)


def test_levels_stay_under_every_dither() -> None:
    """So a momentum whose gradients agree with it does not wander. (At scales that are no powers of two the quotient is
    rounded, and one dither in 2**19 may move a level.)"""
    codes = torch.nn.functional.pad(EVERY_CODE.view(-1, 5), (0, BLOCK - 5), value=127).flatten()
    for power in (-126, -60, 0, 100):
        m = decode(codes, torch.full((51,), 2.0**power))
        extremes = [0, 1, (1 << 32) - 1, 1 << 31, (1 << 32) - (1 << 13), 1 << 13]
        for value in [*extremes, *map(seed_of, range(20))]:
            again, _ = encode(m, seed=torch.tensor(value))
            assert_same_bits(again, codes, f"seed {value}, scale 2**{power}")
    scale = scales(46)  # and five more
    m = decode(codes, scale)
    for step in range(20):
        again, scale_again = encode(m, seed=seed(step))
        assert_same_bits(again, codes, f"step {step}")
        assert_same_bits(scale_again, scale, f"step {step}")


def test_rounding_is_unbiased() -> None:
    """The mean over many seeds is within 6 of its own standard deviations, at each of 1000 elements."""
    seeds, m = 500, random(1000, seed=4)
    m[::7] *= 1e-3
    mean = torch.stack([decode(*encode(m, seed=seed(step))) for step in range(seeds)]).double().mean(0)
    x, scale = m.double().abs(), encode(m)[1].double().repeat_interleave(BLOCK)[:1000]
    gap = 2 ** ((x / scale + 1).log2().floor() - 4)  # of the levels below and above
    fraction = (x / scale + 1) / gap % 1
    deviation = (fraction * (1 - fraction) / seeds).sqrt()
    # A fraction near 0 or 1 is a binomial of small mean, which some draws exceed. The largest of a block is cut to the
    # last level: a scale has SCALE_BITS bits.
    bound = (6 * deviation + 5 / seeds) * gap * scale + x * 2.0 ** (1 - SCALE_BITS)
    away = (mean - m.double()).abs()
    assert (away <= bound).all(), (away / bound).max()
    # Of a normal distribution the mean is 0.8 deviations.
    assert (away / (gap * scale)).mean() < deviation.mean()


def test_seeds_of_steps() -> None:
    seeds = torch.tensor([seed_of(step) for step in range(10_000)])
    assert len(seeds.unique()) == len(seeds)
    assert seeds.min() >= 0
    assert seeds.max() < 1 << 32
    bits = (seeds[:, None] >> torch.arange(32)) & 1
    assert ((bits.double().mean(0) - 0.5).abs() < 5 * 0.5 / 100).all(), "each bit should be set in half of them"
    uniform = seeds.double() / 2**32
    for lag in (1, 2, 64):
        together = torch.corrcoef(torch.stack([uniform[lag:], uniform[:-lag]]))[0, 1]
        assert abs(together) < 5 / 100, lag
    assert seed_of(0) != 0


def test_steps_and_elements_round_each_in_their_way() -> None:
    m = torch.full((512,), 3.125)  # halfway between two levels, at a scale of 1
    m[::BLOCK] = LARGEST_LEVEL
    inside = torch.arange(512) % BLOCK != 0
    codes = torch.stack([encode(m, seed=seed(step))[0] for step in range(64)])[:, inside].double()
    up = codes - codes.min()
    assert set(up.unique().tolist()) == {0.0, 1.0}
    assert ((up.mean(1) - 0.5).abs() < 0.1).all(), "within a step, numbers are spread evenly"
    assert ((up.mean(0) - 0.5).abs() < 6 * 0.5 / 8).all(), "for an element, those of the steps are independent"
    assert len({tuple(row.tolist()) for row in up}) > 60


def test_codes_depend_on_the_place_in_the_parameter_alone() -> None:
    """Ranks that hold parts, cut at multiples of 128, round as one that holds the whole."""
    m = random(1000, seed=5)
    for step in (0, 1, 12345):
        codes, scale = encode(m, seed=seed(step))
        for begin, end in itertools.combinations((0, 128, 384, 896, 1000), 2):
            part, part_scale = encode(m[begin:end], seed=seed(step), first=begin)
            assert_same_bits(part, codes[begin:end], f"[{begin}, {end})")
            assert_same_bits(part_scale, scale[begin // BLOCK : -(-end // BLOCK)], f"[{begin}, {end})")
    assert not torch.equal(encode(m, seed=seed(0))[0], encode(m, seed=seed(0), first=BLOCK)[0])
    # The index counts modulo 2**32, as kernels compute.
    for far in (1 << 32, 1 << 40):
        assert_same_bits(encode(m, seed=seed(0), first=far + 256)[0], encode(m, seed=seed(0), first=256)[0])


@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("step", [None, 3])
def test_what_is_not_a_number_is_marked_and_leaves_its_block_alone(value: float, step: int | None) -> None:
    which = None if step is None else seed(step)
    m = random(300, seed=6)
    m[128:256] = value
    m[[3, 299]] = value
    without = torch.where(m.isfinite(), m, 0.0)
    codes, scale = encode(m, seed=which)
    expected, expected_scale = encode(without, seed=which)
    assert_same_bits(scale, expected_scale)
    assert_same_bits(codes, torch.where(m.isfinite(), expected, torch.tensor(NAN_CODE, dtype=torch.int8)))
    assert torch.equal(decode(codes, scale).isnan(), ~m.isfinite())
    assert scale[1] == 0


def test_numbers_that_count_as_none() -> None:
    """The rule marks finite momenta too, where the blend is not finite."""
    m, is_number = random(200, seed=7), torch.ones(200, dtype=torch.bool)
    m[10] = 1e30
    is_number[[10, 150]] = False
    codes, scale = encode(m, is_number)
    assert codes[[10, 150]].tolist() == [NAN_CODE] * 2
    assert_same_bits(scale, encode(torch.where(is_number, m, 0.0))[1])
    assert (codes == NAN_CODE).sum() == 2


@pytest.mark.parametrize("step", [None, 0, 1])
def test_zeros(step: int | None) -> None:
    m = random(5 * BLOCK, seed=8).view(5, BLOCK)
    m[1::2] = 0.0
    m[3, ::2] = -0.0
    codes, scale = encode(m.flatten(), seed=None if step is None else seed(step))
    assert not codes.view(5, BLOCK)[1::2].any()
    assert scale[1::2].tolist() == [0.0, 0.0]
    assert_same_bits(decode(codes, scale).view(5, BLOCK)[1::2], torch.zeros(2, BLOCK))
    m[0, :64] = 0.0  # beside numbers
    assert not encode(m.flatten(), seed=None if step is None else seed(step))[0][:64].any()


@pytest.mark.parametrize("numel", [0, 1, 127, 129, 255, 300])
@pytest.mark.parametrize("step", [None, 2])
def test_the_last_block_may_be_short(numel: int, step: int | None) -> None:
    m, which = random(numel, seed=9), None if step is None else seed(step)
    codes, scale = encode(m, seed=which)
    assert codes.shape == (numel,)
    assert scale.shape == (-(-numel // BLOCK),)
    padded = torch.nn.functional.pad(m, (0, -numel % BLOCK))
    whole, whole_scale = encode(padded, seed=which)
    assert_same_bits(codes, whole[:numel])
    assert_same_bits(scale, whole_scale)
    assert_same_bits(decode(codes, scale), decode(whole, whole_scale)[:numel])


def test_the_largest_element_has_the_last_code_with_every_scale() -> None:
    """The inverse of a scale is rounded; with one scale in seven its product with the last level would be short, and a
    dither of 0 would then give code 126."""
    scales = torch.arange(1 << 15, 1 << 16).float() * 2.0**-20
    index = torch.arange(len(scales)) * codecs.BLOCK
    blocks = torch.zeros(len(scales), codecs.BLOCK)
    blocks[:, 0] = codecs.LARGEST_LEVEL * scales
    blocks[:, 1] = -0.3 * blocks[:, 0]
    for first in range(0, len(scales), 4096):  # a seed for one block of each part has dither 0 there
        some = blocks[first : first + 4096].flatten()
        seed = -(index[first] * codecs.GOLDEN) & 0xFFFFFFFF
        codes, scale = codecs.encode(some, seed=seed, first=int(index[first]))
        assert (codes.view(-1, codecs.BLOCK)[:, 0] == 127).all()
        assert_same_bits(scale, scales[first : first + 4096])
    short = [s for s in scales[::7] if codecs.LARGEST_LEVEL * s * (1 / s) + 1 < codecs.LAST_W]
    assert len(short) > 100
    for s in short[::10]:
        block = torch.zeros(codecs.BLOCK)
        block[5] = codecs.LARGEST_LEVEL * s
        codes, _ = codecs.encode(block, seed=torch.tensor(-(5 * codecs.GOLDEN) & 0xFFFFFFFF))
        assert codes[5] == 127
