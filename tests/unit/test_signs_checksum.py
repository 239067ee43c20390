"""The checksum of hyper-parameters, which travels behind the signs."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lion_dist.update import reference
from lion_dist.update.hypers import hyper_table
from lion_dist.update.lion_update import LionUpdate
from lion_dist.update.reference import HYPER_COLUMNS, HyperParameters
from lion_dist.update.segments import Segment, StepTensors
from lion_dist.update.state import EXP_AVG
from tests.scenarios.exchanged_signs import ExchangedSigns
from tests.scenarios.mixes import both

# NumPy, under the interpreter, warns of inf - inf, inf * 0 and what float16 cannot hold: all of it on purpose here.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")

CPU = torch.device("cpu")
NAN, INF = math.nan, math.inf
SALT = 1 << 62 | 12345


def of_kernel(
    hypers: list[HyperParameters], salt: int, use_triton: bool = True, grad_scale: Tensor | None = None
) -> int:
    """The number that `pack` writes behind the signs."""
    update = ExchangedSigns(LionUpdate(use_triton), 128, 0, [[(0, 0, 0, 100)]], CPU)
    columns = StepTensors(
        [torch.ones(100)], [torch.ones(100)], {EXP_AVG: [torch.zeros(128)]}, [0], [Segment(0, 0, 0, 0, 100)]
    )
    update.pack(columns, hypers, grad_scale, salt)
    return int(update.rows[0, 128 // 4 :][:8].view(torch.int64))


def of_definition(hypers: list[HyperParameters], salt: int, grad_scale: Tensor | None = None) -> int:
    return int(reference.hyper_checksum(hyper_table(hypers, CPU), salt, grad_scale))


ONE = [HyperParameters(1e-3, 0.1, 0.9, 0.99, False)]


@both
@pytest.mark.parametrize("groups", [1, 2, 3, 7])
@pytest.mark.parametrize("salt", [1 << 31, 1 << 62, (1 << 63) - 1])
def test_checksum_in_the_sign_buffer(use_triton: bool, groups: int, salt: int) -> None:
    """The lengths of tables are powers of two and others, and sums wrap around."""
    hypers = [HyperParameters(1e-3 / (1 + i), 0.1 * i, 0.9, 0.99, i % 2 == 1) for i in range(groups)]
    assert of_kernel(hypers, salt, use_triton) == of_definition(hypers, salt)


@both
@pytest.mark.parametrize("groups", [1, 3])
def test_checksum_covers_the_clipping_coefficient(use_triton: bool, groups: int) -> None:
    """By its bits: every bit counts, a NaN has a checksum too, and 1 is not the same as no clipping."""
    hypers = [ONE[0]._replace(beta1=0.9 + 0.01 * i) for i in range(groups)]
    scales = [None, *map(torch.tensor, (1.0, 0.37, -0.37, 1e-38, NAN))]
    scales.append(torch.nextafter(torch.tensor(0.37), torch.tensor(1.0)))
    sums = [of_kernel(hypers, SALT, use_triton, scale) for scale in scales]
    assert sums == [of_definition(hypers, SALT, scale) for scale in scales]
    assert len(set(sums)) == len(sums)


def test_checksum_by_hand() -> None:
    """Element i of the table, as bits, (2i + 1) times, and the coefficient's 32 bits behind them; modulo 2^64."""
    import struct

    hypers = [*ONE, HyperParameters(0.25, 0.0, 0.95, 0.98, True, 7)]
    numbers = [1e-3, 0.1, 0.9, 0.99, 1.0, 0, 0.25, 0.0, 0.95, 0.98, -1.0, 7]
    assert len(numbers) == 2 * HYPER_COLUMNS
    words = struct.unpack("<12q", struct.pack("<12d", *numbers))
    expected = (sum(w * (2 * i + 1) for i, w in enumerate(words)) + SALT) % (1 << 64)
    assert of_definition(hypers, SALT) % (1 << 64) == expected
    (scale_bits,) = struct.unpack("<i", struct.pack("<f", -0.25))
    expected += scale_bits * (2 * len(numbers) + 1)
    assert of_definition(hypers, SALT, torch.tensor(-0.25)) % (1 << 64) == expected % (1 << 64)


CHANGES: dict[str, Callable[[list[HyperParameters], int], tuple[list[HyperParameters], int]]] = {
    "lr, by the last bit": lambda h, s: ([h[0]._replace(lr=math.nextafter(h[0].lr, 1)), *h[1:]], s),
    "lr of the second": lambda h, s: ([h[0], h[1]._replace(lr=0.1), *h[2:]], s),
    "weight decay": lambda h, s: ([h[0]._replace(weight_decay=0.2), *h[1:]], s),
    "beta1": lambda h, s: ([h[0]._replace(beta1=0.95), *h[1:]], s),
    "beta2": lambda h, s: ([h[0]._replace(beta2=0.98), *h[1:]], s),
    "betas swapped": lambda h, s: ([h[0]._replace(beta1=h[0].beta2, beta2=h[0].beta1), *h[1:]], s),
    "lr and decay swapped": lambda h, s: (
        [h[0]._replace(lr=h[0].weight_decay, weight_decay=float(h[0].lr)), *h[1:]],
        s,
    ),
    "maximize": lambda h, s: ([h[0]._replace(maximize=True), *h[1:]], s),
    "order of groups": lambda h, s: (h[::-1], s),
    "a group more": lambda h, s: ([*h, h[0]], s),
    "salt": lambda h, s: (h, s + 1),
}


@both
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_checksum_changes_with(change: Callable, use_triton: bool) -> None:
    hypers = [*ONE, HyperParameters(0.25, 0.0, 0.9, 0.99, False)]
    changed, salt = change(hypers, SALT)
    assert of_kernel(changed, salt, use_triton) != of_kernel(hypers, SALT, use_triton)


@both
def test_an_lr_tensor_counts_as_its_value(use_triton: bool) -> None:
    as_tensor = [ONE[0]._replace(lr=torch.tensor(0.3, dtype=torch.float64))]
    assert of_kernel(as_tensor, SALT, use_triton) == of_kernel([ONE[0]._replace(lr=0.3)], SALT, use_triton)
    rounded = [ONE[0]._replace(lr=torch.tensor(0.3))]
    assert of_kernel(rounded, SALT, use_triton) != of_kernel(as_tensor, SALT, use_triton)
