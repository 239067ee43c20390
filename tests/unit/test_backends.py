"""Every backend gives the bits of reference.py: the Triton kernel (in the interpreter here, on the GPU in
tests/gpu), torch.compile and plain torch, through LionUpdate, the way the optimizers use them.

Sizes sit around what a kernel cuts by: 128 (alignment), 2048 (block), 8192 (tile), 32768 (CPU chunk), 2^20
(torch.compile from here on). The interpreter rounds to bfloat16 by truncation (facts.md), so bfloat16
parameters and momenta are compared on the GPU; bfloat16 gradients, which are only read, here too, but without
subnormals, which it reads wrongly.
"""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from lion_dist import Lion
from lion_dist.update.backends import compiled
from lion_dist.update.backends.cpu import CHUNK, COMPILE_FROM, LONG, TOGETHER
from lion_dist.update.lion_update import LionUpdate
from lion_dist.update.reference import HyperParameters
from lion_dist.update.segments import StepTensors
from lion_dist.update.state import EXP_AVG
from tests.asserts import assert_same_bits, assert_same_step
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
    compare(tensors(mix, SHAPES), use_triton=True, steps=2)


@needs_interpreter
@pytest.mark.parametrize("mix", [(F32, F32, F32), (F16, F16, F32), (F16, BF16, F16)], ids=name)
def test_interpreter_for_twenty_steps(mix: Mix) -> None:
    compare(tensors(mix, [(), (129,), (2049,), (8193,)]), use_triton=True, steps=20)


@pytest.mark.parametrize("mix", MIXES, ids=name)
def test_chunked(mix: Mix) -> None:
    compare(tensors(mix, [*SHAPES, (LONG - 1,), (LONG,), (TOGETHER - 9,), (CHUNK + 1,)]), use_triton=False, steps=3)


@pytest.fixture
def fresh_compile(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No graph yet, and none left behind: torch gives up on a function at its ninth."""
    for function in (compiled.step_, compiled.sign_step_, compiled.apply_signs_):
        monkeypatch.setattr(function, "_compiled", None)
        monkeypatch.setattr(function, "failed", set())
    monkeypatch.setattr(compiled.Compiled, "warned", False)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.usefixtures("fresh_compile")
@pytest.mark.parametrize("mix", [(F32, F32, F32), (F32, BF16, F32), (F32, F16, F32), (BF16, BF16, BF16)], ids=name)
def test_compiled(mix: Mix) -> None:
    """One graph for all lengths and hyper-parameters: a second would cost seconds, a ninth the lot. None for 16-bit
    parameters, of which torch.compile makes no vector instructions."""
    columns = tensors(mix, [(COMPILE_FROM // 2,), (COMPILE_FROM // 2 + 1,), (LONG + 5,)])
    expected, update, before = copy_of(columns), LionUpdate(False), graphs()
    for hypers in ([HYPERS[0], HYPERS[1], HYPERS[3]], [HYPERS[3], HYPERS[4], HYPERS[1]]):
        step_by(update, columns, hypers)
        reference_step(
            StepTensors(expected.params, columns.grads, {EXP_AVG: expected.state[EXP_AVG]}, columns.groups), hypers
        )
    assert_same_step(columns, expected)
    assert not compiled.step_.failed
    assert graphs() - before == (mix[0] == F32)


@pytest.mark.usefixtures("fresh_compile")
def test_one_graph_for_all_shapes() -> None:
    """Parameters reach the compiled rule as 1-D views, so neither rank nor memory order may show."""
    n, before, found = COMPILE_FROM, graphs(), {}
    shapes: dict[str, Callable[[], Tensor]] = {
        "1-D": lambda: torch.randn(n),
        "2-D": lambda: torch.randn(1024, 1025),
        "3-D": lambda: torch.randn(16, 256, 257),
        "4-D": lambda: torch.randn(16, 64, 32, 33),
        "transposed": lambda: torch.randn(1024, 1025).t(),
        "channels-last": lambda: torch.randn(16, 64, 32, 33).to(memory_format=torch.channels_last),
        "view of a buffer": lambda: torch.randn(2 * n)[3 : n + 8],
    }
    for shape, make in shapes.items():
        p = nn.Parameter(make())
        expected, m = p.detach().clone(), torch.zeros(p.shape)
        p.grad = torch.randn(p.shape)
        Lion([p], lr=0.25, use_triton=False).step()
        reference_step(
            StepTensors([expected], [p.grad], {EXP_AVG: [m]}, [0]), [HyperParameters(0.25, 0.0, 0.9, 0.99, False)]
        )
        assert_same_bits(p.detach(), expected, shape)
        found[shape] = graphs() - before
    assert not compiled.step_.failed
    assert found == dict.fromkeys(shapes, 1)


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([COMPILE_FROM - 1], []),
        ([COMPILE_FROM], [COMPILE_FROM]),
        ([LONG - 1] * 100, []),
        ([COMPILE_FROM // 4] * 3 + [LONG - 1] * 100, []),
        ([COMPILE_FROM // 4] * 4 + [100], [COMPILE_FROM // 4] * 4),
    ],
    ids=["too few", "one long run", "many short runs", "too few in long runs", "enough in long runs"],
)
def test_what_is_compiled(lengths: list[int], expected: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Long runs, if together they have enough elements."""
    sizes: list[int] = []
    monkeypatch.setattr(compiled, "step_", lambda p, *_: (sizes.append(p.numel()), True)[1])
    params, exp_avgs = ([torch.zeros(n) for n in lengths] for _ in range(2))
    grads: list[Tensor | None] = [torch.zeros(n) for n in lengths]
    columns = StepTensors(params, grads, {EXP_AVG: exp_avgs}, [0] * len(lengths))
    step_by(LionUpdate(False), columns, HYPERS)
    assert sizes == expected


@pytest.mark.usefixtures("fresh_compile")
def test_without_a_compiler_plain_torch_steps_and_says_so_once() -> None:
    columns = tensors((F32, F16, F32), [(COMPILE_FROM,), (COMPILE_FROM + 1,)])
    expected = copy_of(columns)
    no_compiler = {"cpp.cxx": ("/nonexistent/g++",), "force_disable_caches": True}
    with torch._inductor.config.patch(no_compiler), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            step_by(LionUpdate(False), columns, HYPERS)
            reference_step(expected, HYPERS)
    ours = [str(w.message) for w in caught if "lion_dist" in str(w.message)]
    assert len(ours) == 1
    assert "C++ compiler" in ours[0]
    assert_same_step(columns, expected)


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
