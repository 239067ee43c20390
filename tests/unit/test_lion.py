"""Lion as a torch.optim.Optimizer and as a drop-in for lion_pytorch.Lion; and what it refuses, changing nothing.

Weights of a few hundred elements: what is tested here is state and contracts, not arithmetic. Learning rates
are powers of two where a result is written out, so that it is exact in every dtype. Results are compared bit
for bit: the smallest difference a wrong sign could make is 2 * lr.
"""

from __future__ import annotations

import copy
import inspect
import io
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import lion_pytorch
import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR

from lion_dist import Lion
from lion_dist.update import dispatch
from tests.bits import assert_same_bits, bits
from tests.marks import needs_interpreter

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SHAPES = [(17, 9), (), (0,), (300,), (2, 3, 4)]


def params_of(dtype: torch.dtype = F32, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def feed(params: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(100 + seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def run(opt: torch.optim.Optimizer, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        feed(params, step)
        opt.step()


def assert_same_params(got: list[nn.Parameter], expected: list[nn.Parameter]) -> None:
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert_same_bits(a.detach(), b.detach(), f"parameter {i}")


def assert_same_momenta(got: Lion, expected: Lion) -> None:
    pairs = [
        (a, b)
        for g, h in zip(got.param_groups, expected.param_groups, strict=True)
        for a, b in zip(g["params"], h["params"], strict=True)
    ]
    for a, b in pairs:
        assert_same_bits(got.state[a]["exp_avg"], expected.state[b]["exp_avg"], "momentum")


def snapshot(opt: Lion) -> Any:
    """Everything a failed call might have changed, in bits."""

    def frozen(x: Any) -> Any:
        return (x.dtype, x.stride(), x.data_ptr(), bits(x).tolist()) if isinstance(x, Tensor) else copy.deepcopy(x)

    groups = [{k: [id(p) for p in v] if k == "params" else frozen(v) for k, v in g.items()} for g in opt.param_groups]
    params = [p for g in opt.param_groups for p in g["params"]]
    state = [(id(p), {k: frozen(v) for k, v in entry.items()}) for p, entry in opt.state.items()]
    return groups, [frozen(p) for p in params], state, frozen(opt.defaults.get("lr"))


# -- A drop-in for lion_pytorch.Lion


def test_arguments_stand_where_lion_pytorch_has_them() -> None:
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
    assert opt._use_triton is False


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

    def made(cls: type[torch.optim.Optimizer]) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
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


def test_goes_on_from_a_state_dict_of_lion_pytorch() -> None:
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


# -- State


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
    for p in opt.state:
        assert opt.state[p].keys() == {"exp_avg"}
        assert opt.state[p]["exp_avg"].shape == p.shape
        assert not opt.state[p]["exp_avg"].requires_grad
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
def test_copies_go_on_alone(copied: Callable[[Any], Any], use_triton: bool | None) -> None:
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
        "momentum_dtype": BF16, "maximize": True,
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
    opt.state = {p: {"exp_avg": torch.zeros_like(p)} for p in params}
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
    """As DeepSpeed's ZeRO does: step() once for each group, each time with one group of one flat partition
    (stages 1, 2), or with the other groups emptied (stage 3)."""
    hypers = [{"lr": 0.25, "weight_decay": 0.5}, {"lr": 0.5, "betas": (0.95, 0.98)}, {"lr": 0.125, "maximize": True}]

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


# -- step(): closures, hooks, schedulers, scalers


def test_a_closure_runs_with_gradients_and_its_value_is_returned() -> None:
    p = nn.Parameter(torch.tensor([3.0, -3.0]))
    opt = Lion([p], lr=0.25)
    called = []

    def closure() -> Tensor:
        called.append(torch.is_grad_enabled())
        opt.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        loss = opt.step(closure)
    assert called == [True]
    assert loss.item() == 18.0  # type: ignore[union-attr]
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
    runs = {}
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


# -- Bad input: a clear error, and nothing changed


def expanded() -> nn.Parameter:
    return nn.Parameter(torch.zeros(1).expand(5))


def of_dtype(dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.zeros(3, dtype=dtype))


BAD_HYPERS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "negative lr": ({"lr": -1e-4}, ValueError, "lr must be finite and >= 0, got -0.0001"),
    "NaN lr": ({"lr": math.nan}, ValueError, "lr must be finite"),
    "infinite lr": ({"lr": math.inf}, ValueError, "lr must be finite"),
    "lr of two elements": ({"lr": torch.tensor([0.1, 0.2])}, ValueError, "one element"),
    "negative lr tensor": ({"lr": torch.tensor(-0.1)}, ValueError, "lr must be finite and >= 0"),
    "beta1 of 1": ({"betas": (1.0, 0.99)}, ValueError, "betas must be"),
    "negative beta2": ({"betas": (0.9, -0.1)}, ValueError, "betas must be"),
    "NaN beta": ({"betas": (0.9, math.nan)}, ValueError, "betas must be"),
    "one beta": ({"betas": (0.9,)}, ValueError, "betas must be"),
    "three betas": ({"betas": (0.9, 0.99, 0.999)}, ValueError, "betas must be"),
    "negative weight decay": ({"weight_decay": -0.1}, ValueError, "weight_decay must be"),
    "NaN weight decay": ({"weight_decay": math.nan}, ValueError, "weight_decay must be"),
    "decoupled from lr 0": ({"init_lr": 0.0, "decoupled_weight_decay": True}, ValueError, "must be > 0"),
    "decay divided to infinity": (
        {"init_lr": 1e-300, "weight_decay": 1e300, "decoupled_weight_decay": True},
        ValueError,
        "too large",
    ),
    "initial lr that is none": ({"init_lr": "0.1"}, TypeError, "init_lr must be a number"),
    "maximize by word": ({"maximize": "no"}, TypeError, "maximize must be True or False, got 'no'"),
    "maximize by number": ({"maximize": 0}, TypeError, "maximize must be True or False"),
    "decoupled by word": ({"decoupled_weight_decay": "false"}, TypeError, "decoupled_weight_decay must be True or F"),
    "momentum of an unknown name": ({"momentum_dtype": "half"}, TypeError, "momentum_dtype must be .* got 'half'"),
    "lr in words": ({"lr": "1e-3"}, TypeError, "lr must be a number"),
    "complex lr": ({"lr": 1j}, TypeError, "lr must be a number"),
    "lr too large": ({"lr": 10**400}, ValueError, "lr must be finite"),
    "betas in words": ({"betas": "09"}, TypeError, "betas must be two numbers"),
    "betas by key": ({"betas": {0.9: 0, 0.99: 1}}, TypeError, "betas must be two numbers"),
    "betas of words": ({"betas": ("0.9", "0.99")}, TypeError, "betas must be two numbers"),
    "weight decay of two": ({"weight_decay": torch.ones(2)}, ValueError, "weight_decay must be"),
    "integer momentum": ({"momentum_dtype": torch.int8}, TypeError, "momentum_dtype"),
    "float64 momentum": ({"momentum_dtype": torch.float64}, TypeError, "momentum_dtype"),
}
bad_hypers = pytest.mark.parametrize(("bad", "error", "message"), BAD_HYPERS.values(), ids=BAD_HYPERS.keys())


@bad_hypers
def test_bad_hyper_parameters_in_the_constructor(bad: dict[str, Any], error: type[Exception], message: str) -> None:
    of_constructor = {"lr" if key == "init_lr" else key: value for key, value in bad.items()}
    with pytest.raises(error, match=message.replace("init_lr", "lr")):
        Lion(params_of(), **of_constructor)
    with pytest.raises(error, match=message):
        Lion([{"params": params_of(), **bad}])


@bad_hypers
def test_bad_hyper_parameters_of_a_new_group(bad: dict[str, Any], error: type[Exception], message: str) -> None:
    params = params_of()
    opt = Lion(params, lr=0.25)
    run(opt, params, range(1))
    before = snapshot(opt)
    with pytest.raises(error, match=message):
        opt.add_param_group({"params": params_of(seed=5), **bad})
    assert snapshot(opt) == before
    run(opt, params, range(1, 2))


@bad_hypers
def test_bad_hyper_parameters_in_a_state_dict(bad: dict[str, Any], error: type[Exception], message: str) -> None:
    params = params_of()
    opt = Lion(params, lr=0.25)
    run(opt, params, range(1))
    saved = copy.deepcopy(opt.state_dict())
    saved["param_groups"][0].update(bad)
    for entry in saved["state"].values():
        entry["exp_avg"] += 1
    before = snapshot(opt)
    with pytest.raises(error, match=message):
        opt.load_state_dict(saved)
    assert snapshot(opt) == before


BETWEEN_STEPS = [
    "negative lr", "NaN lr", "infinite lr", "beta1 of 1", "negative beta2", "one beta", "negative weight decay",
    "NaN weight decay", "decoupled from lr 0", "maximize by word", "decoupled by word", "lr in words", "betas in words",
]  # fmt: skip


@pytest.mark.parametrize("case", BETWEEN_STEPS)
def test_bad_hyper_parameters_between_steps(case: str) -> None:
    """In the second group: the first must not have been stepped by then."""
    bad, error, message = BAD_HYPERS[case]
    params = params_of()
    opt = Lion([{"params": params[:2]}, {"params": params[2:]}], lr=0.25)
    run(opt, params, range(1))
    opt.param_groups[1].update(bad)
    before = snapshot(opt)
    feed(params, 1)
    with pytest.raises(error, match=message):
        opt.step()
    assert str(snapshot(opt)) == str(before)  # as text: NaN differs from itself


BAD_PARAMS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "fp8": (lambda: [of_dtype(torch.float8_e4m3fn)], TypeError, "float8_e4m3fn"),
    "float64": (lambda: [of_dtype(torch.float64)], TypeError, "float64"),
    "complex": (lambda: [of_dtype(torch.complex64)], TypeError, "view_as_real"),
    "expanded": (lambda: [expanded()], ValueError, "share memory"),
    "in the middle": (lambda: [*params_of(seed=6), of_dtype(torch.float64)], TypeError, "parameter 5 .*float64"),
    "not a leaf": (lambda: [nn.Parameter(torch.ones(3)) * 2], ValueError, "non-leaf"),
}
bad_params = pytest.mark.parametrize(("make", "error", "message"), BAD_PARAMS.values(), ids=BAD_PARAMS.keys())


@bad_params
def test_bad_parameters(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Lion(make())
    params = params_of()
    opt = Lion(params, lr=0.25)
    run(opt, params, range(1))
    before = snapshot(opt)
    with pytest.raises(error, match=message):
        opt.add_param_group({"params": make()})
    assert snapshot(opt) == before


def test_no_parameters() -> None:
    with pytest.raises(ValueError, match="empty parameter list"):
        Lion([])
    Lion([{"params": []}]).step()


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_a_parameter_given_twice() -> None:
    p = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="given twice"):
        Lion([p, p])
    with pytest.raises(ValueError, match="more than one parameter group"):
        Lion([{"params": [p]}, {"params": [p]}])
    opt = Lion([p])
    before = snapshot(opt)
    with pytest.raises(ValueError, match="more than one parameter group"):
        opt.add_param_group({"params": [p]})
    assert snapshot(opt) == before


def with_sparse_grad(p: nn.Parameter) -> None:
    p.grad = torch.ones_like(p).to_sparse()


def with_complex_grad(p: nn.Parameter) -> None:
    if not hasattr(p, "grad_dtype"):
        pytest.skip("this torch lets nobody assign a complex gradient to a real parameter")
    p.grad_dtype = None
    p.grad = torch.ones(p.shape, dtype=torch.complex64)


def with_float64_grad(p: nn.Parameter) -> None:
    if not hasattr(p, "grad_dtype"):
        pytest.skip("this torch lets nobody assign a gradient of another dtype")
    p.grad_dtype = None
    p.grad = torch.ones(p.shape, dtype=torch.float64)


def with_another_shape(p: nn.Parameter) -> None:
    p.grad = torch.ones_like(p)
    p.data = torch.ones(p.numel() + 1)


@pytest.mark.parametrize("use_triton", [False, pytest.param(True, marks=needs_interpreter)])
@pytest.mark.parametrize("first", [True, False], ids=["first step", "later"])
@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (with_sparse_grad, TypeError, "parameter 3 .*dense gradients"),
        (with_complex_grad, TypeError, "parameter 3 .*complex64"),
        (with_float64_grad, TypeError, "parameter 3 .*float64"),
        (with_another_shape, ValueError, "parameter 3 .*shape"),
    ],
    ids=["sparse", "complex", "float64", "another shape"],
)
def test_bad_gradients(
    spoil: Callable[[nn.Parameter], None], error: type[Exception], message: str, first: bool, use_triton: bool
) -> None:
    params = params_of()
    opt = Lion(params, lr=0.25, use_triton=use_triton)
    if not first:
        run(opt, params, range(1))
    feed(params, 1)
    spoil(params[3])
    before = snapshot(opt)
    with pytest.raises(error, match=message):
        opt.step()
    assert snapshot(opt) == before
    params[3].grad = None
    params[3].data = params_of()[3].data
    opt.step()
    assert not torch.equal(params[0], params_of()[0])


