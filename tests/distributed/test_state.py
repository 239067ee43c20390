"""full_state_dict and load_state_dict across world sizes and optimizers, and what is refused."""

from __future__ import annotations

import copy
import pickle
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lion_dist import Lion, ShardedLion
from tests.asserts import assert_same_bits, assert_same_model, assert_same_momentum, momentum_parts
from tests.harness import device_of, run_ranks, spawn_only
from tests.scenarios.toy import FP32, MIXED, SHAPES, Toy, expect, train, warm_up, wrapped

EXACT = 4  # ranks whose average the gradients are in every run here, whatever the world size


def body_save(rank: int, world_size: int, path: Path, rank0_only: bool) -> None:
    device = device_of(rank, world_size)
    model = Toy(9, MIXED, device)
    optimizer = ShardedLion(model.groups(), lr=0.01, stage=1, momentum_dtype=torch.float32)
    scheduler = warm_up(optimizer)
    train(model, wrapped(model, device), optimizer, scheduler, range(6))
    full = optimizer.full_state_dict(rank0_only=rank0_only)
    if rank0_only and rank > 0:
        assert full == {}
    for i, entry in full.get("state", {}).items():
        p = [p for group in optimizer.param_groups for p in group["params"]][i]
        exp_avg = entry["exp_avg"]
        assert type(exp_avg) is torch.Tensor
        assert exp_avg.device.type == "cpu"
        assert exp_avg.shape == p.shape
        assert exp_avg.is_contiguous()
        assert exp_avg.untyped_storage().nbytes() == exp_avg.nbytes  # no hidden buffer to be saved with it
    if rank == 0:
        state = {"model": model.state_dict(), "optimizer": full, "scheduler": scheduler.state_dict()}
        torch.save(state, path)


def body_resume(rank: int, world_size: int, path: Path) -> None:
    """Goes on where body_save stopped, as Lion on one process and as ShardedLion, side by side."""
    device = device_of(rank, world_size)
    saved = torch.load(path, weights_only=True, map_location="cpu")
    # A step before loading: what was there must be replaced, not added to.
    model, expected = Toy(1, MIXED, device), Toy(2, MIXED, device)
    optimizer, lion = ShardedLion(model.groups(), lr=0.5, stage=1), Lion(expected.groups(), lr=0.5)
    expect(model, optimizer, warm_up(optimizer), range(1), world_size)
    expect(expected, lion, warm_up(lion), range(1), world_size)
    for m, o in ((model, optimizer), (expected, lion)):
        m.load_state_dict(saved["model"])
        scheduler = warm_up(o)
        scheduler.load_state_dict(saved["scheduler"])
        o.load_state_dict(saved["optimizer"])
        if o is optimizer:
            again = optimizer.full_state_dict()
            for i, entry in saved["optimizer"]["state"].items():
                assert_same_bits(again["state"][i]["exp_avg"], entry["exp_avg"], f"exp_avg {i} after load")
        expect(m, o, scheduler, range(6, 11), world_size)
    assert_same_model(model, expected)
    assert_same_momentum(optimizer.full_state_dict(), lion)
    assert optimizer.param_groups[0]["momentum_dtype"] == torch.float32


