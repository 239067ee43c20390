"""Steps in which nothing is new but gradients take a shorter way; whatever else changes between steps is noticed."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lion_dist import Lion
from lion_dist.update.lion_update import LionUpdate
from lion_dist.update.prepare import Preparer
from lion_dist.update.reference import HyperParameters
from lion_dist.update.segments import Segment, SegmentTable, StepTensors
from tests.asserts import assert_same_bits
from tests.marks import needs_interpreter

both = pytest.mark.parametrize("use_triton", [False, pytest.param(True, marks=needs_interpreter)])
F32, BF16 = torch.float32, torch.bfloat16


def numbers(n: int, dtype: torch.dtype = F32) -> Tensor:
    """Square matrices, so that a transposed one has the same shape; every element another number."""
    return (torch.arange(n * n, dtype=F32) - n).view(n, n).to(dtype) / 8


def model() -> list[nn.Parameter]:
    params = [nn.Parameter(numbers(n, dtype)) for n, dtype in ((4, F32), (4, F32), (5, BF16), (130, F32))]
    for p in params:
        p.grad = numbers(len(p), p.dtype) - 1
    return params


def make(params: list[nn.Parameter], use_triton: bool) -> Lion:
    groups: list[dict[str, Any]] = [{"params": params[:2], "weight_decay": 0.5}, {"params": params[2:]}]
    return Lion(groups, lr=0.25, use_triton=use_triton)


@pytest.fixture
def examined(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each step that was examined."""
    steps: list[int] = []
    examine = Preparer._examine
    monkeypatch.setattr(Preparer, "_examine", lambda self, tensors: (steps.append(1), examine(self, tensors))[1])
    return steps


@both
def test_what_a_usual_step_is(use_triton: bool, examined: list[int]) -> None:
    """Gradients with other addresses and objects; the same ones absent; an lr that changes; a part of the state that
    some parameters lack."""
    params = model()
    groups: list[dict[str, Any]] = [{"params": params[:2]}, {"params": params[2:], "master_weights": True}]
    opt = Lion(groups, lr=0.25, use_triton=use_triton)
    opt.step()
    opt.step()
    assert len(examined) == 1
    kept = []
    for number in range(3):
        kept += [p.grad for p in params]
        for p in params:
            p.grad = torch.ones_like(p)
        opt.param_groups[0]["lr"] = 0.5 + number
        opt.step()
    assert len(examined) == 1
    params[1].grad = None
    for _ in range(4):
        opt.step()
    assert len(examined) == 3  # one in which it went, and one like that, by which the next are known
    params[1].grad, params[0].grad = torch.ones_like(params[1]), None  # as many, but another one
    opt.step()
    assert len(examined) == 4


def grad_of(p: Any) -> Any:
    return p.grad


def transpose_data(t: Any) -> None:
    t.data = t.data.t()


def in_another_place(t: Any) -> None:
    t.data = t.data.clone()


def as_bfloat16(t: Any) -> None:
    t.data = t.data.to(BF16)


# Each changes tensors of parameter 1, a float32 matrix of 4 x 4, in place or not. Most leave its address as it was.
CHANGES: dict[str, Callable[[Lion, nn.Parameter], Any]] = {
    "parameter transposed": lambda opt, p: transpose_data(p),
    "parameter transposed in place": lambda opt, p: torch.no_grad()(p.t_)(),
    "parameter moved": lambda opt, p: in_another_place(p),
    "parameter in bfloat16": lambda opt, p: (setattr(p, "grad", None), as_bfloat16(p), setattr(p, "grad", p.data * 2)),
    "momentum transposed": lambda opt, p: transpose_data(opt.state[p]["exp_avg"]),
    "momentum transposed in place": lambda opt, p: opt.state[p]["exp_avg"].t_(),
    "momentum moved": lambda opt, p: in_another_place(opt.state[p]["exp_avg"]),
    "momentum in bfloat16": lambda opt, p: as_bfloat16(opt.state[p]["exp_avg"]),
    "momentum replaced": lambda opt, p: opt.state[p].update(exp_avg=numbers(4)),
    "entry replaced": lambda opt, p: opt.state.update({p: {"exp_avg": numbers(4)}}),
    "gradient transposed": lambda opt, p: transpose_data(p.grad),
    "gradient transposed in place": lambda opt, p: grad_of(p).t_(),
    "gradient moved": lambda opt, p: in_another_place(p.grad),
    "gradient in bfloat16": lambda opt, p: as_bfloat16(p.grad),
    "gradient replaced by a view": lambda opt, p: setattr(p, "grad", numbers(8)[::2, ::2]),
    "gradient absent": lambda opt, p: setattr(p, "grad", None),
    "parameters exchanged": lambda opt, p: opt.param_groups[0]["params"].reverse(),
    "group exchanged": lambda opt, p: opt.param_groups[1]["params"].append(opt.param_groups[0]["params"].pop()),
    "group exchanged, order kept": lambda opt, p: opt.param_groups[1]["params"].insert(
        0, opt.param_groups[0]["params"].pop()
    ),
}


