"""offload_state() on GPUs over NCCL: memory is given back, and the state is read from the CPU meanwhile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lion_dist import ShardedLion, checkpoint
from tests.asserts import assert_same_bits
from tests.harness import device_of

from .common import BF16, F32, needs_gpu, run_on_gpus

pytestmark = needs_gpu

WIDTH = 1 << 10
MODES: list[tuple[torch.dtype, dict[str, Any]]] = [
    (F32, {"param_sync": "signs"}),
    (F32, {"param_sync": "params", "use_triton": False}),  # whose steps keep views of the momenta
    (BF16, {"param_sync": "signs", "master_weights": True, "momentum_dtype": "int8"}),
    (BF16, {"param_sync": "params", "master_weights": True, "momentum_dtype": "float32"}),
]


def allocated() -> int:
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


def held(optimizer: ShardedLion) -> int:
    """Bytes of this rank's state."""
    whole = [t for shard in optimizer._shards for of_params in shard.whole.values() for t in of_params]
    tensors = [*whole, *(t for shard in optimizer._shards for t in shard.buffers.values())]
    return sum(t.nbytes for t in tensors)


def trained(device: torch.device, dtype: torch.dtype, options: dict[str, Any]) -> tuple[nn.Module, ShardedLion]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4 * WIDTH)).to(device, dtype)
    return model, ShardedLion(model.named_parameters(), lr=1e-3, **options)


def step(model: nn.Module, optimizer: ShardedLion, number: int) -> None:
    generator = torch.Generator().manual_seed(10 * number + torch.distributed.get_rank())
    p = next(model.parameters())
    model(torch.randn(8, WIDTH, generator=generator).to(p)).float().square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def body_memory(rank: int, world_size: int, folder: Path) -> None:
    device = device_of(rank, world_size)
    for number, (dtype, options) in enumerate(MODES):
        model, optimizer = trained(device, dtype, options)
        twin, undisturbed = trained(device, dtype, options)
        for phase in range(2):
            for i in range(2):
                step(model, optimizer, 2 * phase + i)
                step(twin, undisturbed, 2 * phase + i)
            before, bytes_held = allocated(), held(optimizer)
            optimizer.offload_state()
            freed = before - allocated()
            assert freed >= bytes_held, f"{options}: {freed} bytes freed of {bytes_held}"
            assert all(t.device.type == "cpu" for entry in optimizer.state.values() for t in entry.values())
            full, expected = optimizer.full_state_dict(), undisturbed.full_state_dict()
            for i, entry in expected["state"].items():
                for name, t in entry.items():
                    assert_same_bits(full["state"][i][name], t, f"{options}: {name} of {i}, offloaded")
            optimizer.state_dict()
            path = folder / f"{number}-{phase}"
            checkpoint.save(path, model, optimizer)
            with pytest.raises(RuntimeError, match="reload_state"):
                optimizer.step()
            model.to("cpu")
            model.to(device)
            optimizer.reload_state()
            assert abs(allocated() - before) <= 1 << 20
            loaded = trained(device, dtype, options)
            checkpoint.load(path, *loaded)
            step(*loaded, 99)
            del loaded
        step(model, optimizer, 4)
        step(twin, undisturbed, 4)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert_same_bits(p, q, str(options))


@pytest.mark.parametrize("world_size", [1, 2])
def test_memory(world_size: int, tmp_path: Path) -> None:
    run_on_gpus(body_memory, world_size, tmp_path, (tmp_path,))
