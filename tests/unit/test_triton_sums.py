"""The kernel of Lion.statistics() in Triton's interpreter, beside the sums in plain torch: the same counts and signs,
and norms that differ only by the order of float64 sums."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lion_dist import Lion
from lion_dist.update import codecs
from lion_dist.update.backends import triton_sums
from lion_dist.update.backends.batch import key_of
from lion_dist.update.hypers import HyperTables, StepHypers
from lion_dist.update.lion_update import LionUpdate
from lion_dist.update.reference import STORAGE_DTYPES, HyperParameters
from lion_dist.update.segments import TILE, Segment, StepTensors
from lion_dist.update.state import EXP_AVG, EXP_AVG_SCALE, REMAINDER
from lion_dist.update.sums import COMPARED, ELEMENTS, FLIPPED, GRAD, UPDATE, ZERO, Signs
from tests.asserts import assert_same_bits
from tests.marks import needs_interpreter
from tests.scenarios.mixes import HYPERS, awkward
from tests.scenarios.watched import CASES, check_steps, sums_launched

pytestmark = [
    needs_interpreter,
    pytest.mark.filterwarnings("ignore:lion_dist"),
    # NumPy warns of inf - inf, inf * 0 and what float16 cannot hold: all of it on purpose here.
    pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning"),
]

F32, BF16, F16, I8 = torch.float32, torch.bfloat16, torch.float16, torch.int8
BLOCK = triton_sums.BLOCK
# The interpreter does not round to bfloat16 as a GPU does: these take weights in it to numbers that it holds exactly.
EXACT = [HyperParameters(1.0, 0.5, 0.9, 0.99, False), HyperParameters(0.5, 0.0, 0.95, 0.98, True)]


def values(shape: int, dtype: torch.dtype, generator: torch.Generator, special: bool) -> Tensor:
    """Small multiples of 1/8, of which many are 0 with either sign; or, among others, what is not finite."""
    if special:
        return awkward((shape,), dtype, generator)
    few = torch.randint(-12, 13, (shape,), generator=generator) / 8
    return torch.where(few.abs() < 0.5, few * 0.0, few).to(dtype)


def made(
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
    lengths: Sequence[int],
    master: bool,
    special: bool,
    groups: int,
) -> StepTensors:
    """Entries of some lengths, of which the third has no gradient."""
    generator = torch.Generator().manual_seed(3)
    of_param, of_grad, of_momentum = dtypes
    tensors = StepTensors([], [], {}, [i % groups for i in range(len(lengths))])
    state: dict[str, list[Tensor]] = {EXP_AVG: []}
    for i, n in enumerate(lengths):
        tensors.params.append(values(n, of_param, generator, special and of_param != BF16))
        tensors.grads.append(None if i == 2 else values(n, of_grad, generator, special))
        if of_momentum == I8:
            m, scale = codecs.encode(torch.randn(n, generator=generator))
            if special and n:
                m[::7] = codecs.NAN_CODE
            state[EXP_AVG].append(m)
            state.setdefault(EXP_AVG_SCALE, []).append(scale)
            tensors.blocks = {EXP_AVG_SCALE: codecs.BLOCK}
        else:
            state[EXP_AVG].append(values(n, of_momentum, generator, special))
        if master:
            state.setdefault(REMAINDER, []).append(
                torch.randint(-(1 << 15), 1 << 15, (n,), generator=generator).to(torch.int16)
            )
    tensors.state = state
    return tensors


class Side:
    """The sums of one backend, call after call, with the signs of the last."""

    def __init__(self, use_triton: bool) -> None:
        self.update = LionUpdate(use_triton)
        self.signs: Signs = {}

    def add_up(
        self, tensors: StepTensors, hypers: list[HyperParameters], scale: Tensor | None, flips: bool = True
    ) -> dict[Any, Tensor]:
        """The sums of each segment, by its entry and its number among those of the entry."""
        prepared, kept, found = self.update.prepare(tensors), Signs(), {}
        for batch in prepared.batches:
            entries, of_runs = batch.add_up(
                prepared, StepHypers(HyperTables(), hypers, scale), self.signs if flips else {}, kept if flips else None
            )
            for number, (entry, of_run) in enumerate(zip(entries, of_runs, strict=True)):
                found[entry, number - entries.index(entry)] = of_run
        self.signs = kept
        return found


def assert_same_sums(got: dict[Any, Tensor], expected: dict[Any, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for key, row in expected.items():
        assert got[key][:ZERO].tolist() == pytest.approx(row[:ZERO].tolist(), rel=1e-12, nan_ok=True), key
        assert got[key][ZERO:].tolist() == row[ZERO:].tolist(), key


def check(
    calls: Sequence[StepTensors], hypers: list[HyperParameters], scale: Tensor | None = None
) -> list[dict[Any, Tensor]]:
    """Calls with flips, each beside one without. Returns the sums of those with."""
    kernel, twin, found = Side(True), Side(False), []
    for tensors in calls:
        got, expected = kernel.add_up(tensors, hypers, scale), twin.add_up(tensors, hypers, scale)
        assert_same_sums(got, expected)
        assert kernel.signs.keys() == twin.signs.keys()
        for key, packed in twin.signs.items():
            assert_same_bits(kernel.signs[key], packed, f"signs {key}")
        assert_same_sums(
            Side(True).add_up(tensors, hypers, scale, flips=False),
            Side(False).add_up(tensors, hypers, scale, flips=False),
        )
        found.append(got)
    return found


def later(tensors: StepTensors) -> StepTensors:
    """The same with other gradients, of which the second is absent and the third is not."""
    first, _, _, *others = tensors.grads
    assert first is not None
    grads: list[Tensor | None] = [-first.roll(1), None, tensors.params[2].to(first.dtype)]
    return replace(tensors, grads=grads + [None if g is None else -g.roll(1) for g in others])


MIXES = [
    (p, g, m, master)
    for p, g, m in itertools.product(STORAGE_DTYPES, STORAGE_DTYPES, (*STORAGE_DTYPES, I8))
    for master in ([False, True] if p == BF16 else [False])
]
# Each dtype of each tensor, with each kind of momentum, with and without master weights.
COVERING = [
    (F32, F32, F32, False), (BF16, BF16, BF16, False), (F16, BF16, F16, False), (F32, F16, I8, False),
    (BF16, F32, I8, True),
]  # fmt: skip


@pytest.mark.parametrize(
    ("p", "g", "m", "master"),
    [pytest.param(*mix, marks=[] if mix in COVERING else pytest.mark.exhaustive) for mix in MIXES],
)
def test_every_mix(p: torch.dtype, g: torch.dtype, m: torch.dtype, master: bool) -> None:
    hypers = EXACT if p == BF16 and not master else HYPERS
    for special, scale in ((False, None), (True, torch.tensor(0.375))):
        tensors = made((p, g, m), (129, BLOCK + 1, 5, 0, 1, BLOCK, 127), master, special, len(hypers))
        first, second = check([tensors, later(tensors)], hypers, scale)
        if not special:
            assert all(of_run[:ZERO].isfinite().all() for of_run in first.values())
            assert 0 < second[0, 0][FLIPPED] < second[0, 0][COMPARED] == second[0, 0][ELEMENTS] == 129
        assert first[2, 0][ZERO] == first[2, 0][ELEMENTS] == second[1, 0][ZERO] - (BLOCK - 4) == 5
        assert second[1, 0][COMPARED] == second[2, 0][COMPARED] == 0  # without a gradient now, or in the last call


@pytest.mark.parametrize(("p", "m", "master"), [(F32, F32, False), (BF16, I8, True)], ids=["fp32", "master-int8"])
@pytest.mark.parametrize("odd", ["none", "gradients", "weights"])
def test_whole_tiles(p: torch.dtype, m: torch.dtype, master: bool, odd: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of one tile, and of two tiles and some elements. All are aligned to 16 bytes, or some are not."""
    monkeypatch.setattr(triton_sums, "CHUNK", 2)  # fewer than the tiles of the second
    tensors = made((p, p, m), (TILE, 2 * TILE + 5), master, False, 2)

    def moved(t: Any) -> Tensor:
        return torch.cat([t[:1], t])[1:]

    if odd == "gradients":
        tensors.grads[1] = moved(tensors.grads[1])
    elif odd == "weights":
        tensors.params[1] = moved(tensors.params[1])
    _, second = check([tensors, replace(tensors, grads=[None if g is None else -g for g in tensors.grads])], EXACT)
    assert second[1, 0][FLIPPED] > 0


