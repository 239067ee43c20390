"""The sum of squares of gradients, on every backend."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lion_dist.update.lion_update import LionUpdate
from lion_dist.update.reference import (
    STORAGE_DTYPES,
    sum_of_squares,
)
from lion_dist.update.segments import StepTensors
from lion_dist.update.state import EXP_AVG
from tests.asserts import bits
from tests.scenarios.mixes import both, squares_by

# NumPy, under the interpreter, warns of inf - inf, inf * 0 and what float16 cannot hold: all of it on purpose here.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@both
@pytest.mark.parametrize("dtype", STORAGE_DTYPES, ids=str)
def test_sum_of_squares(use_triton: bool, dtype: torch.dtype) -> None:
    """Small integers: every order of the sums is exact, so both must give the integer itself. Sums beyond 2^24
    would show an accumulation in float32."""
    shapes = [(1,), (2047,), (8193,), (20000,), (37, 19)]
    grads: list[Tensor | None] = [torch.randint(-200, 201, shape).to(dtype) for shape in shapes]
    grads[3][::3] = 255  # type: ignore[index]
    expected = sum(int(g.long().square().sum()) for g in grads if g is not None)
    assert expected > 1 << 26
    params, exp_avgs = ([torch.zeros(shape) for shape in shapes] for _ in range(2))
    columns = StepTensors(params, [*grads, None], {EXP_AVG: exp_avgs}, [0] * len(shapes))
    columns.params, columns.state = [*params, torch.zeros(9)], {EXP_AVG: [*exp_avgs, torch.zeros(9)]}
    columns.groups = [0] * 6
    total = squares_by(LionUpdate(use_triton), columns)
    assert total is not None
    assert total.dtype == torch.float64
    assert total.shape == ()
    assert total.item() == expected


@both
def test_sum_of_squares_of_nothing(use_triton: bool) -> None:
    assert squares_by(LionUpdate(use_triton), StepTensors([], [], {EXP_AVG: []}, [])) is None
    inactive = StepTensors([torch.zeros(5)], [None], {EXP_AVG: [torch.zeros(5)]}, [0])
    total = squares_by(LionUpdate(use_triton), inactive)
    assert total is None or total.item() == 0


@both
@pytest.mark.parametrize("dtype", STORAGE_DTYPES, ids=str)
def test_sum_of_squares_of_infinite_gradients(use_triton: bool, dtype: torch.dtype) -> None:
    """Infinite where a gradient is, NaN where one is NaN, and finite for the largest finite gradients."""
    largest = torch.finfo(dtype).max
    for special, expected in ((largest, None), (math.inf, math.inf), (-math.inf, math.inf), (math.nan, math.nan)):
        g = torch.full((2049,), largest, dtype=dtype)
        g[2048] = special
        total = squares_by(
            LionUpdate(use_triton), StepTensors([torch.zeros(2049)], [g], {EXP_AVG: [torch.zeros(2049)]}, [0])
        )
        assert total is not None
        if expected is None:
            assert total.item() == pytest.approx(2049 * largest**2, rel=1e-12)
        else:
            assert total.item() == pytest.approx(expected, nan_ok=True)


INF, NAN = math.inf, math.nan


def test_sum_of_squares_is_exact_in_float64() -> None:
    g = torch.tensor([3.0e30, -4.0e30])  # their squares are beyond float32
    assert sum_of_squares(g) == g[0].double().square() + g[1].double().square()
    assert sum_of_squares(torch.zeros(0)) == 0
    assert bits(sum_of_squares(torch.tensor([NAN]))).dtype == torch.int64
    assert sum_of_squares(torch.tensor([1.0, NAN])).isnan()
    assert sum_of_squares(torch.tensor([1.0, -INF])) == INF
    assert sum_of_squares(torch.tensor([INF, NAN])).isnan()
    largest = torch.full((1000,), torch.finfo(F32).max)
    assert sum_of_squares(largest).isfinite()
