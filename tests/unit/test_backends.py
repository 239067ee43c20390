"""Every backend gives the bits of reference.py: the Triton kernel (in the interpreter here, on the GPU in
tests/gpu) and plain torch, through LionUpdate, the way the optimizers use them; torch.compile in test_compiled.py.

Sizes sit around what a kernel cuts by: 128 (alignment), 2048 (block), 8192 (tile), and the limits of the CPU's backend.
The interpreter rounds to bfloat16 by truncation (facts.md), so bfloat16 parameters and momenta are compared on the GPU;
bfloat16 gradients, which are only read, here too, but without subnormals, which it reads wrongly.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from lion_dist.update.backends import cpu
from lion_dist.update.backends.cpu import LONG, TOGETHER
from lion_dist.update.lion_update import LionUpdate
from lion_dist.update.segments import StepTensors
from tests.asserts import assert_same_step
from tests.harness import DEADLINE_S
from tests.marks import needs_interpreter
from tests.scenarios.mixes import (
    HYPERS,
    INTERPRETED,
    MIXES,
    Mix,
    awkward,
    copy_of,
    momenta,
    name,
    reference_step,
    step_by,
    tensors,
)

# NumPy, under the interpreter, warns of inf - inf, inf * 0 and what float16 cannot hold: all of it on purpose here.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SHAPES: list[tuple[int, ...]] = [
    (0,), (), (1,), (127,), (128,), (129,), (2047,), (2048,), (2049,), (8191,), (8192,), (8193,), (20000,),
    (3, 0, 2), (37, 19), (2, 3, 5, 7),
]  # fmt: skip
# The interpreter takes as long for a tile as torch for a million elements; where the cuts are depends on no dtype.
FEW_SHAPES: list[tuple[int, ...]] = [(0,), (), (129,), (2047,), (8193,), (37, 19)]
OF_ALL_SHAPES = ((F32, F32, F32), (F16, F16, F16))


def compare(columns: StepTensors, use_triton: bool, steps: int) -> None:
    """Steps with new gradients, some of them None, on a backend and by the definition."""
    start, expected, update = copy_of(columns), copy_of(columns), LionUpdate(use_triton)
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        if step:
            columns.grads = [
                None if (i + step) % 4 == 0 else awkward(tuple(g.shape), g.dtype, generator)
                for i, g in enumerate(start.grads)
                if g is not None
            ]
        step_by(update, columns, HYPERS)
        expected.grads = columns.grads
        reference_step(expected, HYPERS)
        assert_same_step(columns, expected)
    assert not torch.equal(momenta(columns)[-1], momenta(start)[-1])


@needs_interpreter
@pytest.mark.parametrize("mix", INTERPRETED, ids=name)
def test_interpreter(mix: Mix) -> None:
    compare(tensors(mix, SHAPES if mix in OF_ALL_SHAPES else FEW_SHAPES), use_triton=True, steps=2)


@needs_interpreter
@pytest.mark.exhaustive
@pytest.mark.parametrize("mix", [mix for mix in INTERPRETED if mix not in OF_ALL_SHAPES], ids=name)
def test_interpreter_on_all_shapes(mix: Mix) -> None:
    compare(tensors(mix, SHAPES), use_triton=True, steps=2)


@needs_interpreter
@pytest.mark.parametrize("steps", [6, pytest.param(20, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("mix", [(F32, F32, F32), (F16, F16, F32), (F16, BF16, F16)], ids=name)
def test_interpreter_for_several_steps(mix: Mix, steps: int) -> None:
    """Each parameter is left out in some steps, and takes part in those after them."""
    compare(tensors(mix, [(), (129,), (2049,), (8193,)]), use_triton=True, steps=steps)


@pytest.mark.parametrize("mix", MIXES, ids=name)
def test_chunked(mix: Mix, monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest runs are cut into chunks, the last of which is shorter, whatever the number of threads."""
    monkeypatch.setattr(cpu, "CHUNK", LONG // torch.get_num_threads())
    shapes = [*SHAPES, (LONG - 1,), (LONG,), (LONG + 1,), (3 * LONG + 5,), (TOGETHER - 9,)]
    compare(tensors(mix, shapes), use_triton=False, steps=3)


WITHOUT_TRITON = """
import sys, warnings
sys.modules["triton"] = None
import torch
from lion_dist import Lion
p = torch.nn.Parameter(torch.ones(3)); p.grad = torch.ones(3)
Lion([p], lr=0.25).step()
assert p.tolist() == [0.75] * 3, p
try:
    Lion([p], use_triton=True)
except ValueError as error:
    assert "pip install triton" in str(error)
else:
    raise AssertionError("use_triton=True was accepted")
"""


def test_without_triton() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stderr
