"""Master weights and 8-bit momenta in Triton's interpreter, in one launch and in two halves: reference.py's bits."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from lion_dist import kernel_launch
from lion_dist.update import codecs, reference
from lion_dist.update.backends import triton_step
from lion_dist.update.codecs import seed_of
from lion_dist.update.hypers import hyper_table
from lion_dist.update.lion_update import LionUpdate
from lion_dist.update.segments import StepTensors
from lion_dist.update.state import EXP_AVG, EXP_AVG_SCALE, REMAINDER
from tests.asserts import assert_same_bits
from tests.marks import needs_interpreter
from tests.scenarios import precise_runs
from tests.scenarios.precise_runs import BF16, CPU, F32, HYPERS, I8, INTERPRETED, SALT, Kind, Runs, Whole

pytestmark = [
    needs_interpreter,
    # NumPy warns of inf - inf, inf * 0 and what float16 cannot hold: all of it on purpose here.
    pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning"),
]

BOTH = Kind(BF16, BF16, I8, True)
# Each dtype of each tensor, with each kind of momentum, with and without master weights: the default suite's share.
COVERING = {
    "bf16-bf16-int8-master", "bf16-fp32-fp32-master", "bf16-fp16-fp16-master", "fp32-bf16-int8", "fp32-fp32-int8",
    "fp16-fp16-int8",
}  # fmt: skip
EACH_MIX = [
    pytest.param(kind, id=str(kind), marks=[] if str(kind) in COVERING else pytest.mark.exhaustive)
    for kind in INTERPRETED
]
# Around a block that shares a scale and around what one program steps; a part of one element, and an odd one.
LENGTHS = (1, 127, 128, 129, 1024 + 5)


@pytest.mark.parametrize("kind", EACH_MIX)
def test_every_mix_gives_the_references_bits(kind: Kind) -> None:
    whole = Whole([kind], LENGTHS, LionUpdate(True))
    for number in range(2):
        whole.step(HYPERS)
        whole.check(f"step {number}")


@pytest.mark.parametrize("kind", [BOTH, Kind(F32, F32, I8, False)], ids=str)
def test_a_tile_and_some_elements(kind: Kind) -> None:
    whole = Whole([kind], [8192 + 5], LionUpdate(True))
    whole.step(HYPERS[1:2], 0.37)
    whole.check("a step")


@pytest.mark.parametrize("kind", [BOTH, Kind(BF16, F32, I8, True), Kind(F32, F32, I8, False)], ids=str)
def test_one_odd_number_among_ordinary_ones(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole blocks, each with one number that is not finite, or becomes so, and no other that would give it away."""
    negative_nan = torch.tensor(-0x3EDCBB, dtype=torch.int32).view(F32).item()  # keeps its sign in every dtype
    not_finite = [math.inf, -math.inf, math.nan, negative_nan]
    odd = [(name, value) for name in ("p", "g") for value in not_finite]
    odd += [(EXP_AVG_SCALE, value) for value in (*not_finite, 3.4e38)] + [(EXP_AVG, codecs.NAN_CODE)]
    block = triton_step.LAUNCH[kind.param.itemsize, True, kind.master].block
    n = block * len(odd)
    generator = torch.Generator().manual_seed(1)
    codes, scale = codecs.encode(torch.randn(n, generator=generator))
    tensors = {
        "p": torch.randn(n, generator=generator).to(kind.param),
        "g": torch.randn(n, generator=generator).to(kind.grad),
        EXP_AVG: codes,
        EXP_AVG_SCALE: scale,
        REMAINDER: torch.zeros(n, dtype=torch.int16),
    }
    for i, (name, value) in enumerate(odd):
        at = i * block + 37
        tensors[name][at // codecs.BLOCK if name == EXP_AVG_SCALE else at] = value
    whole = Whole([kind], [n], LionUpdate(True))
    part, state = whole.parts[0], whole.tensors.state_of(0)
    whole.tensors.params[0].copy_(tensors["p"])
    part.param.copy_(tensors["p"])
    for name, t in part.state.items():
        state[name].copy_(tensors[name])
        t.copy_(tensors[name])
    monkeypatch.setattr(precise_runs, "gradients", lambda *_: tensors["g"])
    whole.step(HYPERS[1:2])
    whole.check("a step")


def test_groups_with_other_columns_and_parameters_that_take_no_part() -> None:
    kinds = [BOTH, Kind(F32, F32, F32, False), Kind(BF16, F32, F32, True), Kind(F32, BF16, I8, False)]
    whole = Whole(kinds, [300, 129, 127, 500, 128, 257, 1030, 2], LionUpdate(True))
    for number, inactive in enumerate([(), (1, 4), (7,)]):
        whole.step([h._replace(seed=h.seed + number) for h in HYPERS], (None, 0.37, -1e30)[number], inactive)
        whole.check(f"step {number}")


@pytest.mark.parametrize("shifts", [(1, 0, 0, 0), (0, 3, 0, 0), (0, 0, 5, 0), (0, 0, 0, 1), (2, 4, 8, 2)], ids=str)
def test_addresses_without_alignment(shifts: tuple[int, int, int, int]) -> None:
    whole = Whole([BOTH, Kind(F32, F32, I8, False)], [1024 + 128, 1024], LionUpdate(True), shifts=[shifts])
    whole.step(HYPERS)
    whole.check("a step")


@pytest.mark.parametrize("scale", [1e-38, 1e38, float("nan")])
def test_gradients_that_vanish_and_that_overflow(scale: float) -> None:
    """Down to denormals, up to infinity, and none at all: whole blocks have no scale then."""
    whole = Whole([BOTH, Kind(F32, F32, I8, False)], [300, 140, 129, 260], LionUpdate(True))
    whole.step(HYPERS, scale)
    whole.check("a step")


def test_seeds_differ_and_codes_with_them() -> None:
    """The rounding depends on the seed alone, and not on the program that an element falls to."""
    found: list[Any] = []
    for seed in (1, 2, 1):
        whole = Whole([Kind(F32, F32, I8, False)], [1030], LionUpdate(True))
        whole.step([h._replace(seed=seed_of(seed)) for h in HYPERS])
        found.append(whole.tensors.state_of(0)[EXP_AVG])
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])