@pytest.mark.parametrize("use_triton", [False, pytest.param(True, marks=needs_interpreter)])
def test_parameters_that_share_memory(use_triton: bool) -> None:
    buffer = torch.zeros(100)
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(buffer[:60]), nn.Parameter(buffer[59:])]
    opt = Lion(params, lr=0.25, use_triton=use_triton)
    feed_shapes(params)
    before = snapshot(opt)
    with pytest.raises(ValueError, match="parameters 1 and 2 share memory"):
        opt.step()
    assert snapshot(opt) == before


def feed_shapes(params: list[nn.Parameter]) -> None:
    for p in params:
        p.grad = torch.ones_like(p)


def test_triton_on_the_cpu_without_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    params = params_of()
    opt = Lion(params, lr=0.25, use_triton=True)
    feed(params, 0)
    before = snapshot(opt)
    with pytest.raises(ValueError, match="use_triton=True needs parameters on a GPU, got cpu"):
        opt.step()
    assert snapshot(opt) == before


def bigger_model() -> dict[str, Any]:
    params = [nn.Parameter(torch.zeros([n + 1 for n in shape])) for shape in SHAPES]
    opt = Lion(params)
    run(opt, params, range(1))
    return opt.state_dict()


def of_adamw() -> dict[str, Any]:
    params = params_of()
    opt = torch.optim.AdamW(params)
    run(opt, params, range(1))
    return opt.state_dict()


