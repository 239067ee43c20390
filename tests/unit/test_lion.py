"""Lion as a torch.optim.Optimizer and as a drop-in for lion_pytorch.Lion; and what it refuses, changing nothing.

Weights of a few hundred elements: what is tested here is state and contracts, not arithmetic. Learning rates
are powers of two where a result is written out, so that it is exact in every dtype. Results are compared bit
for bit: the smallest difference a wrong sign could make is 2 * lr.
"""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections.abc import Callable
from typing import Any

import lion_pytorch
import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR

from lion_dist import Lion
from tests.asserts import assert_same_bits, assert_same_params
from tests.marks import needs_interpreter
from tests.scenarios.lion_params import feed, params_of, run

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


# -- A drop-in for lion_pytorch.Lion


def test_arguments_are_in_the_order_of_lion_pytorch() -> None:
    ours, theirs = (list(inspect.signature(cls.__init__).parameters.values()) for cls in (Lion, lion_pytorch.Lion))
    assert [p.name for p in ours[: len(theirs)]] == [p.name for p in theirs]
    for a, b in zip(ours, theirs, strict=False):
        if a.name != "use_triton":  # None, "wherever it can", where lion_pytorch says False
            assert a.default == b.default, a.name
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(theirs) :])
    opt = Lion(params_of(), 0.5, (0.8, 0.7), 0.25, False, True)
    group = opt.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"], group["decoupled_weight_decay"]) == (
        0.5, (0.8, 0.7), 0.25, True,
    )  # fmt: skip


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_same_weights_as_lion_pytorch(weight_decay: float, decoupled: bool) -> None:
    """With an lr that moves away from its first value, which is what decoupled decay is divided by."""
    ours, theirs = params_of(), params_of()
    args = (2.0**-7, (0.95, 0.98), weight_decay, False, decoupled)
    for cls, params in ((Lion, ours), (lion_pytorch.Lion, theirs)):
        opt = cls(params, *args)
        for step in range(10):
            feed(params, step)
            opt.step()
            opt.param_groups[0]["lr"] /= 2
    assert_same_params(ours, theirs)
    start = params_of()
    assert not torch.equal(ours[0], start[0])


def test_decoupled_decay_is_by_the_constructors_lr() -> None:
    """In every group, one with an lr of 0 among them; a state_dict brings that lr along."""
    start = torch.full((4,), 1024.0)

    def made(cls: Callable[..., Any]) -> tuple[list[nn.Parameter], Any]:
        params = [nn.Parameter(start.clone()) for _ in range(3)]
        lrs: list[dict[str, Any]] = [{}, {"lr": 2.0**-4}, {"lr": 0.0}]
        groups = [{"params": [p], **lr} for p, lr in zip(params, lrs, strict=True)]
        opt = cls(groups, lr=2.0**-3, weight_decay=0.5, decoupled_weight_decay=True)
        for p in params:
            p.grad = torch.zeros(4)
        opt.step()
        return params, opt

    (ours, opt), (theirs, _) = made(Lion), made(lion_pytorch.Lion)
    assert_same_params(ours, theirs)
    for p, share in zip(ours, (0.5, 0.25, 0.0), strict=True):
        assert_same_bits(p.detach(), start * (1 - share))
    for group in opt.param_groups:
        group["lr"] /= 2
    again = Lion([{"params": [p]} for p in ours], lr=1.0, decoupled_weight_decay=True)
    again.load_state_dict(opt.state_dict())
    again.step()  # divided by 2^-3, not by 1, as in the run that was saved
    for p, share in zip(ours, (0.375, 0.65625, 1.0), strict=True):
        assert_same_bits(p.detach(), start * share)


def test_the_constructors_lr_is_kept_from_schedulers_and_copies() -> None:
    """An lr tensor is filled in place, also that of the defaults, from which a later group is made."""
    p, q = (nn.Parameter(torch.full((4,), 1024.0)) for _ in range(2))
    opt = Lion([p], lr=torch.tensor(0.25), weight_decay=0.5, decoupled_weight_decay=True)
    opt.param_groups[0]["lr"].fill_(0.125)
    (q,), opt = copy.deepcopy(([q], opt))
    opt.add_param_group({"params": [q], "lr": 0.25})
    assert [group["init_lr"] for group in opt.param_groups] == [0.25, 0.25]
    q.grad = torch.zeros(4)
    opt.step()
    assert_same_bits(q.detach(), torch.full((4,), 512.0))


def test_a_saved_initial_lr_of_a_group_still_counts() -> None:
    """Older versions kept each group's own: such a run goes on as it was."""
    p = nn.Parameter(torch.full((4,), 1024.0))
    opt = Lion([p], lr=0.25, weight_decay=0.5, decoupled_weight_decay=True)
    saved = opt.state_dict()
    saved["param_groups"][0]["init_lr"] = 0.5
    opt.load_state_dict(saved)
    p.grad = torch.zeros(4)
    opt.step()
    assert_same_bits(p.detach(), torch.full((4,), 768.0))