@pytest.mark.parametrize("rank0_only", [False, True])
def test_round_trip_over_world_sizes(rank0_only: bool, tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    run_ranks(body_save, 3, tmp_path, (path, rank0_only))
    for world_size in (1, 2, 3, 4):
        run_ranks(body_resume, world_size, tmp_path, (path,))


def body_lion_to_sharded(rank: int, world_size: int) -> None:
    """A Lion state with momentum for a frozen parameter, bf16 momentum kept, unknown group keys tolerated."""
    device = device_of(rank, world_size)
    source = Toy(3, FP32, device)
    lion = Lion(source.groups(), lr=0.01, momentum_dtype=torch.bfloat16)
    expect(source, lion, warm_up(lion), range(3), world_size)
    state = lion.state_dict()
    del state["param_groups"][0]["momentum_dtype"]
    state["param_groups"][0]["colour"] = "green"
    model = Toy(3, FP32, device)
    model.load_state_dict(source.state_dict())
    model.bias.requires_grad_(False)
    optimizer = ShardedLion(model.groups(), lr=0.01, stage=1)
    optimizer.load_state_dict(state)
    assert_same_momentum(optimizer.full_state_dict(), lion)
    assert optimizer.param_groups[0]["colour"] == "green"
    assert optimizer.param_groups[0]["momentum_dtype"] is None


def test_loads_a_state_dict_of_lion(tmp_path: Path) -> None:
    run_ranks(body_lion_to_sharded, 2, tmp_path)


def snapshot(model: Toy, optimizer: ShardedLion) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()] + [part.clone() for part in momentum_parts(optimizer)]


def body_foreign_state(rank: int, world_size: int) -> None:
    device = device_of(rank, world_size)
    model = Toy(3, FP32, device)
    optimizer = ShardedLion(model.groups(), lr=0.01, stage=1)
    expect(model, optimizer, warm_up(optimizer), range(2), world_size)
    good = optimizer.full_state_dict()
    before, groups = snapshot(model, optimizer), copy.deepcopy([{**g, "params": 0} for g in optimizer.param_groups])

    def changed(edit: object) -> dict:
        state = copy.deepcopy(good)
        edit(state)  # type: ignore[operator]
        return state

    def other_shape(state: dict) -> None:
        state["state"][0]["exp_avg"] = torch.zeros(5, 5)

    def other_optimizer(state: dict) -> None:
        state["state"][0]["exp_avg_sq"] = torch.zeros(())

    def bad_lr(state: dict) -> None:
        state["param_groups"][1]["lr"] = -1.0

    cases = [
        ({}, "param_groups"),
        (changed(other_shape), "another model"),
        (changed(other_optimizer), "another optimizer"),
        (changed(bad_lr), "lr must be"),
        (changed(lambda s: s["param_groups"].pop()), "sizes"),
        (changed(lambda s: s["param_groups"][0]["params"].pop()), "sizes"),
    ]
    for state, message in cases:
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(state)
        # On one rank only: every rank raises, and nothing changes on any.
        mine = rank == world_size - 1
        with pytest.raises(ValueError if mine else RuntimeError, match=message):
            optimizer.load_state_dict(state if mine else good)
    other_lr = changed(lambda s: s["param_groups"][0].update(lr=0.5))
    with pytest.raises(ValueError, match=r"different on the ranks.*lr=0\.5"):
        optimizer.load_state_dict(other_lr if rank == 1 else good)
    for a, b in zip(snapshot(model, optimizer), before, strict=True):
        assert_same_bits(a, b, "after refused loads")
    assert [{**g, "params": 0} for g in optimizer.param_groups] == groups
    optimizer.load_state_dict(good)


def test_foreign_state_changes_nothing(tmp_path: Path) -> None:
    run_ranks(body_foreign_state, 3, tmp_path)


