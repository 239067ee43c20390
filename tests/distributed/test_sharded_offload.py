"""offload_state() and reload_state(): the same bits, whatever is kept, and what may be done between them."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from lion_dist import ShardedLion, checkpoint
from lion_dist.sharding.shard import Shard
from lion_dist.update.state import EXP_AVG
from tests.asserts import assert_same_bits
from tests.harness import device_of, run_ranks
from tests.scenarios.modes import Mode, Modes, sizes, values

GROUPS: list[dict[str, Any]] = [{"params": [5, 2, 4, 0], "weight_decay": 0.1}, {"params": [1, 3, 6, 7], "lr": 3e-4}]
EIGHT: dict[str, Any] = {"master_weights": True, "momentum_dtype": "int8"}


def moved_in_memory(shard: Shard, device: torch.device | str) -> Any:
    """In place of `Shard.state_on`: copies on the CPU too, so that a step of what has been moved away is noticed."""
    found = state_on(shard, device)
    whole = {name: [t.clone() for t in of_params] for name, of_params in found.whole.items()}
    return found._replace(buffers={name: t.clone() for name, t in found.buffers.items()}, whole=whole)


state_on = Shard.state_on


def put(function: Callable[[Shard, torch.device | str], Any]) -> None:
    setattr(Shard, state_on.__name__, function)


def read(mode: Mode, expected: list[dict[str, Tensor]]) -> None:
    """Everything that reads the state works while it is offloaded, and gives it."""
    optimizer = mode.optimizer
    for got, old in zip(mode.whole_state(), expected, strict=True):
        for name, t in old.items():
            assert_same_bits(got[name], t, f"{mode}: {name}, offloaded")
    for state in (optimizer.state, optimizer.state_dict()["state"]):
        assert all(t.device.type == "cpu" for entry in state.values() for t in entry.values())
    assert copy.deepcopy(optimizer.state_dict())["state"].keys() == set(range(len(mode.params)))


def refused(mode: Mode) -> None:
    optimizer = mode.optimizer
    good = optimizer.full_state_dict()
    weights = [p.detach().clone() for p in mode.params]
    calls: list[Callable[[], object]] = [
        optimizer.step, lambda: optimizer.step(lambda: 1 / 0), lambda: optimizer.clip_grad_norm_(1.0),
        lambda: optimizer.load_state_dict(good),
    ]  # fmt: skip
    if mode.sync == "signs" and optimizer.param_groups[0]["master_weights"]:  # remainders are replicated
        calls += [optimizer.check_replicas, optimizer.resync]
    for call in calls:
        with pytest.raises(RuntimeError, match=r"reload_state\(\) on every rank"):
            call()
    for p, weight in zip(mode.params, weights, strict=True):
        assert_same_bits(p, weight, "a refused call")


def body_phases(rank: int, world_size: int) -> None:
    put(moved_in_memory)
    device = device_of(rank, world_size)
    for dtype, options in ((torch.float32, {}), (torch.bfloat16, EIGHT)):
        modes = Modes(rank, world_size, values(sizes(world_size), dtype, device), GROUPS, **options)
        for phase in range(3):
            for step in range(2):
                modes.step(2 * phase + step)
            for mode in modes.modes:
                optimizer, before = mode.optimizer, mode.whole_state()
                if phase == 1:
                    optimizer.reload_state()  # nothing is offloaded
                optimizer.offload_state()
                read(mode, before)
                if phase:
                    refused(mode)
                    optimizer.offload_state()  # a second time
                for p in mode.params:  # written while offloaded
                    optimizer.state[p][EXP_AVG] = optimizer.state[p][EXP_AVG].clone()
                before_move = [StorageWeakRef(p.untyped_storage()) for p in mode.params if p.numel()]
                for p in mode.params:  # as model.to() moves them
                    p.data = p.data.clone()
                gc.collect()
                assert all(storage.expired() for storage in before_move), f"{mode}: memory of the weights is kept"
                optimizer.reload_state()
                assert all(t.device == device for p in mode.params for t in optimizer.state[p].values())
        modes.step(6)
        modes.check("after three phases")


@pytest.mark.parametrize("world_size", [2, 3])
def test_phases(world_size: int, tmp_path: Path) -> None:
    run_ranks(body_phases, world_size, tmp_path)


def body_around(rank: int, world_size: int, folder: Path) -> None:
    """Gradients that wait, parameters that are added or unfrozen, and checkpoints, while the state is offloaded."""
    device = device_of(rank, world_size)
    models = [nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 20), nn.Linear(20, 3)).to(device) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = []
    for model in models:
        model[1].requires_grad_(False)
        optimizers.append(ShardedLion([*model[0].named_parameters("0"), *model[1].named_parameters("1")], lr=0.01))

    def backward(step: int) -> None:
        x = torch.randn(4, 40, generator=torch.Generator().manual_seed(10 * step + rank)).to(device)
        for model in models:
            model(x).square().sum().backward()

    there = optimizers[0]
    for optimizer in optimizers:
        optimizer.load_state_dict(optimizer.full_state_dict())
    backward(0)
    there.offload_state()  # with gradients under way
    checkpoint.save(folder / "offloaded", nn.ModuleDict({"0": models[0][0], "1": models[0][1]}), there)
    with pytest.raises(RuntimeError, match=r"checkpoint\.load\(\) of a ShardedLion whose state is on the CPU"):
        checkpoint.load(folder / "offloaded", nn.ModuleDict({"0": models[0][0], "1": models[0][1]}), there)
    for model, optimizer in zip(models, optimizers, strict=True):
        model[1].requires_grad_(True)
        optimizer.init_state()
        optimizer.add_param_group({"params": list(model[2].named_parameters("2")), "lr": 0.1})
    with pytest.raises(RuntimeError, match="reload_state"):
        there.step()
    there.reload_state()
    for step in range(1, 4):
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        backward(step)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert_same_bits(a, b, "a parameter")
    saved, whole = nn.ModuleDict({"0": nn.Linear(40, 30), "1": nn.Linear(30, 20)}), there.full_state_dict()["state"]
    assert whole.keys() == set(range(6))
    checkpoint.load(folder / "offloaded", saved.to(device))


def test_around_it(tmp_path: Path) -> None:
    run_ranks(body_around, 2, tmp_path, (tmp_path,))


def out_of_memory(shard: Shard, device: torch.device | str) -> Any:
    raise torch.OutOfMemoryError("none left")


def body_failures(rank: int, world_size: int) -> None:
    """A rank without memory: every rank raises, and nothing has moved on any."""
    model = nn.Linear(40, 30).to(device_of(rank, world_size))
    optimizer = ShardedLion(model.named_parameters(), lr=0.01)
    for call in (optimizer.offload_state, optimizer.reload_state):
        before = [shard.offloaded for shard in optimizer._shards]
        if rank == 1:
            put(out_of_memory)
        with pytest.raises(torch.OutOfMemoryError if rank == 1 else RuntimeError, match="none left"):
            call()
        assert [shard.offloaded for shard in optimizer._shards] == before
        put(state_on)
        call()
        assert [shard.offloaded for shard in optimizer._shards] != before
    with torch.inference_mode():  # around a phase of generation; state that is made in it could not be stepped after
        moved = [t for shard in optimizer._shards for t in shard.state_on("meta").buffers.values()]
    assert moved
    assert not any(t.is_inference() for t in moved)
    model.weight.sum().backward()
    optimizer.step()


def test_a_rank_without_memory(tmp_path: Path) -> None:
    run_ranks(body_failures, 2, tmp_path)
