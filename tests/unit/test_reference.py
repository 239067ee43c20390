"""The rule itself, against float64 and against lion_pytorch.

Ten million elements in each of the 27 mixes of dtypes: a float32 sign differs from the exact one about once
in ten million draws, so fewer would not meet one; and one element in a thousand is made to nearly cancel.
Bounds are derived from the number of roundings; none of them could hide a wrong sign, which is 2 * lr.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import lion_pytorch
import pytest
import torch
from torch import Tensor

from lion_dist.update.backends import compiled as compiled_backend
from lion_dist.update.backends.chunks import Chunks, Numbers
from lion_dist.update.lion_update import LionUpdate
from lion_dist.update.reference import (
    NAN_BITS,
    OVERFLOW,
    STORAGE_DTYPES,
    HyperParameters,
    lion_rule,
    lion_step_,
)
from lion_dist.update.segments import StepTensors
from lion_dist.update.state import EXP_AVG
from tests.asserts import assert_canonical_nan, assert_same_bits
from tests.marks import needs_interpreter
from tests.scenarios.mixes import HYPER, scalars_of, step_by

# NumPy, under the interpreter, warns of inf - inf, inf * 0 and what float16 cannot hold: all of it on purpose here.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
MIXES = list(itertools.product(STORAGE_DTYPES, repeat=3))
ELEMENTS = 10_000_000
CHUNK = 1 << 15  # float64 intermediates stay in the cache: 0.4 s a mix instead of 3 s


def name(mix: tuple[torch.dtype, ...]) -> str:
    return "-".join({F32: "fp32", BF16: "bf16", F16: "fp16"}[d] for d in mix)


mixes = pytest.mark.parametrize("mix", MIXES, ids=name)


@pytest.fixture(scope="module")
def draw() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    p, g, m = (torch.randn(ELEMENTS, generator=generator) for _ in range(3))
    m[::1000] = g[::1000] * (-(1 - HYPER.beta1) / HYPER.beta1)  # c is nothing but rounding
    return p, g, m


@mixes
def test_against_float64(draw: tuple[Tensor, Tensor, Tensor], mix: tuple[torch.dtype, ...]) -> None:
    """With u = 2^-24, the float32 unit roundoff, and every bound of first order with 1 % to spare:

    c: one rounding of each scalar, of each product, and of the sum: 3u * (|b1*m| + |(1-b1)*g|).
    m: the same with b2, then half a unit in the last place of its storage.
    p: decay, product and sum are rounded: 3u * |p*decay|; lr and sum: 2u * lr; then its storage.
    Products of normal numbers here do not underflow; the tiny term is for storage subnormals.
    """
    lr, wd, b1, b2, *_ = HYPER
    u = 1.01 * 2.0**-24
    s = scalars_of(HYPER)

    def storage(x: Tensor, dtype: torch.dtype) -> Tensor:
        info = torch.finfo(dtype)
        half_ulp = 1.01 * info.eps / 2
        return (x.abs() * half_ulp + info.smallest_normal * info.eps) if dtype != F32 else x.abs() * 0

    ties = wrong = 0
    for chunks in zip(*(t.split(CHUNK) for t in draw), strict=True):
        p, g, m = (t.to(dtype) for t, dtype in zip(chunks, mix, strict=True))
        got_p, got_m = (t.double() for t in lion_rule(p, g, m, s))
        p, g, m = p.double(), g.double(), m.double()
        c1, c2 = b1 * m, (1 - b1) * g
        c = c1 + c2
        is_tie = c.abs() <= 3 * u * (c1.abs() + c2.abs())
        kept = p * (1 - lr * wd)
        want_p = kept - lr * c.sign()
        bound = u * (3 * kept.abs() + 2 * lr)
        off = (got_p - want_p).abs() > bound + storage(want_p, mix[0])
        # Where the sign may go either way or be 0, p must be what one of the three signs makes.
        at = off.nonzero().reshape(-1)
        for i in at.tolist():
            candidates = kept[i] - lr * torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
            near = (got_p[i] - candidates).abs() <= bound[i] + storage(candidates, mix[0])
            assert is_tie[i], f"sign of {c[i]:.3e} is wrong: p {p[i]} g {g[i]} m {m[i]}"
            assert near.any(), f"p {p[i]} became {got_p[i]}, expected {want_p[i]}"
        wrong += len(at)
        ties += int(is_tie.sum())
        m1, m2 = b2 * m, (1 - b2) * g
        want_m = m1 + m2
        off_m = (got_m - want_m).abs() - (3 * u * (m1.abs() + m2.abs()) + storage(want_m, mix[2]))
        assert off_m.max() <= 0, f"momentum is off by {off_m.max():.3e} more than its roundings"
    assert wrong <= ties
    if mix[1:] == (F32, F32):
        assert ties >= ELEMENTS // 1000  # else the ties that the draw planted were lost, and nothing was tested


@pytest.mark.parametrize("dtype", STORAGE_DTYPES, ids=str)
def test_a_tie_is_decided_by_the_rounded_operations(dtype: torch.dtype) -> None:
    """With exact scalars (b1 = 1/2) every c = 0 is exactly 0, and p only decays."""
    g = torch.randn(1000).to(dtype)
    p, m = torch.ones(1000, dtype=dtype), -g
    lion_step_(p, g, m, scalars_of(HyperParameters(0.25, 0.0, 0.5, 0.5, False)))
    assert_same_bits(p, torch.ones_like(p))
    assert_same_bits(m, torch.zeros_like(m))


def test_each_operation_is_rounded_on_its_own() -> None:
    """A multiply-add fused anywhere would differ in 10 to 20 % of these; NumPy never fuses."""
    import numpy as np

    n = 100_000
    p, g, m = torch.randn(n), torch.randn(n), torch.randn(n)
    hyper = HyperParameters(1e-2, 0.1, 0.9, 0.99, False)
    got_p, got_m = lion_rule(p, g, m, scalars_of(hyper))
    f = np.float32
    decay, lr = f(1 - 1e-2 * 0.1), f(1e-2)
    c = f(0.9) * m.numpy() + f(1 - 0.9) * g.numpy()
    want_p = p.numpy() * decay - lr * np.sign(c)
    want_m = f(0.99) * m.numpy() + f(1 - 0.99) * g.numpy()
    assert want_p.dtype == want_m.dtype == np.float32
    assert_same_bits(got_p, torch.from_numpy(want_p))
    assert_same_bits(got_m, torch.from_numpy(want_m))


def test_against_lion_pytorch() -> None:
    """A hundred steps of a million fp32 weights. lion_pytorch may fuse its multiply-adds, so its momentum drifts
    from ours by roundings; a sign may then differ where |c| is within that drift and its own rounding, and
    from there on that weight differs. Every such weight is caught in the step where it began."""
    n, steps = 1_000_000, 100
    lr, wd, betas = 1e-3, 0.1, (0.9, 0.99)
    ours, theirs = (torch.nn.Parameter(torch.randn(n, generator=torch.Generator().manual_seed(1))) for _ in range(2))
    peer = lion_pytorch.Lion([theirs], lr=lr, weight_decay=wd, betas=betas)
    peer.state[theirs]["exp_avg"] = torch.zeros(n)
    m, s = torch.zeros(n), scalars_of(HyperParameters(lr, wd, *betas, False))
    u = 2.0**-24
    flipped, chunks = torch.zeros(n, dtype=torch.bool), Chunks()
    for _ in range(steps):
        g = torch.randn(n)
        their_m = peer.state[theirs]["exp_avg"]
        c1, c2 = betas[0] * m, (1 - betas[0]) * g
        # Each side rounds c at most three times, and the two momenta differ.
        slack = 8 * u * (c1.abs() + c2.abs()) + betas[0] * (m - their_m).abs()
        tie = (c1 + c2).abs() <= slack
        apart = (ours - theirs).abs()
        with torch.no_grad():
            chunks.lion_step_(ours.detach(), g, m, Numbers.of(s))
        theirs.grad = g
        peer.step()
        began = ((ours - theirs).abs() - apart).abs() > 0.5 * lr  # a wrong sign moves them lr or 2 * lr apart
        assert bool(tie[began].all()), f"a sign differs at {began.nonzero()[~tie[began]][:3].tolist()}, no tie"
        flipped |= began
    apart = ((ours - theirs).abs() / ours.abs().clamp(min=0.01)).detach()
    assert apart[~flipped].max() <= 4 * steps * u  # a few roundings a step, of weights of 0.01 and more
    assert flipped.sum() <= n // 100_000
    drift = (m - peer.state[theirs]["exp_avg"]).abs().max()
    assert drift <= 300 * u  # roundings of |m| < 1, summed over 1 / (1 - b2) steps


# -- Edges, on every backend


def plain(p: Tensor, g: Tensor, m: Tensor, hyper: HyperParameters, scale: Tensor | None = None) -> None:
    lion_step_(p, g, m, scalars_of(hyper, scale))


def chunked(p: Tensor, g: Tensor, m: Tensor, hyper: HyperParameters, scale: Tensor | None = None) -> None:
    step_by(LionUpdate(False), StepTensors([p], [g], {EXP_AVG: [m]}, [0]), [hyper], scale)


@torch.no_grad()  # as LionUpdate.step calls it: the grad mode is one of the things that torch.compile guards
def compiled(p: Tensor, g: Tensor, m: Tensor, hyper: HyperParameters, scale: Tensor | None = None) -> None:
    assert compiled_backend.step_.step([(p, g, m)], torch.stack(scalars_of(hyper, scale))), "torch.compile failed"


def interpreted(p: Tensor, g: Tensor, m: Tensor, hyper: HyperParameters, scale: Tensor | None = None) -> None:
    step_by(LionUpdate(True), StepTensors([p], [g], {EXP_AVG: [m]}, [0]), [hyper], scale)


Backend = Callable[..., None]
# torch.compile takes seconds for each mix, and the interpreter truncates bfloat16 (facts.md): a few mixes each.
UNIFORM = [(F32, F32, F32), (BF16, BF16, BF16), (F16, F16, F32)]
EVERYWHERE = [
    *[pytest.param(plain, mix, id=f"plain-{name(mix)}") for mix in MIXES],
    *[pytest.param(chunked, mix, id=f"chunked-{name(mix)}") for mix in UNIFORM],
    *[pytest.param(compiled, mix, id=f"compiled-{name(mix)}") for mix in UNIFORM],
    *[
        pytest.param(interpreted, mix, id=f"interpreter-{name(mix)}", marks=needs_interpreter)
        for mix in MIXES
        if BF16 not in (mix[0], mix[2])
    ],
]
everywhere = pytest.mark.parametrize(("backend", "mix"), EVERYWHERE)

INF, NAN = math.inf, math.nan
# g, m, beta1 = 0.9 -> sign of c.
SIGNS = [
    (0.0, 0.0, 0.0), (-0.0, -0.0, 0.0), (0.0, -0.0, 0.0), (-0.0, 0.0, 0.0),
    (1.0, 0.0, 1.0), (-1.0, 0.0, -1.0), (0.0, 2.0, 1.0), (-0.0, -2.0, -1.0), (8.0, -1.0, -1.0), (10.0, -1.0, 1.0),
    (INF, 0.0, NAN), (-INF, 0.0, NAN), (0.0, INF, NAN), (1.0, -INF, NAN), (INF, INF, NAN),
    (INF, -INF, NAN), (-INF, INF, NAN), (NAN, 0.0, NAN), (0.0, NAN, NAN), (NAN, NAN, NAN), (NAN, INF, NAN),
]  # fmt: skip


@everywhere
def test_signs_infinities_and_nan(backend: Backend, mix: tuple[torch.dtype, ...]) -> None:
    """lr = 0.5 and weights of 2 are exact in every dtype. 150 copies: a whole block of 2048 and a masked one."""
    table = torch.tensor(SIGNS).repeat(150, 1)
    p = torch.full((len(table),), 2.0, dtype=mix[0])
    g, m, sign = table[:, 0].to(mix[1]).contiguous(), table[:, 1].to(mix[2]).contiguous(), table[:, 2]
    backend(p, g, m, HyperParameters(0.5, 0.0, 0.9, 0.99, False))
    finite = ~sign.isnan()
    assert_same_bits(p[finite], (2 - 0.5 * sign[finite]).to(mix[0]))
    assert_canonical_nan(p, sign.isnan(), "p")
    assert_canonical_nan(m, sign.isnan(), "m")  # with p, and nowhere else
    zero = table[:, :2].abs().sum(dim=1) == 0
    assert bool((m[zero] == 0).all())


@pytest.mark.parametrize("dtype", STORAGE_DTYPES, ids=str)
def test_the_least_number_that_overflows(dtype: torch.dtype) -> None:
    """Torch rounds OVERFLOW to infinity, and the float32 below it to the largest finite number."""
    least = torch.tensor(OVERFLOW[dtype], dtype=F32)
    assert least.double() == OVERFLOW[dtype]
    for sign in (1, -1):
        assert (sign * least).to(dtype) == sign * INF
        assert (sign * least.nextafter(torch.tensor(0.0))).to(dtype) == sign * torch.finfo(dtype).max


@everywhere
def test_a_momentum_that_overflows_its_dtype(backend: Backend, mix: tuple[torch.dtype, ...]) -> None:
    """With beta2 = 0 the new momentum is the scaled gradient, and c half of it is finite. The weight becomes NaN where
    the momentum rounds to infinity in its dtype, and stays a number at the last float32 that does not."""
    hyper, n = HyperParameters(0.5, 0.0, 0.5, 0.0, False), 2100
    least, largest = torch.tensor(OVERFLOW[mix[2]]), torch.finfo(mix[2]).max
    g = torch.ones(n, dtype=mix[1])
    g[::3] = -1
    for maximize in (False, True):
        sign = -g.float() if maximize else g.float()
        p, m = torch.full((n,), 2.0, dtype=mix[0]), torch.zeros(n, dtype=mix[2])
        backend(p, g, m, hyper._replace(maximize=maximize), least.nextafter(torch.tensor(0.0)))
        assert_same_bits(p, (2 - 0.5 * sign).to(mix[0]), "p")
        assert_same_bits(m, (sign * largest).to(mix[2]), "m")
        backend(p, g, m, hyper._replace(maximize=maximize), least)
        everywhere_ = torch.ones(n, dtype=torch.bool)
        assert_canonical_nan(p, everywhere_, "p")
        assert_canonical_nan(m, everywhere_, "m")


@everywhere
def test_near_ties_fall_alike(backend: Backend, mix: tuple[torch.dtype, ...]) -> None:
    """c is nothing but rounding in half of these, so another rounding of a scalar or of a product would change
    signs that random numbers never show. A gradient of few bits keeps the half in every dtype."""
    n = 5000
    p, g, m = torch.zeros(n, dtype=mix[0]), torch.randint(-128, 128, (n,)).to(mix[1]), torch.zeros(n, dtype=mix[2])
    b1 = 2 / 3  # b1*m + (1-b1)*g with m = -g/2: exactly 0 but for the scalars' own roundings
    m.copy_(g.float() / -2)
    m[::2] += torch.randn(m[::2].shape).to(m.dtype)
    hyper = HyperParameters(0.25, 0.0, b1, 0.99, False)
    want_p, want_m = lion_rule(p, g, m, scalars_of(hyper))
    backend(p, g, m, hyper)
    assert_same_bits(p, want_p, "p")
    assert_same_bits(m, want_m, "m")


def payloads(dtype: torch.dtype) -> Tensor:
    """NaNs that are not the canonical one, infinities, zeros, subnormals."""
    integer, canonical = NAN_BITS[dtype]
    quiet = {F32: 0x7FC00000, BF16: 0x7FC0, F16: 0x7E00}[dtype]
    assert quiet == canonical
    step = {F32: 0x1234, BF16: 0x11, F16: 0x111}[dtype]
    values = [canonical + step, canonical + 1, canonical, 1, 0, canonical - 1]
    negative = [v - (1 << (31 if dtype == F32 else 15)) for v in values]
    return torch.tensor(values + negative, dtype=integer).view(dtype)


@everywhere
def test_lr_of_zero_writes_no_parameter(backend: Backend, mix: tuple[torch.dtype, ...]) -> None:
    p = payloads(mix[0]).repeat(400)
    before = p.clone()
    n = len(p)
    g, m = torch.randn(n).to(mix[1]), torch.randn(n).to(mix[2])
    g[::7], g[1::7], g[2::7] = NAN, INF, -INF
    want_m = lion_rule(torch.ones(n), g, m, scalars_of(HYPER))[1]
    backend(p, g, m, HYPER._replace(lr=0.0))
    assert_same_bits(p, before, "p")
    assert_same_bits(m, want_m, "m")


@everywhere
def test_nan_in_the_parameter_stays_and_is_canonical(backend: Backend, mix: tuple[torch.dtype, ...]) -> None:
    p = payloads(mix[0]).repeat(400)
    nan = p.isnan()
    m = torch.ones(len(p), dtype=mix[2])
    backend(p, torch.ones(len(p), dtype=mix[1]), m, HYPER)
    assert_canonical_nan(p, nan, "p")
    assert not m.isnan().any()


@everywhere
def test_maximize_is_the_negated_gradient(backend: Backend, mix: tuple[torch.dtype, ...]) -> None:
    p, g, m = (torch.randn(3001).to(d) for d in mix)
    p2, m2 = p.clone(), m.clone()
    backend(p, g, m, HYPER._replace(maximize=True))
    backend(p2, -g, m2, HYPER)
    assert_same_bits(p, p2, "p")
    assert_same_bits(m, m2, "m")
    assert not torch.equal(p, torch.zeros_like(p))
