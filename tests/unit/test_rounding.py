"""Warnings where weight decay, or the whole update, rounds to nothing in the dtype of the weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from lion_dist import Lion
from lion_dist.rounding import RoundingWarnings
from lion_dist.update.reference import HyperParameters

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def params_of(dtype: torch.dtype = F32, std: float = 1.0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter((std * torch.randn(shape, generator=generator)).to(dtype)) for shape in [(17, 9), (), (300,)]]


def messages(params: list[nn.Parameter], about: str, steps: int = 3, **kwargs: Any) -> list[str]:
    """The warnings of some steps that begin with a word."""
    scheduled = kwargs.pop("schedule", None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        opt = Lion(params, **kwargs)
        scheduler = LambdaLR(opt, scheduled) if scheduled else None
        for step in range(steps):
            for p in params:
                p.grad = torch.ones_like(p) if step % 2 else -torch.ones_like(p)
            opt.step()
            if scheduler:
                scheduler.step()
    ours = [w for w in caught if "lion_dist" in str(w.message)]
    assert all(w.filename == __file__ for w in ours), "a warning should point at the call of opt.step()"
    return [str(w.message) for w in ours if str(w.message).startswith(f"lion_dist: {about}")]


# -- Weight decay


@pytest.mark.parametrize(
    ("dtype", "lr", "weight_decay", "schedule", "warned"),
    [
        (BF16, 1e-4, 0.1, None, True),
        (F16, 1e-4, 0.1, None, True),
        (F32, 1e-4, 2e-4, None, True),  # 2e-8: 1 - 2e-8 is 1 in float32
        (F32, 1e-4, 4e-4, None, False),  # 4e-8 is not
        (F32, 1e-4, 0.1, None, False),
        (F32, 3e-5, 0.01, None, False),
        (BF16, 1e-4, 0.0, None, False),
        (BF16, 0.0, 0.1, None, False),
        (BF16, 1e-2, 1.0, None, False),
        (F32, 1e-4, 0.1, lambda t: t * 1e-5, False),  # warm-up from 0: only the peak counts
        (BF16, 1e-4, 0.1, lambda t: t * 1e-5, True),
    ],
)
def test_decay_that_rounds_away(
    dtype: torch.dtype, lr: float, weight_decay: float, schedule: Callable[[int], float] | None, warned: bool
) -> None:
    got = messages(params_of(dtype), "lr * weight_decay", lr=lr, weight_decay=weight_decay, schedule=schedule)
    assert len(got) == (1 if warned else 0), got
    if warned:
        assert f"{lr * weight_decay:.3g}" in got[0]
        assert str(dtype) in got[0]


def test_the_edge_of_the_decay_warning_is_where_the_factor_becomes_one() -> None:
    for decay in (2.0**-25, 2.0**-25 * 1.01):
        vanishes = torch.tensor(1 - decay, dtype=torch.float64).float().item() == 1.0
        assert bool(messages(params_of(), "lr * weight_decay", lr=1.0, weight_decay=decay)) == vanishes


def test_advice_about_decay_is_of_use() -> None:
    (of_16_bits,) = messages(params_of(BF16), "lr * weight_decay", lr=1e-4, weight_decay=0.1)
    precision = "float32 weights (autocast keeps compute in 16 bits), or a larger weight_decay"
    assert f"Use master_weights=True, {precision}" in of_16_bits
    (of_float16,) = messages(params_of(F16), "lr * weight_decay", lr=1e-4, weight_decay=0.1)
    assert f"Use {precision}" in of_float16  # which have no master weights
    (of_32_bits,) = messages(params_of(), "lr * weight_decay", lr=1e-4, weight_decay=2e-4)
    assert "Use float32" not in of_32_bits
    assert "Use a larger weight_decay" in of_32_bits
    # Frozen weights of 16 bits, under adapters in 32, do not decay anyway.
    base = params_of(BF16)
    for p in base:
        p.requires_grad_(False)
    opt = Lion([*base, *(adapters := params_of())], lr=1e-4, weight_decay=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapters[0].grad = torch.ones_like(adapters[0])
        opt.step()


# -- Master weights


@pytest.mark.parametrize("lr", [1e-4, 1e-6])
def test_bfloat16_weights_with_master_weights_count_as_float32(lr: float) -> None:
    """With these lr and weight_decay neither rounds away in them, and both do in bfloat16 weights alone."""
    kwargs: dict[str, Any] = {"lr": lr, "weight_decay": 0.1 if lr > 1e-5 else 1.0}
    assert not messages(params_of(BF16, 1.0), "", master_weights=True, **kwargs)
    assert len(messages(params_of(BF16, 1.0), "", **kwargs)) == 2


def test_weight_decay_can_round_away_in_master_weights_too() -> None:
    (message,) = messages(params_of(BF16), "", lr=1e-4, weight_decay=2e-4, master_weights=True)
    assert "of torch.float32 master weights" in message
    assert "Use a larger weight_decay" in message


def test_groups_with_and_without_master_weights() -> None:
    """The share is of those without; and advice is for the dtypes that need it."""
    with_masters, without, half = (nn.Parameter(torch.full((n,), 0.02, dtype=BF16)) for n in (1000, 10, 10))
    half.data = half.data.half()
    groups: list[dict[str, Any]] = [{"params": [with_masters], "master_weights": True}, {"params": [without, half]}]
    opt = Lion(groups, lr=1e-7)
    with pytest.warns(UserWarning, match="round") as caught:
        opt.step()
    (message,) = [str(w.message) for w in caught]
    assert "of 100% of the torch.bfloat16 and torch.float16 weights" in message
    assert "Use master_weights=True (bfloat16 weights), float32 weights" in message


# -- The update


@pytest.mark.parametrize(
    ("dtype", "std", "lr", "schedule", "expected"),
    [
        (BF16, 0.02, 1e-6, None, True),
        (BF16, 0.02, 1e-5, None, True),
        (BF16, 0.02, 1e-4, None, False),
        (F16, 0.02, 1e-6, None, True),
        (F16, 0.02, 1e-4, None, False),
        (F32, 0.02, 1e-6, None, False),
        (BF16, 0.02, 1e-4, lambda t: t * 1e-5, False),  # warm-up from 0: only the peak counts
        (BF16, 0.02, 1e-6, lambda t: t * 1e-5, True),
        (BF16, 0.02, 1e-4, lambda t: 1 - 0.4999 * t, False),  # nor does the end of a schedule
        (BF16, 0.02, 0.0, None, False),
        (BF16, 0.0, 1e-6, None, False),  # weights of 0 move by any lr
    ],
)
@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
def test_an_update_that_rounds_away(
    dtype: torch.dtype,
    std: float,
    lr: float,
    schedule: Callable[[int], float] | None,
    expected: bool,
    as_tensor: bool,
) -> None:
    params = params_of(dtype, std)
    rate = torch.tensor(lr) if as_tensor else lr
    got = messages(params, "lr = ", lr=rate, schedule=schedule)
    assert len(got) == expected, got
    if expected:
        assert f"lr = {lr:.3g} is below half a unit in the last place of" in got[0]
        assert f"of the {dtype} weights" in got[0]
        masters = "master_weights=True, " if dtype == BF16 else ""
        assert f"Use {masters}float32 weights (autocast keeps compute in 16 bits), or a larger lr" in got[0]


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_the_share_is_of_those_that_do_not_move(dtype: torch.dtype) -> None:
    """By what becomes of them; a few large weights, such as gains of 1, are not most."""
    p = nn.Parameter((0.02 * torch.randn(3, 5000)).to(dtype))
    for lr in (1e-6, 3e-6, 1e-5):
        opt = Lion([w := nn.Parameter(p.detach().clone())], lr=lr)
        w.grad = torch.ones_like(w)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            opt.step()
        stayed = float((w == p).float().mean())
        assert bool(caught) == (stayed > 0.5), stayed
        if caught:
            assert f"of {stayed:.0%} of" in str(caught[0].message)
    gains = nn.Parameter(torch.ones(64, dtype=dtype))
    assert not messages([gains, nn.Parameter((1e-4 * torch.randn(64, 64)).to(dtype))], "lr = ", lr=1e-4)


def test_by_the_lr_of_each_group_and_once() -> None:
    """An optimizer of which one group does not move warns if that is most of the weights; and no group warns again."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        few, many, late = (nn.Parameter(torch.full((n,), 0.02, dtype=BF16)) for n in (10, 1000, 100))
        groups: list[dict[str, Any]] = [{"params": [few], "lr": 1e-7}, {"params": [many]}]
        opt = Lion(groups, lr=1e-2)
        opt.step()
        assert not caught
        for _ in range(2):
            opt.add_param_group({"params": [late], "lr": 1e-7})
            opt.step()
            late = nn.Parameter(late.detach().clone())
    assert len(caught) == 1