@both
@pytest.mark.parametrize("change", list(CHANGES.values()), ids=list(CHANGES))
def test_a_change_after_usual_steps_is_noticed(use_triton: bool, change: Callable[[Lion, nn.Parameter], Any]) -> None:
    """The same bits as of an optimizer that never saw the tensors as they were."""
    params = model()
    opt = make(params, use_triton)
    for _ in range(4):
        opt.step()
    change(opt, params[1])
    twins = copy.deepcopy(params)
    of = dict(zip(params, twins, strict=True))
    fresh = Lion([{**group, "params": [of[p] for p in group["params"]]} for group in opt.param_groups],
                 use_triton=use_triton)  # fmt: skip
    for p, q in of.items():
        fresh.state[q] = {"exp_avg": opt.state[p]["exp_avg"].clone()}
    for number in range(3):  # the change is usual in the end
        for p, q in of.items():
            q.grad = None
            if p.grad is not None:
                q.grad = torch.zeros_like(q)
                q.grad.data = p.grad.clone()
        opt.step()
        fresh.step()
        for i, (p, q) in enumerate(of.items()):
            assert_same_bits(p.detach(), q.detach(), f"step {number}, parameter {i}")
            assert_same_bits(opt.state[p]["exp_avg"], fresh.state[q]["exp_avg"], f"step {number}, momentum {i}")


@both
def test_an_error_after_usual_steps_changes_nothing_and_may_be_mended(use_triton: bool) -> None:
    params = model()
    opt = make(params, use_triton)
    for _ in range(4):
        opt.step()
    before = [p.detach().clone() for p in params]
    good = params[1].grad
    for bad, message in (
        (torch.zeros(4, 4).to_sparse(), "dense gradients"),
        (torch.zeros(4, 4, dtype=torch.float64), "float64"),
        (torch.zeros(2, 4), r"shape \(2, 4\)"),
    ):
        params[1].grad = torch.zeros(4, 4)
        if bad.is_sparse:
            params[1].grad = bad
        else:
            params[1].grad.data = bad
        for _ in range(2):
            with pytest.raises((TypeError, ValueError), match=message):
                opt.step()
    for p, old in zip(params, before, strict=True):
        assert_same_bits(p.detach(), old)
    params[1].grad = good
    opt.step()
    assert not torch.equal(params[1], before[1])


@both
def test_fewer_rows_of_a_parameter_at_its_address(use_triton: bool) -> None:
    """A stale gradient and momentum have the old shape."""
    params = model()
    opt = make(params, use_triton)
    for _ in range(4):
        opt.step()
    whole = params[1].data
    before = whole.clone()
    params[1].data = whole[:2]
    with pytest.raises(ValueError, match=r"shape \(2, 4\)"):
        opt.step()
    assert_same_bits(whole, before)


def test_usual_steps_keep_no_memory() -> None:
    """Gradients and momenta that other code drops between two steps are freed."""
    params = model()
    opt = make(params, False)
    for _ in range(4):
        opt.step()
    gradient, momentum = weakref.ref(params[1].grad), weakref.ref(opt.state[params[1]]["exp_avg"])
    params[1].grad = None
    opt.state[params[1]]["exp_avg"] = torch.zeros(4, 4)
    assert gradient() is None
    assert momentum() is None


def test_flat_buffers_are_usual(examined: list[int]) -> None:
    """ShardedLion gives one buffer as the state, and in stage 2 as the gradient, of every parameter."""
    params = [torch.zeros(4, 4) for _ in range(3)]
    momenta, grads = torch.zeros(48), torch.ones(48)
    update = LionUpdate(use_triton=False)

    def step(momenta: list[Tensor], grads: list[Tensor | None]) -> None:
        segments = [Segment(i, 0, 16 * i, 16 * i, 16) for i in range(3)]
        tensors = StepTensors(params, grads, {"exp_avg": momenta}, [0, 0, 0], segments)
        update.step(update.prepare(tensors), [HyperParameters(1.0, 0.0, 0.5, 0.5, False)])

    for number in range(3):
        step([momenta] * 3, [grads] * 3)
        assert len(examined) == 1, number
    moved, other = momenta.clone(), torch.full((48,), -1.0)
    step([moved] * 3, [grads] * 3)
    assert len(examined) == 2
    step([moved, moved, momenta], [grads] * 3)  # one parameter has a buffer of its own
    assert len(examined) == 3
    step([moved] * 3, [grads, other, other])
    assert len(examined) == 4
    assert [p.unique().tolist() for p in params] == [[-6.0], [-4.0], [-4.0]]
    assert [momenta[0].item(), momenta[-1].item()] == [0.875, 0.9375]


# -- Hyper-parameters