def body_hooks(rank: int, world_size: int) -> None:
    """Pre hooks run once, before anything is checked; post hooks when all of it is there, and only then."""
    device = device_of(rank, world_size)
    model = Toy(3, FP32, device)
    optimizer = ShardedLion(model.groups(), lr=0.01, stage=1)
    expect(model, optimizer, warm_up(optimizer), range(2), world_size)
    good = optimizer.full_state_dict()
    log: list[str] = []
    seen: list[dict] = []

    def pre(_: object, state: dict) -> dict:
        log.append("pre")
        return {**state, "param_groups": [{**g, "lr": g["lr"] / 2} for g in state["param_groups"]]}

    def post(loaded: Any) -> None:
        log.append("post")
        seen.append(loaded.full_state_dict())  # a collective call
        for entry in loaded.state.values():
            entry["exp_avg"].copy_(entry["exp_avg"].map(lambda part: 2 * part))
        loaded.param_groups[0]["lr"] = 0.125

    other = ShardedLion(Toy(4, FP32, device).groups(), lr=0.5, stage=1)
    handles = [other.register_load_state_dict_pre_hook(pre), other.register_load_state_dict_post_hook(post)]
    handles.append(other.register_load_state_dict_post_hook(lambda _: log.append("post 2")))
    other.load_state_dict(good)
    assert log == ["pre", "post", "post 2"]
    after = other.full_state_dict()
    for i, entry in good["state"].items():
        assert_same_bits(seen[0]["state"][i]["exp_avg"], entry["exp_avg"], "in the hook")
        assert_same_bits(after["state"][i]["exp_avg"], 2 * entry["exp_avg"], "what the hook wrote")
    lrs = [g["lr"] for g in good["param_groups"]]
    assert [g["lr"] for g in after["param_groups"]] == [0.125, *(lr / 2 for lr in lrs[1:])]

    # Refused, on one rank or on all: no post hook. Its handle still works, and so does the next load.
    bad = {**good, "state": {**good["state"], 0: {"exp_avg": torch.zeros(5, 5)}}}
    for state in (bad if rank == 1 else good), bad:
        log.clear()
        with pytest.raises((ValueError, RuntimeError), match="another model"):
            other.load_state_dict(state)
        assert log == ["pre"]
    if world_size > 1:  # replicas that differ are found out after torch's own part of the load
        signs = ShardedLion(Toy(4, FP32, device).groups(), lr=0.5, stage=1, param_sync="signs")
        signs.register_load_state_dict_post_hook(lambda _: log.append("post"))
        log.clear()
        with torch.no_grad():
            signs.param_groups[0]["params"][0].add_(rank)
        with pytest.raises(RuntimeError, match="differ in their bits"):
            signs.load_state_dict(good)
        assert log == []
    handles[2].remove()
    log.clear()
    other.load_state_dict(good)
    assert log == ["pre", "post"]
    for handle in handles:
        handle.remove()

    # One that raises on one rank, on all: before the load nothing has been changed, after it the state is loaded.
    def fails(*_: object) -> None:
        if rank == 1:
            raise KeyError("of this rank's own")

    before = other.full_state_dict()
    cases: list[tuple[Callable[..., Any], Any]] = [
        (other.register_load_state_dict_pre_hook, before),
        (other.register_load_state_dict_post_hook, good),
    ]
    for register, loaded in cases:
        handle = register(fails)
        with pytest.raises(KeyError if rank == 1 else RuntimeError, match="of this rank's own"):
            other.load_state_dict(good)
        handle.remove()
        now = other.full_state_dict()
        assert [g["lr"] for g in now["param_groups"]] == [g["lr"] for g in loaded["param_groups"]]
        for i, entry in loaded["state"].items():
            assert_same_bits(now["state"][i]["exp_avg"], entry["exp_avg"], "after a hook that failed")


def test_load_hooks(tmp_path: Path) -> None:
    run_ranks(body_hooks, 2, tmp_path)