def test_resumes_from_a_state_dict_of_lion_pytorch() -> None:
    theirs = params_of()
    peer = lion_pytorch.Lion(theirs, lr=2.0**-6, weight_decay=0.1, betas=(0.95, 0.98))
    run(peer, theirs, range(5))
    ours = [nn.Parameter(p.detach().clone()) for p in theirs]
    opt = Lion(ours, lr=1.0)
    opt.load_state_dict(peer.state_dict())
    assert opt.param_groups[0]["betas"] == (0.95, 0.98)
    for a, b in zip(ours, theirs, strict=True):
        assert set(opt.state[a]) == {"exp_avg"}
        assert_same_bits(opt.state[a]["exp_avg"], peer.state[b]["exp_avg"])
    run(peer, theirs, range(5, 10))
    run(opt, ours, range(5, 10))
    assert_same_params(ours, theirs)


# -- step(): closures, hooks, schedulers, scalers


def test_a_closure_runs_with_gradients_and_its_value_is_returned() -> None:
    p = nn.Parameter(torch.tensor([3.0, -3.0]))
    opt = Lion([p], lr=0.25)
    called = []

    def closure() -> Any:
        called.append(torch.is_grad_enabled())
        opt.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        loss: Any = opt.step(closure)
    assert called == [True]
    assert loss.item() == 18.0
    assert p.tolist() == [2.75, -2.75]
    assert opt.step() is None


def test_hooks_run() -> None:
    params = params_of()
    opt = Lion(params, lr=0.25)
    seen: list[str] = []
    opt.register_step_pre_hook(lambda *_: seen.append("step pre"))
    opt.register_step_post_hook(lambda *_: seen.append("step post"))
    opt.register_state_dict_pre_hook(lambda *_: seen.append("state pre"))
    opt.register_state_dict_post_hook(lambda *_: seen.append("state post"))
    opt.register_load_state_dict_pre_hook(lambda *_: seen.append("load pre"))
    opt.register_load_state_dict_post_hook(lambda *_: seen.append("load post"))
    run(opt, params, range(1))
    opt.load_state_dict(opt.state_dict())
    assert seen == ["step pre", "step post", "state pre", "state post", "load pre", "load post"]


def test_a_load_hook_may_edit_the_dict() -> None:
    """Here it renames what another optimizer calls its momentum, and drops its second moment."""
    params = params_of()
    adam = torch.optim.Adam(params, lr=0.25)
    run(adam, params, range(2))
    opt = Lion(params)

    def edit(_: torch.optim.Optimizer, given: dict[str, Any]) -> dict[str, Any]:
        state = {i: {"exp_avg": s["exp_avg"] * 2} for i, s in given["state"].items()}
        return {"state": state, "param_groups": [{"lr": 0.5, "params": given["param_groups"][0]["params"]}]}

    handle = opt.register_load_state_dict_pre_hook(edit)
    opt.load_state_dict(adam.state_dict())
    assert opt.param_groups[0]["lr"] == 0.5
    for p in params:
        assert_same_bits(opt.state[p]["exp_avg"], adam.state[p]["exp_avg"] * 2)
    handle.remove()
    with pytest.raises(ValueError, match="another optimizer"):
        opt.load_state_dict(adam.state_dict())


def test_a_load_leaves_no_hook_behind() -> None:
    opt = Lion(params_of())
    hooks = len(opt._optimizer_load_state_dict_pre_hooks)
    opt.load_state_dict(opt.state_dict())
    with pytest.raises(ValueError, match="state_dict"):
        opt.load_state_dict({})
    assert len(opt._optimizer_load_state_dict_pre_hooks) == hooks


SCHEDULERS = {
    "LambdaLR": lambda opt: LambdaLR(opt, lambda t: 0.5**t),
    "OneCycleLR": lambda opt: OneCycleLR(opt, max_lr=0.5, total_steps=12),
    "CosineAnnealingLR": lambda opt: CosineAnnealingLR(opt, T_max=8),
}


@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS.keys())
def test_schedulers(make: Callable[[Lion], Any]) -> None:
    """OneCycleLR writes betas too. A tensor lr is float32 and taken as exact, so the number that it is compared
    with is rounded to float32 each step."""
    runs: dict[Any, Any] = {}
    for kind in ("number", "tensor", "by hand"):
        params = params_of()
        opt = Lion(params, lr=torch.tensor(0.25) if kind == "tensor" else 0.25, weight_decay=0.1)
        scheduler = make(opt)
        lrs = []
        for step in range(8):
            group = opt.param_groups[0]
            if kind == "by hand":
                lr, betas = runs["tensor"][1][step]
                fresh = Lion(params, lr=lr, betas=betas, weight_decay=0.1)
                fresh.state = opt.state
                feed(params, step)
                fresh.step()
                opt.state = fresh.state
                continue
            lrs.append((float(group["lr"]), tuple(group["betas"])))
            feed(params, step)
            opt.step()
            scheduler.step()
        runs[kind] = (params, lrs)
    assert len({lr for lr, _ in runs["number"][1]}) > 5
    for (a, betas_a), (b, betas_b) in zip(runs["number"][1], runs["tensor"][1], strict=True):
        assert a == pytest.approx(b, rel=1e-6)
        assert betas_a == betas_b
    assert_same_params(runs["tensor"][0], runs["by hand"][0])
    assert not torch.equal(runs["number"][0][0], params_of()[0])


