"""Replicas that went astray: a step by signs carries the difference on, so it can be found, and healed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lion_dist import Lion, ShardedLion
from tests.asserts import assert_same_bits, assert_same_model, assert_same_momentum, bits, momentum_parts
from tests.harness import device_of, run_ranks
from tests.scenarios.replicas import LR, Trained
from tests.scenarios.toy import FP32, MIXED, SHAPES, Toy


@torch.no_grad()
def flip(t: Tensor, where: int = -1) -> None:
    """The last bit of one element, unseen by autograd."""
    t.data.view(-1).view(bits(t).dtype)[where] ^= 1


def body_check_and_resync(rank: int, world_size: int) -> None:
    device = device_of(rank, world_size)
    model = Toy(100 + rank, MIXED, device)
    optimizer = ShardedLion(model.groups(), lr=0.01, param_sync="signs")
    optimizer.check_replicas()
    params = [p for group in optimizer.param_groups for p in group["params"]]
    number = {name: next(i for i, p in enumerate(params) if p is getattr(model, name)) for name in SHAPES}
    good = [p.detach().clone() for p in params]
    for strayed, name in [([1], "square"), ([0], "bias"), ([world_size - 1], "frozen"), ([0, 1], "scalar")]:
        if rank in strayed:
            flip(getattr(model, name).data.reshape(-1) if name == "scalar" else getattr(model, name))
        unlike = [r for r in range(world_size) if (r in strayed) != (0 in strayed)]
        if unlike:
            said = rf"^1 parameters .* parameter {number[name]} on ranks {unlike}\. Call resync".replace("[", r"\[")
            with pytest.raises(RuntimeError, match=said):
                optimizer.check_replicas()
        else:  # of two ranks, both alike
            optimizer.check_replicas()
        optimizer.resync()
        optimizer.check_replicas()
        if 0 not in strayed:
            assert_same_bits(params[number[name]], good[number[name]], "the first rank's is what counts")
    # Several at once, more than the error names, and a sign of zero that no comparison of values would see.
    with torch.no_grad():
        model.one.zero_()
        if rank == 1:
            for p in params:
                p.mul_(-1)
    with pytest.raises(RuntimeError, match=rf"^{len(params) - 1} parameters .*(parameter \d+ on ranks \[1\].*){{5}}"):
        optimizer.check_replicas()  # one is empty
    optimizer.resync()
    optimizer.check_replicas()


@pytest.mark.parametrize("world_size", [2, 3])
def test_check_and_resync(world_size: int, tmp_path: Path) -> None:
    run_ranks(body_check_and_resync, world_size, tmp_path)


def body_training_goes_on(rank: int, world_size: int) -> None:
    for heal in ("resync", "load"):
        training_goes_on(rank, world_size, heal)


def training_goes_on(rank: int, world_size: int, heal: str) -> None:
    """A replica astray stays so under signs; resync() heals it, and so does loading the model everywhere."""
    device = device_of(rank, world_size)
    model, expected = (Toy(100, FP32, device) for _ in range(2))
    optimizer = ShardedLion(model.groups(), lr=0.01, param_sync="signs")
    lion = Lion(expected.groups(), lr=0.01)

    def train(*steps: int) -> None:
        for step in steps:
            model(step, rank, world_size).backward()
            for name in SHAPES:
                getattr(expected, name).grad = expected.average_gradient(name, step, world_size)
            for o in (optimizer, lion):
                o.step()
                o.zero_grad()

    train(0, 1)
    assert_same_model(model, expected)
    if rank == 1:
        with torch.no_grad():
            model.square.add_(1.0)
    train(2, 3)
    with pytest.raises(RuntimeError, match=r"on ranks \[1\]"):
        optimizer.check_replicas()
    if rank != 1:
        assert_same_model(model, expected)  # gradients of this loss do not depend on weights
    if heal == "resync":
        optimizer.resync()
    else:
        model.load_state_dict(expected.state_dict())
    optimizer.check_replicas()
    train(4, 5)
    assert_same_model(model, expected)
    assert_same_momentum(optimizer.full_state_dict(), lion)


def test_training_continues_on_diverged_replicas(tmp_path: Path) -> None:
    run_ranks(body_training_goes_on, 2, tmp_path)


def body_load_refuses(rank: int, world_size: int) -> None:
    """Nothing has been changed: neither groups nor momenta; and then it can be loaded."""
    trained = Trained(rank, world_size, stage=2)
    trained.step()
    optimizer = trained.optimizer
    state = optimizer.full_state_dict()
    trained.step()
    optimizer.param_groups[0]["lr"] = 0.125
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    momenta = [part.clone() for part in momentum_parts(optimizer)]
    if rank == 1:
        flip(trained.params[0], 3)
    before = [bits(p) for p in trained.params]
    with pytest.raises(RuntimeError, match=r"parameter 0 on ranks \[1\]"):
        optimizer.load_state_dict(state)
    assert [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups] == groups
    assert [p for group in optimizer.param_groups for p in group["params"]] == trained.params
    for part, m in zip(momentum_parts(optimizer), momenta, strict=True):
        assert_same_bits(part, m, "momentum")
    for p, b in zip(trained.params, before, strict=True):
        assert torch.equal(bits(p), b)
    optimizer.resync()
    trained.step()
    optimizer.check_replicas()
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == LR
    loaded = optimizer.full_state_dict()["state"]
    for i, entry in state["state"].items():
        assert_same_bits(loaded[i]["exp_avg"], entry["exp_avg"], f"momentum {i}")


def test_load_state_dict_looks_at_replicas(tmp_path: Path) -> None:
    run_ranks(body_load_refuses, 2, tmp_path)


def body_params_heal(rank: int, world_size: int) -> None:
    assert healed(rank, world_size, "params") == [True] * 4
    assert healed(rank, world_size, "signs") == [False] * 4


def healed(rank: int, world_size: int, sync: str) -> list[bool]:
    """Elements of the first half belong to rank 0, of the second to rank 1; each rank spoils one of both halves of
    its replica. Returns which of the four are alike again after a step."""
    device = device_of(rank, world_size)
    p = nn.Parameter(torch.ones(512, device=device))
    optimizer = ShardedLion([p], lr=LR, stage=1, param_sync=sync)
    spoilt = [(0, 10), (0, 300), (1, 11), (1, 301)]
    with torch.no_grad():
        for of_rank, i in spoilt:
            if rank == of_rank:
                p[i] = 9.0
    p.grad = torch.ones_like(p)
    optimizer.step()
    everywhere = torch.empty(2, 512, device=device)
    torch.distributed.all_gather_into_tensor(everywhere.view(-1), p.detach())
    # What the owner has spoilt, it spreads; what another has, it repairs.
    if sync == "params":
        assert everywhere[:, [10, 301]].unique().item() == 9.0 - LR
        assert everywhere[:, [300, 11]].unique().item() == 1.0 - LR
    return [bool(everywhere[0, i] == everywhere[1, i]) for _, i in spoilt]


def test_gathered_parameters_repair_replicas(tmp_path: Path) -> None:
    run_ranks(body_params_heal, 2, tmp_path)


def autograd_still_holds(loss: Tensor) -> bool:
    try:
        loss.backward()
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        return False
    return True


def body_autograd(rank: int, world_size: int) -> None:
    """A graph that saved a weight notices that it was changed; not one whose weight was not."""
    device = device_of(rank, world_size)

    def both(change: Callable[[ShardedLion, nn.Parameter], None], sync: str) -> tuple[bool, bool]:
        stepped, other = (nn.Parameter(torch.ones(300, device=device)) for _ in range(2))
        optimizer = ShardedLion([stepped, other], stage=1, param_sync=sync)
        losses = [(p * p).sum() for p in (stepped, other)]
        change(optimizer, stepped)
        return autograd_still_holds(losses[0]), autograd_still_holds(losses[1])

    def step(optimizer: ShardedLion, p: nn.Parameter) -> None:
        p.grad = torch.ones_like(p)
        optimizer.step()

    assert both(lambda optimizer, _: optimizer.resync(), "signs") == (False, False)
    assert both(step, "params") == (False, True)
    assert both(step, "signs") == (False, True)


def test_autograd_notices_what_changed(tmp_path: Path) -> None:
    run_ranks(body_autograd, 2, tmp_path)
