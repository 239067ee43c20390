"""Bad input of ShardedLion that concerns master weights and 8-bit momenta: all ranks raise; nothing is changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lion_dist import ShardedLion
from tests.asserts import assert_same_bits
from tests.harness import device_of, run_ranks

BF16, F16 = torch.bfloat16, torch.float16
HALF = r"master_weights=True, but a parameter of shape \(3,\) is torch\.float16; expected bfloat16"


def param(rank: int, world_size: int, dtype: torch.dtype, *shape: int) -> nn.Parameter:
    return nn.Parameter(torch.ones(shape, dtype=dtype, device=device_of(rank, world_size)))


def body_groups(rank: int, world_size: int, stage: int) -> None:
    """In the constructor, in a group, and in a new group."""
    options: dict[str, Any] = {"lr": 0.25, "stage": stage}

    def new(dtype: torch.dtype, *shape: int) -> nn.Parameter:
        return param(rank, world_size, dtype, *shape)

    bad: list[tuple[dict[str, Any], torch.dtype, type[Exception], str]] = [
        ({"master_weights": True}, F16, TypeError, HALF),
        ({"master_weights": "yes"}, BF16, TypeError, "master_weights must be True or False, got 'yes'"),
        ({"momentum_dtype": torch.int16}, BF16, TypeError, r"momentum_dtype must be .* or int8, got torch\.int16"),
        ({"momentum_dtype": "int8", "lr": -1.0}, BF16, ValueError, "lr must be finite and >= 0"),
    ]
    for values, dtype, error, message in bad:
        with pytest.raises(error, match=message):
            ShardedLion([new(dtype, 3)], **{**options, **values})
        with pytest.raises(error, match=message):
            ShardedLion([{"params": [new(BF16, 300)]}, {"params": [new(dtype, 3)], **values}], **options)
        p = new(BF16, 300)
        optimizer = ShardedLion([p], **options)
        with pytest.raises(error, match=message):
            optimizer.add_param_group({"params": [new(dtype, 3)], **values})
        with pytest.raises((error, RuntimeError)):  # one rank alone is given it
            optimizer.add_param_group({"params": [new(dtype, 3)], **(values if rank == 1 else {})})
        assert len(optimizer.param_groups) == 1
        p.grad = torch.ones_like(p)
        optimizer.step()
        assert_same_bits(p.detach(), torch.full_like(p, 0.75))
    with pytest.raises(ValueError, match="rounding_step must be an integer >= 0"):
        ShardedLion([{"params": [new(BF16, 3)], "momentum_dtype": "int8", "rounding_step": -1}], **options)


@pytest.mark.parametrize("stage", [1, 2])
def test_groups(tmp_path: Path, stage: int) -> None:
    run_ranks(body_groups, 2, tmp_path, (stage,))


def body_unfrozen(rank: int, world_size: int) -> None:
    """float16 weights may be frozen in a group with master weights. Once they are not, every rank raises."""
    p = param(rank, world_size, BF16, 300)
    half = param(rank, world_size, F16, 3).requires_grad_(False)
    optimizer = ShardedLion([p, half], lr=0.25, stage=1, master_weights=True)
    p.grad = torch.ones_like(p)
    optimizer.step()
    half.requires_grad_(True)
    half.grad = torch.ones_like(half)
    before = p.detach().clone()
    for _ in range(2):
        with pytest.raises(TypeError, match=HALF):
            optimizer.step()
        assert_same_bits(p.detach(), before)
        assert_same_bits(half.detach(), torch.ones_like(half))
    half.requires_grad_(False)
    half.grad = None
    optimizer.step()
    assert (p != before).all()


def test_float16_weights_that_are_unfrozen(tmp_path: Path) -> None:
    run_ranks(body_unfrozen, 2, tmp_path)


def body_edited(rank: int, world_size: int) -> None:
    """Between steps, by hand."""
    edits: list[tuple[dict[str, Any], str]] = [
        ({"master_weights": 1}, "master_weights must be True or False"),
        ({"momentum_dtype": torch.uint8}, "or int8, got torch.uint8"),
    ]
    for edit, message in edits:
        p = param(rank, world_size, BF16, 300)
        optimizer = ShardedLion([p], lr=0.25, stage=1)
        p.grad = torch.ones_like(p)
        optimizer.step()
        before = p.detach().clone()
        optimizer.param_groups[0].update(edit)
        with pytest.raises(TypeError, match=message):
            optimizer.step()
        assert_same_bits(p.detach(), before)


def test_groups_that_are_edited(tmp_path: Path) -> None:
    run_ranks(body_edited, 2, tmp_path)
