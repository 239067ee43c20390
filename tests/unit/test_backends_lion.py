"""The backends through the optimizer: groups, schedules and launches."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lion_dist import Lion
from lion_dist.update.backends import triton_step
from lion_dist.update.lion_update import LionUpdate
from lion_dist.update.reference import STORAGE_DTYPES, HyperParameters
from lion_dist.update.segments import SegmentTable, StepTensors
from lion_dist.update.state import EXP_AVG
from tests.asserts import assert_same_bits, assert_same_step
from tests.marks import needs_interpreter
from tests.scenarios.mixes import (
    HYPERS,
    INTERPRETED,
    MIXES,
    Mix,
    both,
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


def model(dtype: torch.dtype = F32) -> list[nn.Parameter]:
    """Three groups' worth of parameters, some of them at odd elements of a buffer."""
    buffer = torch.randn(9000).to(dtype)
    return [
        nn.Parameter(torch.randn(37, 19).to(dtype)),
        nn.Parameter(buffer[3 : 3 + 2049]),
        nn.Parameter(buffer[2053 : 2053 + 127]),
        nn.Parameter(torch.randn(()).to(dtype)),
        nn.Parameter(buffer[2181 : 2181 + 6001].view(17, 353)),
        nn.Parameter(torch.zeros(0, dtype=dtype)),
        nn.Parameter(buffer[-1:]),
    ]