@pytest.mark.parametrize("scale", [0.0, math.nan])
def test_a_factor_of_the_gradients_that_no_gradient_outlives(scale: float) -> None:
    """Clipping by an infinite norm gives such a factor, and so does one by NaN. The third entry has no gradient."""
    tensors = made((F32, F32, F32), (BLOCK + 4, 4, 8), False, False, 2)
    (found,) = check([tensors], EXACT, torch.tensor(scale))
    assert found[2, 0][GRAD] == found[2, 0][UPDATE] == 0
    assert found[0, 0][GRAD].isnan() == math.isnan(scale)


@pytest.mark.parametrize("kept", [(), (1, 2)])
def test_segments_and_flags(kept: tuple[int, ...]) -> None:
    """Runs of entries whose gradients and momenta lie in flat buffers, and flags that leave entries out."""
    generator = torch.Generator().manual_seed(4)
    params = [values(n, F32, generator, False) for n in (700, 300, 129)]
    flat_g, flat_m = values(2000, F32, generator, False), values(2048, F32, generator, False)
    segments = [
        Segment(0, 0, 3, 0, 128), Segment(1, 128, 400, 128, 172), Segment(0, 130, 640, 384, 570),
        Segment(2, 0, 0, 1024, 0), Segment(2, 128, 1300, 1024, 1),
    ]  # fmt: skip
    grads: list[Tensor | None] = [flat_g] * 3
    tensors = StepTensors(params, grads, {EXP_AVG: [flat_m] * 3}, [0, 1, 0], segments)
    if kept:
        tensors.active = torch.tensor([i in kept for i in range(3)], dtype=torch.uint8)
    found = check([tensors, replace(tensors, grads=[-flat_g] * 3)], EXACT)
    assert sum(of_run[ELEMENTS].item() for of_run in found[0].values()) == 128 + 172 + 570 + 1
    assert (found[1][0, 0][COMPARED] == 0) == bool(kept)


