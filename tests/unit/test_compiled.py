"""The rule through torch.compile on CPUs: what is compiled, into how many graphs, and with the bits of reference.py."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from lion_dist import Lion
from lion_dist.sharding.layout import ShardLayout
from lion_dist.update.backends import compiled
from lion_dist.update.backends.cpu import ALONE, COMPILE_FROM, LONG
from lion_dist.update.lion_update import LionUpdate
from lion_dist.update.reference import HyperParameters
from lion_dist.update.segments import Segment, StepTensors
from lion_dist.update.state import EXP_AVG
from tests.asserts import assert_same_bits, assert_same_step
from tests.scenarios.exchanged_signs import ExchangedSigns
from tests.scenarios.mixes import HYPERS, Mix, copy_of, name, reference_step, step_by, tensors

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
CPU = torch.device("cpu")


@pytest.fixture
def fresh_compile(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No graph exists before the test or after it."""
    for function in (compiled.step_, compiled.sign_step_, compiled.apply_signs_):
        monkeypatch.setattr(function, "_compiled", None)
        monkeypatch.setattr(function, "failed", set())
        monkeypatch.setattr(function, "_seen", set())
    monkeypatch.setattr(compiled.step_, "_fillers", {})
    monkeypatch.setattr(compiled.Compiled, "warned", False)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.usefixtures("fresh_compile")
@pytest.mark.parametrize("mix", [(F32, F32, F32), (F32, BF16, F32), (F32, F16, F32), (BF16, BF16, BF16)], ids=name)
def test_compiled(mix: Mix) -> None:
    """One graph for all lengths and hyper-parameters: a second would cost seconds. None for 16-bit
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


@pytest.mark.usefixtures("fresh_compile")
def test_several_runs_a_call_are_one_graph() -> None:
    """Also of one length, of one storage, in several groups, and where gradients come and go."""
    buffer, n = torch.randn(3 * COMPILE_FROM), COMPILE_FROM // 8
    params = [nn.Parameter(torch.randn(n + i // 3)) for i in range(9)]
    params += [nn.Parameter(buffer[i * n + 1 : (i + 1) * n]) for i in range(5)]
    params += [nn.Parameter(torch.randn(LONG - 1)), nn.Parameter(torch.randn(7))]
    expected = [p.detach().clone() for p in params]
    momenta = [torch.zeros_like(p) for p in expected]
    groups = [i % 2 for i in range(len(params))]
    optimizer = Lion(
        [{"params": params[0::2], "lr": 0.25}, {"params": params[1::2], "lr": 0.125}],
        weight_decay=0.1,
        use_triton=False,
    )
    hypers = [HyperParameters(0.25, 0.1, 0.9, 0.99, False), HyperParameters(0.125, 0.1, 0.9, 0.99, False)]
    before = graphs()
    for number in range(4):
        grads: list[Tensor | None] = [
            None if (i + number) % 5 == 0 else torch.randn(p.shape) for i, p in enumerate(params)
        ]
        if number == 3:
            grads[1] = torch.full_like(params[1], torch.inf)
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        optimizer.step()
        reference_step(StepTensors(expected, grads, {EXP_AVG: momenta}, groups), hypers)
        for i, (p, e, m) in enumerate(zip(params, expected, momenta, strict=True)):
            assert_same_bits(p.detach(), e, f"step {number} parameter {i}")
            if p in optimizer.state:
                assert_same_bits(optimizer.state[p]["exp_avg"], m, f"step {number} momentum {i}")
    assert graphs() - before == 1
    assert not compiled.step_.failed


@pytest.mark.usefixtures("fresh_compile")
def test_more_graphs_than_torch_makes_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each mix of dtypes and number of threads has a graph; torch's own limit is 8."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    threads, before = torch.get_num_threads(), graphs()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for dtype in (F32, BF16, F16):
                columns = tensors((F32, dtype, F32), [(COMPILE_FROM,)])
                step_by(LionUpdate(False), columns, HYPERS)
    finally:
        torch.set_num_threads(threads)
    assert not compiled.step_.failed
    assert graphs() - before == 9


@pytest.mark.usefixtures("fresh_compile")
def test_compiled_halves() -> None:
    """A graph for each half, whatever the lengths, also where these are no multiples of four; and the bits of the step
    in one."""
    sizes, before = [COMPILE_FROM, ALONE + 3, 130], graphs()
    layout = ShardLayout.make(sizes, 1)
    slices = [(s.param, s.start, s.offset, s.length) for s in layout.slices(0)]
    update = ExchangedSigns(LionUpdate(False), layout.shard_numel, 0, [slices], CPU)
    whole = tensors((F32, F32, F32), [(n,) for n in sizes])
    mine = copy_of(whole)
    shard = torch.zeros(layout.shard_numel)
    for entry, start, offset, length in slices:
        shard[offset : offset + length] = whole.state_of(entry)[EXP_AVG][start : start + length]
    segments = [Segment(entry, start, start, offset, length) for entry, start, offset, length in slices]
    mine = StepTensors(mine.params, mine.grads, {EXP_AVG: [shard] * 3}, mine.groups, segments)
    for hypers in (HYPERS[:3], HYPERS[2:]):
        update.pack(mine, hypers, None, 1 << 40)
        update.apply(mine, torch.tensor(True))
        reference_step(whole, hypers)
        for i, (p, e) in enumerate(zip(mine.params, whole.params, strict=True)):
            assert_same_bits(p, e, f"parameter {i}")
        for entry, start, offset, length in slices:
            expected = whole.state_of(entry)[EXP_AVG][start : start + length]
            assert_same_bits(shard[offset : offset + length], expected, f"momentum {entry}")
    assert graphs() - before == 2
    assert not compiled.sign_step_.failed
    assert not compiled.apply_signs_.failed


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
    monkeypatch.setattr(compiled.step_, "step", lambda runs, _: (sizes.extend(p.numel() for p, _, _ in runs), True)[1])
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