def body_init_state(rank: int, world_size: int) -> None:
    """Parameters that were unfrozen since have their momenta before the next step, as those of Lion's init_state()."""
    device = device_of(rank, world_size)
    for stage in (1, 2):
        models = [Toy(3, FP32, device) for _ in range(2)]
        optimizer = ShardedLion(models[0].groups(), lr=0.01, stage=stage)
        lion = Lion(models[1].groups(), lr=0.01)
        optimizer.init_state()  # there is nothing to do
        lion.init_state()
        assert_same_momentum(optimizer.full_state_dict(), lion)
        for step in range(4):
            if step == 2:
                for model in models:
                    model.frozen.requires_grad_()
                optimizer.init_state()
                lion.init_state()
                full = optimizer.full_state_dict()
                assert_same_momentum(full, lion)
                assert optimizer.state[models[0].frozen]["exp_avg"].shape == (33, 10)
                optimizer.load_state_dict(full)
            for name in SHAPES:
                g = models[1].average_gradient(name, step, world_size)
                models[1].get_parameter(name).grad = g
                models[0].get_parameter(name).grad = None if g is None or stage == 2 else g.clone()
            if stage == 2:
                models[0](step, rank, world_size).backward()
            for o in (optimizer, lion):
                o.step()
                o.zero_grad()
            assert_same_model(*models)
        assert_same_momentum(optimizer.full_state_dict(), lion)
    # Another parameter on another rank: refused on all, and made good.
    a, b = (nn.Parameter(torch.ones(n, device=device), requires_grad=False) for n in (300, 200))
    optimizer = ShardedLion([a, b, nn.Parameter(torch.ones(3, device=device))], lr=0.25)
    [a, b][rank].requires_grad_()
    with pytest.raises(ValueError, match=r"init_state\(\).*Rank 0: unfrozen parameter 0.*Rank 1: unfrozen parameter 1"):
        optimizer.init_state()
    assert len(optimizer.state) == 1
    a.requires_grad_()
    b.requires_grad_()
    optimizer.init_state()
    assert len(optimizer.state) == 3


def test_init_state(tmp_path: Path) -> None:
    run_ranks(body_init_state, 2, tmp_path)


def body_refusals(rank: int, world_size: int) -> None:
    optimizer = ShardedLion([nn.Parameter(torch.zeros(300, device=device_of(rank, world_size)))], stage=1)
    with pytest.raises(TypeError, match="full_state_dict"):
        pickle.dumps(optimizer.state_dict())
    with pytest.raises(TypeError, match="full_state_dict"):
        pickle.dumps(optimizer)
    with pytest.raises(TypeError, match="full_state_dict"):
        copy.deepcopy(optimizer)


def test_pickling_is_refused_with_advice(tmp_path: Path) -> None:
    run_ranks(body_refusals, 2, tmp_path)


TIMEOUT_S = 8  # long enough for ranks on a busy machine to meet, when they mean to


def body_alone(rank: int, world_size: int, caller: int) -> tuple[str, float]:
    group = dist.new_group(timeout=timedelta(seconds=TIMEOUT_S))
    device = device_of(rank, world_size)
    dist.barrier()
    optimizer = ShardedLion([nn.Parameter(torch.zeros(300, device=device))], stage=1, process_group=group)
    if rank != caller:
        return "", 0.0
    start = time.monotonic()
    with pytest.raises(RuntimeError) as error:
        optimizer.full_state_dict()
    return str(error.value), time.monotonic() - start


@spawn_only
@pytest.mark.parametrize("caller", [0, 1])
def test_full_state_dict_on_one_rank_names_the_absent(caller: int, tmp_path: Path) -> None:
    message, seconds = run_ranks(body_alone, 3, tmp_path, (caller,))[caller]
    absent = [r for r in range(3) if r != caller]
    assert f"ranks {absent}" in message
    assert "full_state_dict(rank0_only=False)" in message
    assert f"{TIMEOUT_S} s" in message
    assert seconds < TIMEOUT_S + 2


def test_toy_covers_heads_tails_and_tail_buffers() -> None:
    """The shapes do what toy.py says, for every world size tested."""
    from lion_dist.sharding.layout import ShardLayout

    model = Toy(0, FP32, torch.device("cpu"))
    for world_size in (2, 3, 4):
        layout = ShardLayout.make([getattr(model, n).numel() for n in SHAPES], world_size)
        assert any(layout.heads)
        assert 0 in layout.heads
        assert len(layout.tails) < sum(getattr(model, n).numel() > 0 for n in SHAPES)
        assert len({s.param for s in layout.slices(world_size - 1)}) > 2
