"""The scalars of a step: rounding of hyper-parameters, and the clipping coefficient."""

from __future__ import annotations

import math

import pytest
import torch

from lion_dist.update.reference import (
    HyperParameters,
    clip_coefficient,
    lion_rule,
    lion_step_,
    sum_of_squares,
)
from tests.asserts import assert_canonical_nan, assert_same_bits
from tests.scenarios.mixes import HYPER, scalars_of

# NumPy, under the interpreter, warns of inf - inf, inf * 0 and what float16 cannot hold: all of it on purpose here.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")


INF, NAN = math.inf, math.nan


def test_scalars_are_rounded_once_from_float64() -> None:
    lr, wd, b1, b2 = 1e-3, 0.1, 0.9, 0.99
    s = scalars_of(HyperParameters(lr, wd, b1, b2, True))
    expected = (lr, 1 - lr * wd, b1, 1 - b1, b2, 1 - b2, -1.0)
    for got, value in zip(s, expected, strict=True):
        assert got.shape == ()
        assert_same_bits(got, torch.tensor(value, dtype=torch.float64).float())
    # 1 - b1 computed in float32 is another number: the test above would see it.
    assert torch.tensor(1.0) - torch.tensor(b1) != s.one_minus_beta1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_an_lr_tensor_is_taken_as_exact(dtype: torch.dtype) -> None:
    """float32(0.3) is not 0.3: with weight decay 0.7 the factor rounds differently from that of the Python number."""
    lr = torch.tensor(0.3, dtype=dtype)
    as_tensor, as_number = (scalars_of(HYPER._replace(lr=x, weight_decay=0.7)) for x in (lr, lr.item()))
    for a, b in zip(as_tensor, as_number, strict=True):
        assert_same_bits(a, b)
    want = torch.tensor(1 - lr.item() * 0.7, dtype=torch.float64).float()
    assert_same_bits(as_tensor.decay, want)
    assert_same_bits(scalars_of(HYPER._replace(lr=lr.reshape(1), weight_decay=0.7)).decay, want)


@pytest.mark.parametrize("value", [0.25, 1.0, 3.0, 1 / 3, -2.0])
def test_grad_scale_is_multiplied_in_float32(value: float) -> None:
    p, g, m = torch.randn(1000), torch.randn(1000), torch.randn(1000)
    scale = torch.tensor(value)
    got = lion_rule(p, g, m, scalars_of(HYPER, scale))
    want = lion_rule(p, g * scale, m, scalars_of(HYPER))
    for a, b in zip(got, want, strict=True):
        assert_same_bits(a, b)


def test_weight_decay_is_multiplied_by_lr() -> None:
    p = torch.tensor([1.0, -4.0, 1024.0])
    lion_step_(p, torch.zeros(3), torch.zeros(3), scalars_of(HyperParameters(0.25, 0.5, 0.9, 0.99, False)))
    assert_same_bits(p, torch.tensor([0.875, -3.5, 896.0]))


@pytest.mark.parametrize(
    ("total", "max_norm", "norm", "coefficient"),
    [
        (4.0, 1.0, 2.0, 1 / (2 + 1e-6)),
        (1e-4, 1.0, 1e-2, 1.0),
        (0.0, 1.0, 0.0, 1.0),
        (0.0, 0.0, 0.0, 0.0),
        (9.0, 0.0, 3.0, 0.0),
        (9.0, INF, 3.0, 1.0),
        (INF, 1.0, INF, 0.0),
        (INF, INF, INF, NAN),
        (NAN, 1.0, NAN, NAN),
        (NAN, INF, NAN, NAN),
        (1e80, 1.0, INF, 0.0),  # beyond float32: the norm reads inf, and 1e-40 is subnormal in float32
        (1e-80, 1.0, 1e-40, 1.0),
    ],
)
def test_clip_coefficient(total: float, max_norm: float, norm: float, coefficient: float) -> None:
    got_norm, got = clip_coefficient(torch.tensor(total, dtype=torch.float64), max_norm)
    if total == 1e80:
        coefficient = 1 / (1e40 + 1e-6)
    for x, value in ((got_norm, norm), (got, coefficient)):
        assert x.shape == ()
        assert x.dtype == torch.float32
        if math.isnan(value):
            assert x.isnan()
        else:
            assert_same_bits(x, torch.tensor(value, dtype=torch.float64).float())


@pytest.mark.parametrize("bad", [INF, -INF])
def test_an_infinite_norm_is_loud(bad: float) -> None:
    """Its coefficient is 0: finite gradients vanish, but inf * 0 is NaN, and the weight shows it. With an infinite
    max_norm it is NaN. Gradients come out as torch's clip_grad_norm_ leaves them."""
    for max_norm, nan in ((1.0, [False, True]), (INF, [True, True])):
        g = torch.tensor([1.0, bad])
        norm, coefficient = clip_coefficient(sum_of_squares(g), max_norm)
        assert norm == INF
        p, m = torch.ones(2), torch.zeros(2)
        lion_step_(p, g, m, scalars_of(HYPER._replace(weight_decay=0.0), coefficient))
        assert_canonical_nan(p, torch.tensor(nan), "p")
        assert_canonical_nan(m, torch.tensor(nan), "m")
        assert p[0].isnan() or (p[0] == 1 and m[0] == 0)
        theirs = torch.nn.Parameter(torch.ones(2))
        theirs.grad = g.clone()
        torch.nn.utils.clip_grad_norm_([theirs], max_norm)
        assert torch.equal(theirs.grad.isnan(), (g * coefficient).isnan())