RUNS: tuple[Sequence[int], Sequence[int]] = ((0, 128, 1280, 0, 256), (1030, 129, 1024 + 128, 1, 128))


@pytest.mark.parametrize("kind", EACH_MIX)
def test_two_halves_give_the_references_bits(kind: Kind) -> None:
    runs = Runs(kind, *RUNS)
    runs.step(LionUpdate(True), True, HYPERS)
    runs.check("a step")
    assert runs.checksum == reference.hyper_checksum(hyper_table(HYPERS, CPU), SALT)


def test_two_halves_without_agreement_move_the_momentum_alone() -> None:
    runs = Runs(BOTH, *RUNS)
    update = LionUpdate(True)
    for agree in (False, True):
        runs.step(update, True, HYPERS, agree)
        runs.check(f"agree: {agree}")


def test_packed_signs_are_those_of_plain_torch() -> None:
    runs, plain = Runs(BOTH, *RUNS), Runs(BOTH, *RUNS)
    runs.step(LionUpdate(True), True, HYPERS)
    plain.step(LionUpdate(False), False, HYPERS)
    plain.check("plain torch")
    for s in runs.segments:
        at = slice(s.state_start // 4, -(-(s.state_start + s.length) // 4))
        assert_same_bits(runs.signs[at], plain.signs[at], f"signs of run {s.entry}")


def test_one_launch_for_all_parameters_of_a_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[int] = []

    def counted(kernel: Any, programs: int, *rest: Any) -> None:
        launched.append(programs)
        kernel_launch.launch(kernel, programs, *rest)

    monkeypatch.setattr(triton_step, "launch", counted)
    whole = Whole([BOTH], [300, 129, 1], LionUpdate(True))
    whole.step(HYPERS)
    assert len(launched) == 1


def test_state_that_does_not_belong_together_is_not_stepped() -> None:
    """A kernel would read beyond a tensor of another dtype. And nothing is left out silently: codes without scales, and
    a remainder of another dtype than bfloat16."""
    p, codes, remainder = torch.zeros(3), torch.zeros(3, dtype=I8), torch.zeros(3, dtype=torch.int16)
    half, scale = p.bfloat16(), torch.zeros(1)
    for param, state, message in (
        (p, {EXP_AVG: codes}, "exp_avg in torch.int8; expected torch.float32 or"),
        (p, {EXP_AVG: p.clone(), EXP_AVG_SCALE: scale}, "exp_avg in torch.float32; expected torch.int8"),
        (
            p,
            {EXP_AVG: codes, EXP_AVG_SCALE: scale.bfloat16()},
            "exp_avg_scale in torch.bfloat16; expected torch.float32",
        ),
        (half, {EXP_AVG: half.clone(), REMAINDER: codes}, "remainder in torch.int8; expected torch.int16"),
    ):
        columns = {name: [t] for name, t in state.items()}
        with pytest.raises(ValueError, match=re.escape(message)):
            LionUpdate(True).prepare(
                StepTensors([param], [param.clone()], columns, [0], blocks={EXP_AVG_SCALE: codecs.BLOCK})
            )
    columns = {EXP_AVG: [p.clone()], REMAINDER: [remainder]}
    with pytest.raises(AssertionError, match=r"remainder of torch\.float32"):
        LionUpdate(True).prepare(StepTensors([p], [p.clone()], columns, [0]))
