"""Parameter groups that were edited by hand on one rank: every rank raises, and goes on once they are set back."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lion_dist import ShardedLion
from tests.asserts import assert_same_bits
from tests.harness import device_of, run_ranks

HERE = {
    "form": r"momentum_dtype or master_weights of .* was changed.* Set them back; to change them, load the full_state",
    "members": r"parameters were added to or removed from param_groups",
}
ELSEWHERE = r"ranks \[1\] of the group made a step that differs"


def edited(optimizer: ShardedLion, what: str) -> Any:
    """Edits the group, and returns what sets it back."""
    (group,) = optimizer.param_groups
    key, value = ("momentum_dtype", None) if what == "form" else ("params", group["params"][:1])
    before, group[key] = group[key], value
    return lambda: group.update({key: before})


def check(rank: int, device: torch.device, stage: int, sync: str, clips: bool) -> None:
    params = [nn.Parameter(torch.ones(300, device=device)), nn.Parameter(torch.ones(5, device=device))]
    optimizer = ShardedLion(params, lr=0.25, stage=stage, param_sync=sync, momentum_dtype="int8")

    def backward() -> None:
        optimizer.zero_grad()
        if stage == 2:
            torch.stack([p.sum() for p in params]).sum().backward()
        else:
            for p in params:
                p.grad = torch.ones_like(p)
        if clips:
            optimizer.clip_grad_norm_(1.0)

    ones = [p.detach().clone() for p in params]
    for what, said in HERE.items():  # in the first steps, which stage 1 compares
        for everywhere in (False, True):
            if rank or everywhere:
                set_back = edited(optimizer, what)
            backward()
            with pytest.raises(ValueError, match=said if rank or everywhere else ELSEWHERE):
                optimizer.step()
            if rank or everywhere:
                set_back()
    for p, before in zip(params, ones, strict=True):
        assert_same_bits(p.detach(), before)
    backward()
    optimizer.step()
    optimizer.check_replicas()
    assert all((p == 0.75).all() for p in params)


def body(rank: int, world_size: int) -> None:
    for stage in (1, 2):
        for sync in ("params", "signs"):
            for clips in (False, True):
                check(rank, device_of(rank, world_size), stage, sync, clips)


def test_groups_edited_on_one_rank(tmp_path: Path) -> None:
    run_ranks(body, 2, tmp_path, timeout=timedelta(seconds=60), on_cpu=True)
