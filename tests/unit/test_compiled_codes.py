"""Master weights and 8-bit momenta through torch.compile on CPUs: the bits of plain torch, and one graph a function."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from lion_dist.update import codecs, reference
from lion_dist.update.backends import compiled, cpu_codes
from lion_dist.update.backends.batch import SIGNS
from lion_dist.update.backends.cpu import ALONE
from lion_dist.update.hypers import hyper_table
from lion_dist.update.reference import PER_BYTE, SEED, HyperParameters
from lion_dist.update.segments import Segment, StepTensors
from lion_dist.update.state import EXP_AVG, EXP_AVG_SCALE, REMAINDER
from tests.asserts import assert_same_bits

F32, BF16 = torch.float32, torch.bfloat16
FUNCTIONS = ("step_master_", "step_codes_", "step_codes_master_", "sign_step_codes_", "apply_signs_master_")
# Runs of these lengths, of which the first two are compiled; they begin at other elements of their parameters.
LENGTHS, START = (ALONE + 1000, 2 * ALONE, ALONE - 1, 5), 3 * codecs.BLOCK
ROW = hyper_table([HyperParameters(1e-3, 0.1, 0.9, 0.99, False, codecs.seed_of(7))], torch.device("cpu"))[0]


@pytest.fixture(params=["eager", pytest.param("inductor", marks=pytest.mark.exhaustive)])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is compiled before the test, and everything above ALONE elements in it.

    The eager backend traces as inductor does, and needs no ten seconds for each function.
    """
    for name in FUNCTIONS:
        monkeypatch.setattr(compiled, name, compiled.Compiled(getattr(compiled, name)._function))
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=request.param))
    monkeypatch.setattr(cpu_codes, "COMPILE_FROM", ALONE)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make(n: int, dtype: torch.dtype, codes: bool, master: bool) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """A parameter of START + n elements, a gradient of n, and the state of n elements."""
    gen = torch.Generator().manual_seed(n)
    weights, g = torch.randn(START + n, generator=gen), torch.randn(n, generator=gen)
    g[0], g[n // 2], g[n - 1] = torch.nan, torch.inf, 0.0
    momentum = torch.randn(n, generator=gen) * 1e-3
    state: dict[str, Tensor] = {}
    if codes:
        state[EXP_AVG], state[EXP_AVG_SCALE] = codecs.encode(momentum)
    else:
        state[EXP_AVG] = momentum.to(dtype)
    p, remainder = codecs.split(weights) if master else (weights.to(dtype), None)
    if remainder is not None:
        state[REMAINDER] = remainder[START:].clone()
    return p, g.to(dtype), state


def batch(params: list[Tensor], states: list[dict[str, Tensor]]) -> cpu_codes.CodesBatch:
    segments = [Segment(i, START, 0, 0, n) for i, n in enumerate(LENGTHS)]
    blocks = {EXP_AVG_SCALE: codecs.BLOCK, SIGNS: PER_BYTE}
    state = {name: [s[name] for s in states] for name in states[0]}
    none: list[Tensor | None] = [None] * len(params)
    return cpu_codes.CodesBatch(StepTensors(params, none, state, [0] * len(params), segments, blocks=blocks), segments)


MIXES = [(BF16, False, True), (F32, True, False), (BF16, True, False), (BF16, True, True)]


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("dtype", "codes", "master"), MIXES)
def test_compiled_step(dtype: torch.dtype, codes: bool, master: bool) -> None:
    before = counters["stats"]["unique_graphs"]
    made = [make(n, dtype, codes, master) for n in LENGTHS]
    s, seed = reference.scalars(ROW), ROW[SEED].long()
    ours = batch([p for p, _, _ in made], [state for *_, state in made])
    for run, n in zip(ours.runs, LENGTHS, strict=True):
        p, g, state = make(n, dtype, codes, master)
        eight = reference.EightBits(state[EXP_AVG_SCALE], seed, START) if codes else None
        reference.lion_step_(p[START:], g, state[EXP_AVG], s, eight, state.get(REMAINDER))
        ours.step_run(run, g, s, seed)
        assert_same_bits(run.param, p[START:], f"parameter of {n}")
        for name, t in state.items():
            assert torch.equal(run.state[name].view(torch.uint8), t.view(torch.uint8)), (n, name)
    assert counters["stats"]["unique_graphs"] - before == 1


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("half", ["pack", "apply"])
def test_compiled_halves(half: str) -> None:
    """The half with the gradient, of an 8-bit momentum; and the half with the parameter, of master weights."""
    before = counters["stats"]["unique_graphs"]
    s, seed = reference.scalars(ROW), ROW[SEED].long()
    for n in LENGTHS:
        p, g, state = make(n, BF16, True, True)
        packed, want = torch.zeros(2, -(-n // PER_BYTE), dtype=torch.uint8).unbind()
        p_want, codes, scale = p.clone(), state[EXP_AVG].clone(), state[EXP_AVG_SCALE].clone()
        remainder = state[REMAINDER].clone()
        reference.sign_step_(g, codes, want, s, reference.EightBits(scale, seed, START))
        segments = [Segment(0, START, 0, 0, n)]
        if half == "pack":
            del state[REMAINDER]
        else:
            packed.copy_(want)
            state = {SIGNS: packed, REMAINDER: state[REMAINDER]}
        tensors = StepTensors(
            [p], [None], {name: [t] for name, t in state.items()}, [0], segments,
            blocks={EXP_AVG_SCALE: codecs.BLOCK, SIGNS: PER_BYTE},
        )  # fmt: skip
        ours = cpu_codes.CodesBatch(tensors, segments)
        if half == "pack":
            ours.pack_run(ours.runs[0], g, packed, s, seed)
            assert torch.equal(packed, want)
            assert torch.equal(state[EXP_AVG], codes)
            assert_same_bits(state[EXP_AVG_SCALE], scale)
        else:
            reference.apply_signs_(p_want[START:], want, s, remainder)
            ours.apply_run(ours.runs[0], s)
            assert_same_bits(p, p_want)
            assert torch.equal(state[REMAINDER], remainder)
    assert counters["stats"]["unique_graphs"] - before == 1