def of_lion(edit: Callable[[dict[str, Any]], Any]) -> Callable[[], dict[str, Any]]:
    def made() -> dict[str, Any]:
        params = params_of(seed=9)
        opt = Lion(params, lr=0.125)
        run(opt, params, range(2))
        state_dict = copy.deepcopy(opt.state_dict())
        edit(state_dict)
        return state_dict

    return made


BAD_STATE_DICTS: dict[str, tuple[Callable[[], Any], str]] = {
    "not a dict": (lambda: [1, 2], "state_dict with keys"),
    "empty": (dict, "state_dict with keys"),
    "no groups": (of_lion(lambda d: d.pop("param_groups")), "state_dict with keys"),
    "no state": (of_lion(lambda d: d.pop("state")), "state_dict with keys"),
    "another model": (bigger_model, "another model"),
    "AdamW's": (of_adamw, "another optimizer"),
    "fewer groups": (of_lion(lambda d: d["param_groups"].clear()), "groups of sizes"),
    "fewer parameters": (of_lion(lambda d: d["param_groups"][0]["params"].pop()), "groups of sizes"),
    "a wrong shape at the end": (of_lion(lambda d: d["state"][4].update(exp_avg=torch.ones(24))), "parameter 4"),
    "an integer momentum": (of_lion(lambda d: d["state"][4].update(exp_avg=torch.ones(2, 3, 4).int())), "parameter 4"),
    "a momentum that is none": (of_lion(lambda d: d["state"][4].update(exp_avg=3.0)), "parameter 4 is float"),
    "another key": (of_lion(lambda d: d["state"].update({0: {"momentum_buffer": torch.ones(17, 9)}})), "another opt"),
    "state of nobody": (of_lion(lambda d: d["state"].update({77: {"exp_avg": torch.ones(2)}})), "77"),
}


