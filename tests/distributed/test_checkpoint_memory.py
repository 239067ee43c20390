"""The host memory that a save takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lion_dist import ShardedLion, checkpoint
from tests.harness import device_of, run_ranks, spawn_only

SHARD_BYTES = 128 << 20  # what a rank writes of four parameters: weights and momenta
# dtype of the weights, bytes that are written for an element of a parameter, and the optimizer's arguments. Master
# weights are written as float32, which they are not in memory.
FORMS: dict[str, tuple[torch.dtype, float, dict[str, Any]]] = {
    "float32": (torch.float32, 8, {}),
    "master weights": (torch.bfloat16, 5 + 4 / 128, {"master_weights": True, "momentum_dtype": "int8"}),
}


def peak() -> int:
    """Bytes that this process has had resident at most since `reset_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024


def resident() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) * 1024


def reset_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def body_memory(rank: int, world_size: int, folder: Path, form: str) -> tuple[float, float]:
    """The memory that save and async_save take at their peak, as parts of this rank's shard: what it writes of
    weights and the momentum. The shard itself is there before, so it counts as one."""
    device = device_of(rank, world_size)
    dtype, size, options = FORMS[form]
    numel = int(SHARD_BYTES / size / 4) * world_size
    model = nn.ParameterList(torch.ones(numel, dtype=dtype, device=device) for _ in range(4))
    optimizer = ShardedLion(model.parameters(), **options)
    small = nn.Linear(8, 8).to(device, dtype)
    first = ShardedLion(small.parameters(), **options)
    checkpoint.async_save(folder / "warm", small, first).result()  # imports, kernels, threads, groups
    before = reset_peak()
    checkpoint.save(folder / "c", model, optimizer)
    saved = peak() - before
    before = reset_peak()
    kept = []  # what a loop may well keep
    for i in range(3):
        kept.append(checkpoint.async_save(folder / f"d{i}", model, optimizer))
        kept[-1].result()
    beside = peak() - before
    left = resident() - before
    assert left < 0.5 * SHARD_BYTES, f"{left} bytes are resident after three asynchronous saves"
    written = (folder / "c" / f"data-{rank:05}.bin").stat().st_size
    assert abs(written - SHARD_BYTES) < 0.01 * SHARD_BYTES, f"the shard is of {written} bytes"
    return 1 + saved / SHARD_BYTES, 1 + beside / SHARD_BYTES


@spawn_only
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's count of resident memory")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.exhaustive)])
def test_host_memory(world_size: int, form: str, tmp_path: Path) -> None:
    results = run_ranks(body_memory, world_size, tmp_path, (tmp_path, form), on_cpu=True)
    for rank, (save, beside) in enumerate(results):
        print(f"rank {rank}: save takes {save:.2f} times the shard, async_save {beside:.2f} times")
    # The threads' blocks, and for async_save a copy of the shard.
    assert max(save for save, _ in results) <= 1.3
    assert max(beside for _, beside in results) <= 2.3
