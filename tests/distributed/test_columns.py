"""A further column of state under ShardedLion: it is sharded, gathered, loaded and saved as the momentum is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lion_dist import Lion, ShardedLion, checkpoint
from lion_dist.sharding.box_tensor import BoxTensor
from lion_dist.update.state import EXP_AVG
from tests.asserts import assert_same_bits
from tests.harness import device_of, run_ranks
from tests.scenarios.columns import COUNT, add_count
from tests.scenarios.toy import MIXED, Toy

LR = 0.01


def trained_params(optimizer: ShardedLion | Lion) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]


def counts(optimizer: ShardedLion | Lion) -> list[Tensor]:
    """For each trained parameter, other numbers, all different and none of them 0."""
    return [
        (torch.arange(p.numel(), dtype=torch.int32, device=p.device) + 10_000 * i + 1).view(p.shape)
        for i, p in enumerate(trained_params(optimizer))
    ]


def backward(model: Toy, step: int, rank: int, world_size: int, stage: int) -> None:
    if stage == 2:
        model(step, rank, world_size).backward()
        return
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.grad = model.average_gradient(name, step, world_size)


def assert_counts(optimizer: ShardedLion, expected: list[Tensor]) -> None:
    """Both the whole state and this rank's BoxTensors have these numbers in each parameter's elements."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [i for i, p in enumerate(params) if p.requires_grad]
    full, own = optimizer.full_state_dict()["state"], optimizer.state_dict()["state"]
    assert list(full) == list(own) == numbers
    for i, want in zip(numbers, expected, strict=True):
        assert list(full[i]) == list(own[i]) == [EXP_AVG, COUNT]
        assert_same_bits(full[i][COUNT], want.cpu(), f"count of parameter {i}")
        boxes, momentum = own[i][COUNT], own[i][EXP_AVG]
        assert isinstance(boxes, BoxTensor)
        assert boxes.dtype == torch.int32
        assert boxes.boxes == momentum.boxes  # of the elements that this rank steps
        for box, part in zip(boxes.boxes, boxes.parts, strict=True):
            assert_same_bits(part, want[box.slices()], f"boxes of parameter {i}")


def assert_same_momenta(got: dict[Any, Any], expected: dict[Any, Any]) -> None:
    assert got.keys() == expected.keys()
    for i, entry in expected.items():
        assert_same_bits(got[i][EXP_AVG].cpu(), entry[EXP_AVG].cpu(), f"momentum of parameter {i}")


def goes_round(rank: int, world_size: int, stage: int, sync: str, folder: Path) -> None:
    device = device_of(rank, world_size)

    def made(seed: int, stage: int) -> tuple[Toy, ShardedLion]:
        model = Toy(seed, MIXED, device)
        return model, ShardedLion(model.groups(), lr=LR, stage=stage, param_sync=sync)

    model, optimizer = made(1, stage)
    assert_counts(optimizer, [torch.zeros_like(c) for c in counts(optimizer)])
    expected = counts(optimizer)
    for p, count in zip(trained_params(optimizer), expected, strict=True):
        optimizer.state[p][COUNT] = count
    backward(model, 0, rank, world_size, stage)
    optimizer.step()
    optimizer.zero_grad()
    assert_counts(optimizer, expected)  # Lion's step leaves the column alone
    full = optimizer.full_state_dict()

    # To Lion and back, into another ShardedLion.
    lion = Lion(Toy(1, MIXED, device).groups(), lr=LR)
    lion.load_state_dict(full)
    for p, count in zip(trained_params(lion), expected, strict=True):
        assert_same_bits(lion.state[p][COUNT], count, "count under Lion")
    _, other = made(1, stage)
    other.load_state_dict(lion.state_dict())
    assert_counts(other, expected)
    assert_same_momenta(other.full_state_dict()["state"], full["state"])

    # This rank's own part.
    _, other = made(1, stage)
    other.load_state_dict(optimizer.state_dict())
    assert_counts(other, expected)

    # A checkpoint, into the other stage.
    checkpoint.save(folder / "step-1", model, optimizer)
    other_model, other = made(2, 3 - stage)
    checkpoint.load(folder / "step-1", other_model, other)
    assert_counts(other, expected)
    assert_same_momenta(other.full_state_dict()["state"], full["state"])

    # State without the column is refused, and leaves everything as it was.
    without = {**full, "state": {i: {EXP_AVG: entry[EXP_AVG]} for i, entry in full["state"].items()}}
    with pytest.raises(ValueError, match=f"has '{EXP_AVG}' and '{COUNT}'"):
        optimizer.load_state_dict(without)
    assert_counts(optimizer, expected)


def body_column(rank: int, world_size: int, folder: Path) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        add_count(monkeypatch)
        for stage in (1, 2):
            for sync in ("params", "signs"):
                goes_round(rank, world_size, stage, sync, folder / f"{stage}-{sync}")


def test_a_further_column_goes_wherever_the_momentum_does(tmp_path: Path) -> None:
    run_ranks(body_column, 2, tmp_path, (tmp_path,))
