"""full_state_dict and load_state_dict across world sizes and optimizers, and what is refused."""

from __future__ import annotations

import copy
import pickle
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lion_dist import Lion, ShardedLion
from tests.bits import assert_same_bits
from tests.distributed.test_sharded_lion import (
    FP32,
    MIXED,
    assert_same_model,
    assert_same_momentum,
    expect,
    train,
    warm_up,
    wrapped,
)
from tests.distributed.toy import SHAPES, Toy
from tests.harness import device_of, run_ranks, spawn_only

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


def test_takes_a_lion_state(tmp_path: Path) -> None:
    run_ranks(body_lion_to_sharded, 2, tmp_path)


def snapshot(model: Toy, optimizer: ShardedLion) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()] + [s.exp_avg.clone() for s in optimizer._shards]


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


def body_refusals(rank: int, world_size: int) -> None:
    optimizer = ShardedLion([nn.Parameter(torch.zeros(300, device=device_of(rank, world_size)))], stage=1)
    with pytest.raises(TypeError, match="full_state_dict"):
        pickle.dumps(optimizer.state_dict())
    with pytest.raises(TypeError, match="full_state_dict"):
        pickle.dumps(optimizer)
    with pytest.raises(TypeError, match="full_state_dict"):
        copy.deepcopy(optimizer)


def test_pickle_names_the_way(tmp_path: Path) -> None:
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
    assert "full_state_dict()" in message
    assert f"{TIMEOUT_S} s" in message
    assert seconds < TIMEOUT_S + 2


def test_toy_covers_heads_tails_and_pack() -> None:
    """The shapes do what toy.py says, for every world size tested."""
    from lion_dist.sharding.layout import ShardLayout

    model = Toy(0, FP32, torch.device("cpu"))
    for world_size in (2, 3, 4):
        layout = ShardLayout.make([getattr(model, n).numel() for n in SHAPES], world_size)
        assert any(layout.heads)
        assert 0 in layout.heads
        assert len(layout.tails) < sum(getattr(model, n).numel() > 0 for n in SHAPES)
        assert len({s.param for s in layout.slices(world_size - 1)}) > 2
