"""What is sharded becomes a safetensors file by way of a checkpoint."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from lion_dist import Lion, ShardedLion, checkpoint
from lion_dist.checkpoint import convert
from tests.asserts import assert_same_bits
from tests.harness import device_of, run_ranks


def body_sharded(rank: int, world_size: int, folder: Path) -> None:
    torch.manual_seed(0)
    device = device_of(rank, world_size)
    model = nn.Linear(5, 3, device=device)
    optimizer = ShardedLion(model.named_parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"ShardedLion shards its state; expected Lion: save it with lion_dist\.checkp"):
        convert.to_safetensors(folder / "m", model, optimizer)
    model(torch.ones(2, 5, device=device)).sum().backward()
    optimizer.step()
    checkpoint.save(folder / "saved", model, optimizer)
    sharded = nn.Linear(5, 3, device=device)
    fully_shard(sharded)
    with pytest.raises(TypeError, match="weight is sharded; expected a whole model: save it"):
        convert.to_safetensors(folder / "m", sharded, Lion(sharded.named_parameters()))
    if rank == 0:
        assert sorted(os.listdir(folder)) == ["saved"]
        torch.save(model.state_dict(), folder / "expected.pt")


def test_what_is_sharded_is_refused_and_becomes_whole_by_a_checkpoint(tmp_path: Path) -> None:
    load_file = pytest.importorskip("safetensors.torch").load_file
    (tmp_path / "files").mkdir()
    run_ranks(body_sharded, 2, tmp_path, (tmp_path / "files",))
    whole = nn.Linear(5, 3)
    checkpoint.load(tmp_path / "files/saved", whole)
    convert.to_safetensors(tmp_path / "m", whole)
    expected = torch.load(tmp_path / "files/expected.pt", map_location="cpu", weights_only=True)
    for name, t in load_file(tmp_path / "m").items():
        assert_same_bits(t, expected[name], name)