def groups_of(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [
        {"params": params[:2]},
        {"params": params[2:4], "lr": 0.5, "weight_decay": 0.0, "betas": (0.95, 0.98)},
        {"params": params[4:], "lr": torch.tensor(0.3), "weight_decay": 0.7, "maximize": True},
    ]


def expected_run(params: list[nn.Parameter]) -> tuple[list[Tensor], list[Tensor], Callable[[list, list], None]]:
    """The same parameters' copies, stepped by the definition."""
    ps, ms = [p.detach().clone() for p in params], [torch.zeros_like(p).float() for p in params]
    ms = [m if p.dtype == F16 else m.to(p.dtype) for p, m in zip(ps, ms, strict=True)]

    def step(grads: list[Tensor | None], hypers: list[HyperParameters]) -> None:
        reference_step(StepTensors(ps, grads, {EXP_AVG: ms}, [0, 0, 1, 1, 2, 2, 2]), hypers)

    return ps, ms, step


def set_grads(params: list[nn.Parameter], generator: torch.Generator, absent: int | None = None) -> list[Tensor | None]:
    """New gradients, at other addresses each step; the old ones may be freed or not."""
    for i, p in enumerate(params):
        p.grad = None if i == absent else torch.randn(p.shape, generator=generator).to(p.dtype)
    return [p.grad for p in params]


@both
@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_groups_with_a_schedule(use_triton: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight steps: lr as a number and as a tensor, by a scheduler and in place; each gradient absent once.
    Tables are made once: neither a new lr nor a new gradient is a reason to build another."""
    tables: list[int] = []
    made = SegmentTable.__init__
    monkeypatch.setattr(SegmentTable, "__init__", lambda self, *a: (tables.append(len(a[1])), made(self, *a))[1])
    launches: list[int] = []
    if use_triton:
        launch = triton_step.lion_step
        monkeypatch.setattr(triton_step, "lion_step", lambda t, *a: (launches.append(len(t.rows)), launch(t, *a))[1])
    params = model(dtype)
    buffer = params[1].detach().as_strided((9000,), (1,), 0)
    gaps = torch.ones(9000, dtype=torch.bool)
    for p in (params[1], params[2], params[4], params[6]):
        gaps[p.storage_offset() : p.storage_offset() + p.numel()] = False
    between = buffer[gaps].clone()
    ps, ms, step = expected_run(params)
    lr_tensor = torch.tensor(0.3)
    groups = groups_of(params)
    groups[2]["lr"] = lr_tensor
    opt = Lion(groups, lr=0.25, weight_decay=0.1, use_triton=use_triton)
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 1 / (1 + t))
    generator = torch.Generator().manual_seed(2)
    for t in range(8):
        grads = set_grads(params, generator, absent=t % 7 if t else None)
        hypers = [
            HyperParameters(0.25 / (1 + t), 0.1, 0.9, 0.99, False),
            HyperParameters(0.5 / (1 + t), 0.0, 0.95, 0.98, False),
            HyperParameters(opt.param_groups[2]["lr"].clone(), 0.7, 0.9, 0.99, True),
        ]
        before = [(p.detach().clone(), opt.state[p]["exp_avg"].clone()) for p in params] if t else []
        opt.step()
        step(grads, hypers)
        for i, p in enumerate(params):
            assert_same_bits(p.detach(), ps[i], f"step {t} parameter {i}")
            assert_same_bits(opt.state[p]["exp_avg"], ms[i], f"step {t} momentum {i}")
            if t and grads[i] is None:
                assert_same_bits(p.detach(), before[i][0], "inactive parameter")
                assert_same_bits(opt.state[p]["exp_avg"], before[i][1], "inactive momentum")
        scheduler.step()
        opt.param_groups[2]["lr"].mul_(0.5)
    assert_same_bits(buffer[gaps], between, "elements between the segments")
    nonempty = 6
    assert tables == ([nonempty] if use_triton else [])
    assert launches == ([nonempty] * 8 if use_triton else [])


@needs_interpreter
def test_one_launch_a_mix_of_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    launches: list[tuple[torch.dtype, int]] = []
    launch = triton_step.lion_step
    monkeypatch.setattr(
        triton_step,
        "lion_step",
        lambda t, mix, *a: (launches.append((mix.param, len(t.rows))), launch(t, mix, *a))[1],
    )
    params = [nn.Parameter(torch.randn(n).to(d)) for n, d in [(5, F32), (300, F16), (77, F32), (9, F16), (8193, F32)]]
    groups: list[dict[str, Any]] = [{"params": params[:2], "lr": 0.1}, {"params": params[2:]}]
    opt = Lion(groups, use_triton=True)
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    assert sorted(launches, key=str) == [(F16, 2), (F32, 3)]


@needs_interpreter
def test_only_a_move_rebuilds_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    tables: list[int] = []
    made = SegmentTable.__init__
    monkeypatch.setattr(SegmentTable, "__init__", lambda self, *a: (tables.append(1), made(self, *a))[1])
    p, q = (nn.Parameter(torch.ones(300)) for _ in range(2))
    opt = Lion([p, q], lr=0.25, use_triton=True)
    built = []
    for change in (
        lambda: None,
        lambda: setattr(p, "grad", torch.ones(300)),
        lambda: setattr(q, "grad", None),
        lambda: setattr(q, "grad", torch.ones(300)),
        lambda: setattr(p, "data", p.data.clone()),
        lambda: opt.state[q].update(exp_avg=torch.ones(300)),
    ):
        if q.grad is None and p.grad is None:
            p.grad, q.grad = torch.ones(300), torch.ones(300)
        change()
        opt.step()
        built.append(len(tables))
    # The first step builds one; gradients that come, go or move none; a new parameter or momentum one each.
    assert built == [1, 1, 1, 1, 2, 3]
    assert_same_bits(p.detach(), torch.full((300,), 1 - 6 * 0.25))
    assert_same_bits(q.detach(), torch.full((300,), 1 - 5 * 0.25))


@both
@pytest.mark.parametrize("scale", [0.0, 0.5, 1 / 3, -1.0, math.inf, math.nan])
def test_grad_scale(use_triton: bool, scale: float) -> None:
    columns = tensors((F32, BF16, F16), [(3,), (2049,), (9, 9)])
    expected = copy_of(columns)
    step_by(LionUpdate(use_triton), columns, HYPERS, torch.tensor(scale))
    reference_step(expected, HYPERS, torch.tensor(scale))
    assert_same_step(columns, expected)


def specials(dtype: torch.dtype) -> list[float]:
    """Zeros, ones, infinities, NaN; the largest finite numbers of every dtype, and what overflows a smaller one."""
    largest = [torch.finfo(d).max for d in STORAGE_DTYPES]
    positive = [0.0, 1.0, 65519.0, 65520.0, 1e6, 3.395e38, 3.4e38, *largest, math.inf, math.nan]
    # What this dtype rounds to infinity is there once.
    return [sign * x for x in positive for sign in (1, -1) if x < math.inf and x <= torch.finfo(dtype).max] + [
        math.inf, -math.inf, math.nan,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("use_triton", "mix"),
    [
        *[pytest.param(False, mix, id=f"torch-{name(mix)}") for mix in MIXES],
        *[
            pytest.param(True, mix, id=f"interpreter-{name(mix)}", marks=needs_interpreter)
            for mix in INTERPRETED
            if mix[0] == F32 or mix == (F16, F16, F16)
        ],
    ],
)
def test_values_that_are_not_finite(use_triton: bool, mix: Mix) -> None:
    """Every pair of special gradient and momentum, in a whole block and a masked one, under each group's
    hyper-parameters (maximize, lr = 0, betas of 0) and several clipping coefficients."""
    pairs = torch.cartesian_prod(torch.tensor(specials(mix[1])), torch.tensor(specials(mix[2])))
    g, m = (column.repeat(-(-2500 // len(pairs))) for column in pairs.unbind(1))
    p = torch.linspace(-2, 2, len(g))
    p, g, m = (x.to(dtype) for x, dtype in zip((p, g, m), mix, strict=True))
    columns = StepTensors([p] * 5, [g] * 5, {EXP_AVG: [m] * 5}, [*range(len(HYPERS))])
    for scale in (None, 0.37, 0.0, -1e30, math.inf):
        got, expected = copy_of(columns), copy_of(columns)
        grad_scale = None if scale is None else torch.tensor(scale)
        step_by(LionUpdate(use_triton), got, HYPERS, grad_scale)
        reference_step(expected, HYPERS, grad_scale)
        assert_same_step(got, expected)
        for p, m, hyper in zip(got.params, momenta(got), HYPERS, strict=True):
            assert not m.isinf().any()
            assert hyper.lr == 0 or torch.equal(p.isnan(), m.isnan())


def channels_last(*shape: int) -> Tensor:
    return torch.randn(shape).to(memory_format=torch.channels_last)


STRIDES: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]] = {
    "transposed gradient": (lambda: torch.randn(64, 33), lambda: torch.randn(33, 64).t()),
    "transposed parameter": (lambda: torch.randn(33, 64).t(), lambda: torch.randn(64, 33)),
    "both transposed": (lambda: torch.randn(33, 64).t(), lambda: torch.randn(33, 64).t()),
    "channels-last parameter": (lambda: channels_last(4, 6, 5, 7), lambda: torch.randn(4, 6, 5, 7)),
    "channels-last gradient": (lambda: torch.randn(4, 6, 5, 7), lambda: channels_last(4, 6, 5, 7)),
    "expanded gradient": (lambda: torch.randn(50, 7), lambda: torch.randn(7).expand(50, 7)),
    "gradient with gaps": (lambda: torch.randn(50, 7), lambda: torch.randn(50, 9)[:, 1:8]),
    "parameter with gaps": (lambda: torch.randn(50, 9)[:, :5], lambda: torch.randn(50, 5)),
    "gaps everywhere": (lambda: torch.randn(50, 9)[:, :5], lambda: torch.randn(50, 11)[:, 3:8]),
    "every other element": (lambda: torch.randn(600)[::2], lambda: torch.randn(300)),
    "one row of odd stride": (lambda: torch.randn(90).as_strided((1, 40), (77, 1)), lambda: torch.randn(1, 40)),
}


@both
@pytest.mark.parametrize(("make_p", "make_g"), STRIDES.values(), ids=STRIDES.keys())
def test_strides(use_triton: bool, make_p: Callable[[], Tensor], make_g: Callable[[], Tensor]) -> None:
    p, plain_neighbour = nn.Parameter(make_p()), nn.Parameter(torch.randn(130))
    params = [p, plain_neighbour]
    storage = p.detach().as_strided((p.untyped_storage().nbytes() // 4,), (1,), 0)
    storage_before, expected = storage.clone(), [q.detach().clone() for q in params]
    momenta = [torch.zeros_like(e, memory_format=torch.contiguous_format) for e in expected]
    opt = Lion(params, lr=0.25, weight_decay=0.1, use_triton=use_triton)
    strides = p.stride()
    for _ in range(3):
        p.grad, plain_neighbour.grad = make_g(), torch.randn(130)
        grads: list[Any] = [None if q.grad is None else q.grad.clone() for q in params]
        opt.step()
        reference_step(
            StepTensors(expected, grads, {EXP_AVG: momenta}, [0, 0]), [HyperParameters(0.25, 0.1, 0.9, 0.99, False)]
        )
    for q, e, m in zip(params, expected, momenta, strict=True):
        assert_same_bits(q.detach(), e)
        assert_same_bits(opt.state[q]["exp_avg"], m)
    assert p.stride() == strides
    assert p.grad is not None
    assert_same_bits(p.grad, grads[0], "the gradient is only read")
    own = torch.zeros(len(storage), dtype=torch.bool)
    own.as_strided(p.shape, p.stride(), p.storage_offset()).fill_(True)
    assert_same_bits(storage[~own], storage_before[~own], "elements in the gaps")


@both
@pytest.mark.parametrize(
    ("bad", "momentum_dtype"), [(math.inf, None), (-math.inf, None), (7e6, F16), (-1e38, F16), (3.4e38, BF16)]
)
def test_one_infinite_gradient_is_not_silent(use_triton: bool, bad: float, momentum_dtype: torch.dtype | None) -> None:
    """Its weight becomes NaN at once, and does not walk by lr for ever; the one beside it trains on."""
    betas = (0.9, 0.0) if momentum_dtype == BF16 else (0.9, 0.99)  # a mean of bfloat16's range does not leave it
    p = nn.Parameter(torch.zeros(2))
    opt = Lion([p], lr=1e-3, betas=betas, momentum_dtype=momentum_dtype, use_triton=use_triton)
    for number in range(10):
        p.grad = p.detach() - 1
        if number == 3:
            p.grad[0] = bad
        opt.step()
        expected = torch.tensor([number >= 3, False])
        assert torch.equal(p.detach().isnan(), expected)
        assert torch.equal(opt.state[p]["exp_avg"].isnan(), expected)
    assert p[1].item() == pytest.approx(0.01)


@both
def test_autograd_notices_a_step_between_forward_and_backward(use_triton: bool) -> None:
    """A kernel writes by address; without the version counter the backward would use the new weight silently."""
    w, x = nn.Parameter(torch.randn(5, 5)), torch.randn(5, 5, requires_grad=True)
    untouched = nn.Parameter(torch.randn(5, 5))
    opt = Lion([w, untouched], use_triton=use_triton)
    loss, other = (x @ w).square().sum(), (x @ untouched).square().sum()
    w.grad = torch.ones(5, 5)
    version = untouched._version
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    assert untouched._version == version
    other.backward()