def test_signs_of_another_device_are_not_read() -> None:
    """Kernels read signs by their addresses, which mean nothing on another device."""
    of_devices = [StepTensors([torch.empty(4, device=d)], [None], {}, [0]) for d in ("cpu", "meta")]
    assert len({key_of(tensors, Segment(0, 0, 0, 0, 4)) for tensors in of_devices}) == 2


def test_the_step_before_was_of_the_other_backend() -> None:
    tensors = made((F32, F32, F32), (BLOCK + 3, 5, 1), False, False, 2)
    for use_triton in (True, False):
        one, other = Side(use_triton), Side(not use_triton)
        one.add_up(tensors, EXACT, None)
        other.signs = one.signs
        assert_same_sums(other.add_up(later(tensors), EXACT, None), one.add_up(later(tensors), EXACT, None))


@pytest.mark.parametrize(("use_triton", "count"), [(True, 2), (False, 0), (None, 0)])
def test_launches_do_not_grow_with_the_number_of_tensors(
    use_triton: bool | None, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = sums_launched(monkeypatch)
    for number in (1, 5):
        launched.clear()
        params = [nn.Parameter(torch.ones(3)) for _ in range(number)]
        for p in params:
            p.grad = torch.ones(3)
        assert Lion(params, lr=0.5, use_triton=use_triton).statistics(flips=True)["sign/agree/global"] == 1
        assert len(launched) == count


@pytest.mark.parametrize(
    "case", [case if case == "mixed" else pytest.param(case, marks=pytest.mark.exhaustive) for case in CASES]
)
def test_numbers_are_those_of_the_step(case: str) -> None:
    check_steps(case, "parameter", torch.device("cpu"), use_triton=True)