def test_an_lr_tensor_is_filled_in_place_and_replaced_by_a_load() -> None:
    p = nn.Parameter(torch.zeros(3))
    lr = torch.tensor(0.25)
    opt = Lion([p], lr=lr)
    p.grad = torch.ones(3)
    opt.step()
    lr.fill_(0.5)
    opt.step()
    assert p.tolist() == [-0.75] * 3
    opt.load_state_dict(opt.state_dict())
    opt.param_groups[0]["lr"].fill_(1.0)
    opt.step()
    assert p.tolist() == [-1.75] * 3


@pytest.mark.parametrize("finite", [True, False])
def test_grad_scaler(finite: bool) -> None:
    p = nn.Parameter(torch.ones(4))
    opt = Lion([p], lr=0.25)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    x = torch.tensor([1.0, 2.0, 3.0, 4.0 if finite else math.inf])
    scaler.scale((p * x).sum()).backward()
    scaler.step(opt)
    scaler.update()
    if finite:
        assert p.tolist() == [0.75] * 4
        assert torch.allclose(opt.state[p]["exp_avg"], 0.01 * x, rtol=1e-6)  # unscaled
        assert scaler.get_scale() == 1024
    else:
        assert p.tolist() == [1.0] * 4
        assert not opt.state
        assert scaler.get_scale() == 512


def test_a_group_is_added_later() -> None:
    a, b = params_of(seed=1), params_of(seed=2)
    opt = Lion(a, lr=0.25, weight_decay=0.5)
    run(opt, a, range(2))
    opt.add_param_group({"params": b, "lr": 0.5, "momentum_dtype": BF16})
    group = opt.param_groups[1]
    assert (group["weight_decay"], group["init_lr"], group["betas"]) == (0.5, 0.25, (0.9, 0.99))
    feed(a, 2)
    feed(b, 2)
    opt.step()
    expected_a, expected_b = params_of(seed=1), params_of(seed=2)
    run(Lion(expected_a, lr=0.25, weight_decay=0.5), expected_a, range(3))
    run(Lion(expected_b, lr=0.5, weight_decay=0.5, momentum_dtype=BF16), expected_b, range(2, 3))
    assert_same_params(a, expected_a)
    assert_same_params(b, expected_b)
    assert opt.state[b[0]]["exp_avg"].dtype == BF16


@pytest.mark.parametrize("use_triton", [False, pytest.param(True, marks=needs_interpreter)])
def test_a_weight_saved_for_the_backward_is_guarded(use_triton: bool) -> None:
    layer = nn.Linear(4, 4, bias=False)
    opt = Lion(layer.parameters(), lr=0.25, use_triton=use_triton)
    layer.weight.grad = torch.ones(4, 4)
    loss = layer(torch.randn(2, 4, requires_grad=True)).sum()
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# -- torch.compile


def test_a_compiled_step_is_not_traced() -> None:
    """Neither alone nor within a compiled function, whose other parts are compiled: the same bits, no warning and no
    graph of ours. fullgraph=True cannot be had, and says at which function."""
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(len([n for n in graph.graph.nodes if n.op.startswith("call")]))
        return graph.forward

    torch._dynamo.reset()
    params, twins = params_of(), params_of()
    opt, twin = Lion(params, lr=0.25, weight_decay=0.1), Lion(twins, lr=0.25, weight_decay=0.1)
    compiled = torch.compile(opt.step, backend=backend)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(3):
            feed(params, step)
            compiled()
            opt.param_groups[0]["lr"] /= 2
            feed(twins, step)
            twin.step()
            twin.param_groups[0]["lr"] /= 2
    assert_same_params(params, twins)
    assert not graphs

    def scaled_step(x: Tensor) -> Tensor:
        y = x * 2 + 1
        opt.step()
        return y

    assert torch.compile(scaled_step, backend=backend)(torch.ones(2)).tolist() == [3.0, 3.0]
    assert graphs == [2]
    twin.step()
    assert_same_params(params, twins)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="step"):
        torch.compile(lambda: opt.step(), backend=backend, fullgraph=True)()
    assert_same_params(params, twins)
    torch._dynamo.reset()