@pytest.mark.parametrize(("make", "message"), BAD_STATE_DICTS.values(), ids=BAD_STATE_DICTS.keys())
def test_bad_state_dicts(make: Callable[[], Any], message: str) -> None:
    params = params_of()
    opt = Lion(params, lr=0.25)
    run(opt, params, range(1))
    given = make()
    before = snapshot(opt)
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(given)
    assert snapshot(opt) == before
    expected = params_of()
    run(Lion(expected, lr=0.25), expected, range(2))
    run(opt, params, range(1, 2))
    assert_same_params(params, expected)


def test_tensors_without_memory_are_refused() -> None:
    with pytest.raises(TypeError, match="meta"):
        Lion([nn.Parameter(torch.zeros(3, device="meta"))])
    p = nn.Parameter(torch.zeros(3))
    opt = Lion([p])
    p.grad = torch.ones(3)
    opt.step()
    p.untyped_storage().resize_(0)  # as FSDP1 frees a flat parameter
    with pytest.raises(TypeError, match="no memory of its own"):
        opt.step()


@pytest.mark.parametrize(
    ("bad", "name"), [({"lr": "1e-3"}, "lr"), ({"betas": 0.9}, "betas"), ({"weight_decay": None}, "weight_decay")]
)
def test_arguments_of_the_wrong_type_are_named(bad: dict, name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} must be"):
        Lion([nn.Parameter(torch.zeros(3))], **bad)


@pytest.mark.parametrize(
    "bad", [{"state": [], "param_groups": []}, {"state": {}, "param_groups": [{}]}, {"state": {}, "param_groups": 3}]
)
def test_malformed_state_dicts_are_refused(bad: dict) -> None:
    with pytest.raises(ValueError, match="param_groups"):
        Lion([nn.Parameter(torch.zeros(3))]).load_state_dict(bad)


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