def test_hyper_parameters_are_read_in_each_step() -> None:
    """Also those that change in place, and equal ones that are of a wrong type."""
    p = nn.Parameter(torch.zeros(1))
    p.grad = torch.ones(1)
    lr = torch.tensor(1.0)
    opt = Lion([p], lr=1.0, use_triton=False)
    group = opt.param_groups[0]

    def moved_by() -> float:
        before = p.item()
        opt.step()
        return p.item() - before

    assert [moved_by(), moved_by()] == [-1.0, -1.0]
    group["lr"] = 0.5
    assert moved_by() == -0.5
    group["lr"] = lr
    assert moved_by() == -1.0
    lr.fill_(0.25)
    assert moved_by() == -0.25
    group["lr"], group["maximize"] = 1.0, True
    assert moved_by() == 1.0
    group["maximize"] = 1
    with pytest.raises(TypeError, match="maximize must be True or False"):
        opt.step()
    group["maximize"] = False
    betas = [0.5, 0.5]
    group["betas"] = betas
    opt.state[p]["exp_avg"].fill_(-3.0)
    assert moved_by() == 1.0  # c = 0.5 * -3 + 0.5
    betas[0] = 0.0
    assert moved_by() == -1.0  # c is the gradient
    betas[0] = 2.0
    with pytest.raises(ValueError, match="betas"):
        opt.step()
    group["betas"] = (0.9, 0.99)
    opt.add_param_group({"params": [q := nn.Parameter(torch.zeros(1))], "lr": 0.125})
    q.grad = torch.ones(1)
    moved_by()
    assert q.item() == -0.125
    opt.param_groups.reverse()
    moved_by()
    assert q.item() == -0.25


# -- What torch's wrapper of step() does


def test_a_profiler_sees_the_step() -> None:
    params = model()
    opt = make(params, False)
    for _ in range(3):
        opt.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        opt.step()
    assert "Optimizer.step#Lion.step" in {event.key for event in profile.key_averages()}


def test_hooks_may_change_the_arguments_and_see_a_step_that_was_not_watched_before() -> None:
    p = nn.Parameter(torch.zeros(1))
    p.grad = torch.ones(1)
    opt = Lion([p], lr=1.0, use_triton=False)
    opt.step()
    seen: list[Any] = []

    def replace(optimizer: Any, args: Any, kwargs: Any) -> Any:
        seen.append((optimizer is opt, len(args), kwargs))
        return (opt, lambda: 7.0), {}

    handles = [opt.register_step_pre_hook(replace), register_optimizer_step_pre_hook(lambda *_: seen.append("all"))]
    assert opt.step() == 7.0
    for handle in handles:
        handle.remove()
    assert opt.step() is None
    assert seen == ["all", (True, 2, {})]


@needs_interpreter
def test_gradients_of_which_a_kernel_has_only_some_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory ran out between two tables. The step after it is given the gradients of the step before."""
    params, twins = model(), model()
    opt, twin = make(params, True), make(twins, True)
    opt.step()
    twin.step()
    old = [p.grad for p in params]
    for p in params:
        p.grad = -torch.ones_like(p)
    set_gradients, calls = SegmentTable.set_gradients, []

    def fail_once(self: SegmentTable, addresses: Sequence[int]) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError
        set_gradients(self, addresses)

    monkeypatch.setattr(SegmentTable, "set_gradients", fail_once)
    with pytest.raises(torch.OutOfMemoryError):
        opt.step()
    for p, g in zip(params, old, strict=True):
        p.grad = g
    opt.step()
    twin.step()
    for p, q in zip(params, twins, strict=True):
        assert_same_bits(p.detach(), q.detach())


def test_a_subclass_with_a_step_of_its_own() -> None:
    """torch wraps it as it wraps every optimizer's; hooks run around both, as for a subclass of torch's optimizers."""

    class Counting(Lion):
        steps = 0

        def step(self, closure: Any = None) -> Any:
            self.steps += 1
            return super().step(closure)

    p = nn.Parameter(torch.zeros(1))
    p.grad = torch.ones(1)
    opt = Counting([p], lr=1.0, use_triton=False)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, gamma=0.5)
    seen: list[int] = []
    opt.register_step_post_hook(lambda *_: seen.append(opt.steps))
    for _ in range(2):
        opt.step()
        scheduler.step()
    assert p.item() == -1.5
    assert opt.steps == 2
    assert set(seen) == {1, 2}


def test_steps_of_nothing() -> None:
    opt = Lion([nn.Parameter(torch.zeros(1), requires_grad=False)], lr=1.0, use_triton=False)
    for _ in range(2):
        opt.step()
    assert not opt.state


@both
def test_gradients_that_change_their_alignment(use_triton: bool) -> None:
    """Beside aligned parameters, in one table with gradients that are aligned."""
    params, twins = model(), model()
    opt, twin = make(params, use_triton), make(twins, use_triton)
    for shift in (0, 1, 0, 3):
        for i, (p, q) in enumerate(zip(params, twins, strict=True)):
            q.grad = -numbers(len(q), q.dtype) - shift
            memory = torch.empty(shift + q.numel(), dtype=q.dtype)
            p.grad = q.grad if i == 0 else memory[shift:].view_as(q).copy_(q.grad)
        opt.step()
        twin.step()
        for p, q in zip(params, twins, strict=True):
            assert_same_bits(p.detach(), q.detach(), f"shift {shift}")
            assert_same_bits(opt.state[p]["exp_avg"], twin.state[q]["exp_avg"], f"shift {shift}")
