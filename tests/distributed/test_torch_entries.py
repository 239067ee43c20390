"""Momenta that torch's own functions cast or overwrite between strategies: every target refuses them, on every rank."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh

from lion_dist import Lion, ShardedLion
from tests.harness import device_of, run_ranks
from tests.scenarios.hand_fed import in_fsdp1, in_fsdp2
from tests.scenarios.precision import BF16, F32

INT8: dict[str, Any] = {"momentum_dtype": "int8"}
MASTERS: dict[str, Any] = {"master_weights": True}
FULL = StateDictOptions(full_state_dict=True)
Pair = tuple[nn.Module, Any]


def trained(kind: str, device: torch.device, dtype: torch.dtype, steps: int = 0, **options: Any) -> Pair:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 8)).to(device, dtype)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    if kind == "fsdp1":
        model = in_fsdp1(model, device_mesh=mesh)
    if kind == "fsdp2":
        model = in_fsdp2(model, mesh)
    make: Callable[..., Any] = ShardedLion if kind == "sharded" else Lion
    optimizer = make(model.named_parameters(), lr=1e-3, **options)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 32).to(device, dtype)).float().square().mean().mul(1e-3).backward()
        optimizer.step()
    optimizer.init_state()
    return model, optimizer


def body_cast(rank: int, world_size: int, folder: Path) -> None:
    device = device_of(rank, world_size)
    for there in ("lion", "sharded"):
        saved = get_optimizer_state_dict(*trained(there, device, F32, 3, **INT8))
        dcp.save({"optimizer": saved}, checkpoint_id=folder / there)
        for here in ("lion", "sharded", "fsdp1", "fsdp2"):
            pair = trained(here, device, F32)
            state = {"optimizer": get_optimizer_state_dict(*pair)}
            dcp.load(state, checkpoint_id=folder / there)
            with pytest.raises(ValueError, match="holds 8-bit codes as numbers"):
                set_optimizer_state_dict(*pair, state["optimizer"])


def test_codes_that_were_loaded_as_numbers(tmp_path: Path) -> None:
    run_ranks(body_cast, 2, tmp_path, (tmp_path,))


def body_shared(rank: int, world_size: int) -> None:
    device = torch.device("cpu")
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    for extra in ({}, {"momentum_dtype": "float32"}, INT8):
        saved = [get_optimizer_state_dict(*trained("fsdp1", device, BF16, 3, **MASTERS, **extra), options=options)]
        dist.broadcast_object_list(saved)
        for here in ("lion", "sharded", "fsdp1", "fsdp2"):
            for masters in (MASTERS, {}):
                pair = trained(here, device, BF16, **masters, **extra)
                with pytest.raises(ValueError, match=r"exp_avg and remainder of parameter .* are the same numbers"):
                    set_optimizer_state_dict(*pair, copy.deepcopy(saved[0]), options=FULL)


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch copies from a GPU into memory of its own")
def test_a_momentum_that_the_remainder_has_overwritten(tmp_path: Path) -> None:
    run_ranks(body_shared, 2, tmp_path)