def test_what_is_unfrozen_later_is_looked_at_then() -> None:
    """Alone, and once; and if lr is 0 in that step, in the first in which it is not."""
    few, many = (nn.Parameter(torch.full((n,), 0.02, dtype=BF16)) for n in (10, 1000))
    opt = Lion([few, many.requires_grad_(False)], lr=1e-2)
    few.grad = torch.ones_like(few)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step()
        many.requires_grad_(True)
        many.grad = torch.ones_like(many)
        opt.param_groups[0]["lr"] = 0.0
        opt.step()
    opt.param_groups[0]["lr"] = 1e-6
    with pytest.warns(UserWarning, match="of 100% of the torch.bfloat16 weights"):
        opt.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step()


def test_zeros_hide_nothing() -> None:
    """Any lr moves them, as long as they are 0: biases, the half of an adapter."""
    p, zeros = nn.Parameter(torch.full((300,), 0.02, dtype=BF16)), nn.Parameter(torch.zeros(3000, dtype=BF16))
    assert len(messages([p, zeros], "lr = 1e-06 is below half a unit in the last place of 100% of", lr=1e-6)) == 1


def test_onecycle_is_judged_by_its_peak() -> None:
    """Its first lr is a twenty-fifth of that."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        p = nn.Parameter(torch.full((100,), 0.02, dtype=BF16))
        opt = Lion([p], lr=1e-4, weight_decay=30.0)
        scheduler = OneCycleLR(opt, max_lr=2e-4, total_steps=10, cycle_momentum=False)
        opt.step()
        scheduler.step()


def test_weights_are_looked_at_in_the_first_step_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where lr is not 0; and a tensor that holds an lr on another device is read twice at most."""
    looked: list[int] = []
    monkeypatch.setattr("lion_dist.rounding._share_that_stays", lambda weights: (looked.append(len(weights)), 0.0)[1])
    warnings_ = RoundingWarnings()
    groups: list[dict[str, Any]] = [{"params": [p]} for p in params_of(BF16)]

    def step(lr: float | Tensor) -> None:
        warnings_.check(groups, [HyperParameters(lr, 0.0, 0.9, 0.99, False)] * len(groups))

    for lr in (0.0, 0.0, 1e-6, 1e-7, 0.0):
        step(lr)
    assert looked == [3]
    groups.append({"params": params_of(F16)})
    step(1e-6)
    step(1e-6)
    assert looked == [3, 3]

    reads: list[float] = []
    monkeypatch.setattr("lion_dist.rounding._on_gpu", lambda lr: True)
    monkeypatch.setattr("lion_dist.rounding._aim", lambda group, hyper: (reads.append(0.0), 0.0)[1])
    warnings_ = RoundingWarnings()
    for _ in range(5):
        step(1e-6)
    assert len(reads) == 2 * len(groups)
    assert looked == [3, 3]
