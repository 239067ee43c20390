"""Lion's state: when it is made, saved, loaded and copied."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lion_dist import Lion
from tests.asserts import assert_same_bits, assert_same_momenta, assert_same_params
from tests.marks import needs_interpreter
from tests.scenarios.lion_params import feed, params_of, run

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def test_state_is_made_at_the_first_step_for_all_that_can_learn() -> None:
    learning, without_grad, frozen = (nn.Parameter(torch.ones(5)) for _ in range(3))
    empty, scalar = nn.Parameter(torch.ones(0)), nn.Parameter(torch.ones(()))
    frozen.requires_grad_(False)
    opt = Lion([learning, without_grad, frozen, empty, scalar], lr=0.25, weight_decay=0.5)
    assert not opt.state
    for p in (learning, empty, scalar):
        p.grad = torch.ones_like(p)
    opt.step()
    assert list(opt.state) == [learning, without_grad, empty, scalar]
    for owner, entry in opt.state.items():
        assert entry.keys() == {"exp_avg"}
        assert entry["exp_avg"].shape == owner.shape
        assert not entry["exp_avg"].requires_grad
    assert_same_bits(without_grad.detach(), torch.ones(5))
    assert_same_bits(opt.state[without_grad]["exp_avg"], torch.zeros(5))
    assert_same_bits(frozen.detach(), torch.ones(5))
    assert_same_bits(scalar.detach(), torch.tensor(0.625))
    frozen.requires_grad_(True)
    opt.step()
    assert list(opt.state)[-1] is frozen


def test_without_any_gradient_nothing_moves() -> None:
    params = params_of()
    opt = Lion(params, lr=0.25, weight_decay=0.5)
    opt.step()
    assert_same_params(params, params_of())
    assert len(opt.state) == len(params)


@pytest.mark.parametrize(
    ("dtype", "asked", "expected"),
    [(F32, None, F32), (BF16, None, BF16), (F16, None, F32), (F32, BF16, BF16), (BF16, F32, F32), (F16, F16, F16)],
    ids=str,
)
def test_momentum_dtype_survives_a_state_dict(
    dtype: torch.dtype, asked: torch.dtype | None, expected: torch.dtype
) -> None:
    params = params_of(dtype)
    opt = Lion(params, lr=0.25, momentum_dtype=asked)
    run(opt, params, range(3))
    saved = opt.state_dict()
    fresh = [nn.Parameter(p.detach().clone()) for p in params]
    other = Lion(fresh, momentum_dtype=asked)
    other.load_state_dict(saved)
    assert {m["exp_avg"].dtype for m in other.state.values()} == {expected}
    assert_same_momenta(other, opt)
    # The caller's tensors are his: neither the loaded optimizer nor its source writes to them.
    kept = copy.deepcopy(saved)
    run(other, fresh, range(3, 6))
    for i, entry in saved["state"].items():
        assert_same_bits(entry["exp_avg"], kept["state"][i]["exp_avg"])
    run(opt, params, range(3, 6))
    assert_same_params(fresh, params)


def test_a_saved_momentum_keeps_its_dtype_unless_the_saved_group_names_another() -> None:
    params = params_of(BF16)
    source = Lion(params, momentum_dtype=F32)
    run(source, params, range(2))
    saved = source.state_dict()
    saved["param_groups"][0]["momentum_dtype"] = None
    opt = Lion(params)
    opt.load_state_dict(saved)
    assert {m["exp_avg"].dtype for m in opt.state.values()} == {F32}
    saved["param_groups"][0]["momentum_dtype"] = BF16
    opt.load_state_dict(saved)
    assert {m["exp_avg"].dtype for m in opt.state.values()} == {BF16}


def test_saved_to_a_file_without_pickled_code() -> None:
    params = params_of(BF16)
    opt = Lion(params, lr=torch.tensor(0.25), weight_decay=0.5, momentum_dtype=F32)
    run(opt, params, range(3))
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    other = Lion([nn.Parameter(p.detach().clone()) for p in params])
    other.load_state_dict(torch.load(file, weights_only=True))
    assert_same_momenta(other, opt)
    group = {k: v for k, v in other.param_groups[0].items() if k != "params"}
    assert group == {k: v for k, v in opt.param_groups[0].items() if k != "params"}


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("use_triton", [None, False, pytest.param(True, marks=needs_interpreter)])
def test_copies_step_independently(copied: Callable[[Any], Any], use_triton: bool | None) -> None:
    params = params_of(BF16 if not use_triton else F16)
    opt = Lion(params, lr=0.25, momentum_dtype=F32, maximize=True, use_triton=use_triton)
    run(opt, params, range(2))
    twin_params, twin = copied((params, opt))
    assert twin._use_triton is use_triton
    assert_same_momenta(twin, opt)
    before = [p.detach().clone() for p in params]
    run(twin, twin_params, range(2, 4))
    for p, old in zip(params, before, strict=True):
        assert_same_bits(p.detach(), old)
    run(opt, params, range(2, 4))
    assert_same_params(twin_params, params)
    assert_same_momenta(twin, opt)


def test_a_copy_before_the_first_step() -> None:
    params, opt = copy.deepcopy(((p := params_of()), Lion(p, lr=0.25)))
    feed(params, 0)
    opt.step()
    assert not torch.equal(params[0], params_of()[0])


@pytest.mark.parametrize("door", ["load_state_dict", "__setstate__"])
def test_groups_of_an_older_version(door: str) -> None:
    """Keys that the dict does not know stay as this optimizer had them."""
    params = params_of()
    opt = Lion(params, lr=0.25, weight_decay=0.5, maximize=True, decoupled_weight_decay=True, momentum_dtype=BF16)
    run(opt, params, range(1))
    if door == "load_state_dict":
        old = opt.state_dict()
        old["param_groups"] = [{"lr": 0.125, "betas": (0.5, 0.5), "params": old["param_groups"][0]["params"]}]
        opt.load_state_dict(old)
    else:
        opt.__setstate__({"state": opt.state, "param_groups": [{"lr": 0.125, "betas": (0.5, 0.5), "params": params}]})
    group = {k: v for k, v in opt.param_groups[0].items() if k != "params"}
    assert group == {
        "lr": 0.125, "betas": (0.5, 0.5), "weight_decay": 0.5, "decoupled_weight_decay": True, "init_lr": 0.25,
        "momentum_dtype": BF16, "master_weights": False, "maximize": True, "rounding_step": 0,
    }  # fmt: skip
    run(opt, params, range(1, 2))


def test_a_pickle_of_an_older_version() -> None:
    """Groups hold the first keys alone; the defaults fill in the rest."""
    params = params_of()
    opt = Lion.__new__(Lion)
    opt.__setstate__({
        "defaults": {"lr": 0.25, "betas": (0.9, 0.99), "weight_decay": 0.0, "decoupled_weight_decay": False,
                     "momentum_dtype": None, "maximize": False},
        "state": {},
        "param_groups": [{"params": params, "lr": 0.25, "betas": (0.9, 0.99), "weight_decay": 0.0}],
        "_use_triton": None,
    })  # fmt: skip
    expected = params_of()
    run(Lion(expected, lr=0.25), expected, range(1))
    opt.state.update({p: {"exp_avg": torch.zeros_like(p)} for p in params})
    run(opt, params, range(1))
    assert_same_params(params, expected)


def test_named_parameters() -> None:
    model = nn.Linear(3, 2)
    opt = Lion(model.named_parameters(), lr=0.25)
    assert opt.param_groups[0]["param_names"] == ["weight", "bias"]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    other = Lion(model.named_parameters())
    other.load_state_dict(opt.state_dict())
    assert other.param_groups[0]["param_names"] == ["weight", "bias"]
    assert_same_momenta(other, opt)


def test_state_of_the_user_is_honoured() -> None:
    p = nn.Parameter(torch.zeros(4, 4))
    opt = Lion([p], lr=0.25, betas=(0.5, 0.5))
    p.grad = torch.ones(4, 4)
    opt.step()
    opt.state[p]["exp_avg"] = torch.full((4, 4), -8.0)
    opt.step()
    assert_same_bits(p.detach(), torch.zeros(4, 4))  # a step down, and one up by the new momentum
    assert_same_bits(opt.state[p]["exp_avg"], torch.full((4, 4), -3.5))
    opt.state.clear()
    opt.step()
    assert_same_bits(p.detach(), torch.full((4, 4), -0.25))
    assert_same_bits(opt.state[p]["exp_avg"], torch.full((4, 4), 0.5))


@pytest.mark.parametrize("use_triton", [False, pytest.param(True, marks=needs_interpreter)])
def test_a_momentum_that_changes_its_strides_alone(use_triton: bool) -> None:
    """The same address, dtype and shape: a plan that compared only those would step the wrong elements."""
    p = nn.Parameter(torch.zeros(4, 4))
    opt = Lion([p], lr=0.25, betas=(0.5, 0.5), use_triton=use_triton)
    p.grad = torch.zeros(4, 4)
    opt.step()
    opt.state[p]["exp_avg"].copy_(torch.arange(-7.0, 9.0).view(4, 4))
    opt.state[p]["exp_avg"] = opt.state[p]["exp_avg"].t()
    opt.step()
    m = torch.arange(-7.0, 9.0).view(4, 4).t()
    assert_same_bits(opt.state[p]["exp_avg"], m * 0.5)
    assert torch.equal(p, -0.25 * m.sign())


@pytest.mark.parametrize("use_triton", [False, pytest.param(True, marks=needs_interpreter)])
def test_parameters_that_move(use_triton: bool) -> None:
    p = nn.Parameter(torch.zeros(300))
    opt = Lion([p], lr=0.25, use_triton=use_triton)
    p.grad = torch.ones(300)
    opt.step()
    old = p.data
    p.data = torch.full((300,), 5.0)
    opt.step()
    assert_same_bits(p.detach(), torch.full((300,), 4.75))
    assert_same_bits(old, torch.full((300,), -0.25))
    # Weights that change their dtype keep their momentum, in the dtype it has.
    model = nn.Linear(7, 3)
    opt = Lion(model.parameters(), lr=0.25, use_triton=use_triton)
    for q in model.parameters():
        q.data.zero_()
        q.grad = torch.ones_like(q)
    opt.step()
    model.to(F16)
    for q in model.parameters():
        assert q.dtype == F16
        q.grad = torch.ones_like(q)
    opt.step()
    for q in model.parameters():
        assert_same_bits(q.detach(), torch.full_like(q, -0.5))
        assert opt.state[q]["exp_avg"].dtype == F32


@pytest.mark.parametrize("use_triton", [False, pytest.param(True, marks=needs_interpreter)])
def test_groups_swapped_between_steps(use_triton: bool) -> None:
    """DeepSpeed's ZeRO steps so: step() is called once for each group, each time with one group of one flat partition
    (stages 1, 2), or with the other groups emptied (stage 3)."""
    hypers: list[dict[str, Any]] = [
        {"lr": 0.25, "weight_decay": 0.5},
        {"lr": 0.5, "betas": (0.95, 0.98)},
        {"lr": 0.125, "maximize": True},
    ]

    def made() -> tuple[list[nn.Parameter], Lion]:
        generator = torch.Generator().manual_seed(3)
        params = [nn.Parameter(torch.randn(n, generator=generator)) for n in (300, 300, 130)]
        return params, Lion([{"params": [p], **h} for p, h in zip(params, hypers, strict=True)], use_triton=use_triton)

    (whole, at_once), (one, by_one), (emptied, by_emptying) = made(), made(), made()
    for step in range(3):
        run(at_once, whole, range(step, step + 1))
        feed(one, step)
        groups = by_one.param_groups
        for group in groups:
            by_one.param_groups = [group]
            by_one.step()
        by_one.param_groups = groups
        feed(emptied, step)
        for i, p in enumerate(emptied):
            for j, group in enumerate(by_emptying.param_groups):
                group["params"] = [p] if i == j else []
            by_emptying.step()
    assert_same_params(one, whole)
    assert_same_params(emptied, whole)
