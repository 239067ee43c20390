"""consolidate_state_dict(): the whole state for code that saves state_dict() on one rank, and torch's doors to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from lion_dist import Lion, ShardedLion, checkpoint
from lion_dist.sharding.box_tensor import BoxTensor
from tests.asserts import assert_same_bits
from tests.harness import device_of, run_ranks
from tests.scenarios.hybrid import BF16, F32, Case, Twins, mesh_of
from tests.scenarios.modes import Modes, average, by_param, sizes, values

GROUPS: list[dict[str, Any]] = [{"params": [5, 2, 4, 0], "weight_decay": 0.1}, {"params": [1, 3, 6, 7], "lr": 3e-4}]
FORMS: list[tuple[torch.dtype, dict[str, Any]]] = [
    (F32, {}),
    (BF16, {"master_weights": True, "momentum_dtype": "int8"}),
]


def trained(rank: int, world_size: int, form: int) -> Modes:
    dtype, options = FORMS[form]
    modes = Modes(rank, world_size, values(sizes(2), dtype, device_of(rank, world_size)), GROUPS, **options)
    modes.step(0)
    modes.step(1)
    return modes


def assert_same_states(got: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    assert got["param_groups"] == expected["param_groups"]
    assert list(got["state"]) == list(expected["state"])
    for i, entry in expected["state"].items():
        assert list(got["state"][i]) == list(entry)
        for name, t in entry.items():
            assert type(got["state"][i][name]) is Tensor
            assert_same_bits(got["state"][i][name], t, f"{name} of {i}")


def is_sharded(state: Mapping[str, Any]) -> bool:
    return all(isinstance(entry["exp_avg"], BoxTensor) for entry in state["state"].values())


def body_save(rank: int, world_size: int, folder: Path) -> None:
    for form in range(len(FORMS)):
        modes = trained(rank, world_size, form)
        for number, mode in enumerate(modes.modes):
            optimizer = mode.optimizer
            expected = optimizer.full_state_dict()
            for to in (0, world_size - 1):
                optimizer.consolidate_state_dict(to=to)
                state = optimizer.state_dict()
                if rank == to:
                    assert_same_states(state, expected)
                    assert all(t.device.type == "cpu" for entry in state["state"].values() for t in entry.values())
                    torch.save({"optimizer": state, "params": [p.detach().cpu() for p in mode.params]},
                               folder / f"{form}-{number}-{to}")  # fmt: skip
                else:
                    assert is_sharded(state)
            # A step, a load, a load of a checkpoint and a resync, which may change remainders, end it.
            optimizer.load_state_dict(expected)
            assert is_sharded(optimizer.state_dict())
            optimizer.consolidate_state_dict()
            optimizer.resync()
            assert is_sharded(optimizer.state_dict())
            optimizer.offload_state()
            optimizer.consolidate_state_dict()
            if rank == 0:
                assert_same_states(optimizer.state_dict(), expected)
            optimizer.reload_state()
        modes.step(2)
        modes.check("after saves")
        assert all(is_sharded(mode.optimizer.state_dict()) for mode in modes.modes)


def body_load(rank: int, world_size: int, folder: Path) -> None:
    """What was saved on 3 ranks goes on under ShardedLion on 2 as it does under Lion."""
    device = device_of(rank, world_size)
    for form, (dtype, options) in enumerate(FORMS):
        modes = Modes(rank, world_size, values(sizes(2), dtype, device), GROUPS, **options)
        for number, mode in enumerate(modes.modes):
            for to in (0, 2):
                saved = torch.load(folder / f"{form}-{number}-{to}", weights_only=True)
                fresh = modes.fresh(1, mode.sync, [p.to(device) for p in saved["params"]])
                params = [nn.Parameter(p.to(device)) for p in saved["params"]]
                lion = Lion(modes.grouped(params), lr=0.01, **options)
                for optimizer, own in ((fresh.optimizer, fresh.params), (lion, params)):
                    optimizer.load_state_dict(saved["optimizer"])
                    if optimizer is not lion:
                        assert_same_states(fresh.optimizer.full_state_dict(), saved["optimizer"])
                    for i, p in enumerate(own):
                        p.grad = average(i, p, 2, world_size, hostile=False)
                    optimizer.step()
                for p, q in zip(fresh.params, params, strict=True):
                    assert_same_bits(p, q, f"{mode}: a parameter")
                on_cpu = by_param(lion.state_dict(), lion, params)
                for got, expected in zip(fresh.whole_state(), on_cpu, strict=True):
                    for name, t in expected.items():
                        assert_same_bits(got[name], t.cpu(), f"{mode}: {name}")


def test_saved_and_loaded(tmp_path: Path) -> None:
    run_ranks(body_save, 3, tmp_path, (tmp_path,))
    run_ranks(body_load, 2, tmp_path, (tmp_path,))


def small(device: torch.device, **options: Any) -> tuple[nn.Module, ShardedLion]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(33, 30), nn.Linear(30, 5)).to(device)
    return model, ShardedLion(model.named_parameters(), lr=0.01, **options)


def stepped(model: nn.Module, optimizer: ShardedLion) -> None:
    model(torch.randn(3, 33).to(next(model.parameters()))).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
FROM_FIRST = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


def body_doors(rank: int, world_size: int, folder: Path) -> None:
    """What frameworks and torch's own functions do with it."""
    device = device_of(rank, world_size)
    for options in ({}, {"momentum_dtype": "int8"}):
        model, optimizer = small(device, **options)
        stepped(model, optimizer)
        expected = optimizer.full_state_dict()

        # Lightning's Strategy.optimizer_state, and its ZeroRedundancyOptimizer's call by position.
        assert hasattr(optimizer, "consolidate_state_dict")
        optimizer.consolidate_state_dict(0)
        state: Any = optimizer.state_dict() if rank == 0 else {}
        if rank == 0:
            assert_same_states(state, expected)
        # torch's functions, by name: from the first rank alone, and from every rank.
        whole = get_optimizer_state_dict(model, optimizer, options=FULL)
        assert bool(whole) == (rank == 0)
        other = small(device, **options)
        set_optimizer_state_dict(*other, whole, options=FROM_FIRST)
        assert_same_states(other[1].full_state_dict(), expected)
        everywhere: list[Any] = [whole]
        dist.broadcast_object_list(everywhere)
        other = small(device, **options)
        set_optimizer_state_dict(*other, everywhere[0], options=StateDictOptions(full_state_dict=True))
        assert_same_states(other[1].full_state_dict(), expected)

        # Not consolidated: the first rank's part alone is refused on every rank, and nothing has been changed.
        stepped(model, optimizer)
        part = get_optimizer_state_dict(model, optimizer, options=FULL)
        before = other[1].full_state_dict()
        with pytest.raises((ValueError, RuntimeError), match="exp_avg"):
            set_optimizer_state_dict(*other, part, options=FROM_FIRST)
        assert_same_states(other[1].full_state_dict(), before)
        # A loaded checkpoint ends it.
        checkpoint.save(folder / str(len(options)), *other)
        optimizer.consolidate_state_dict()
        checkpoint.load(folder / str(len(options)), model, optimizer)
        assert is_sharded(optimizer.state_dict())

    # As a mode: every state_dict() is a collective call that gives the first rank the whole state.
    handle = optimizer.register_state_dict_pre_hook(ShardedLion.consolidate_state_dict)  # type: ignore[arg-type]
    for _ in range(2):
        stepped(model, optimizer)
        state = optimizer.state_dict()
        full = optimizer.full_state_dict(rank0_only=True)
        if rank == 0:
            assert_same_states(state, full)
        else:
            assert is_sharded(state)
            assert full == {}
    handle.remove()

    calls: list[tuple[Callable[[], None], str]] = [
        (lambda: optimizer.consolidate_state_dict(to=world_size), f"from 0 to {world_size - 1}, got {world_size}"),
        (lambda: optimizer.consolidate_state_dict(to=-1), "got -1"),
        (lambda: optimizer.consolidate_state_dict(to="0"), "got '0'"),  # type: ignore[arg-type]
        (
            lambda: optimizer.consolidate_state_dict(to=rank),
            r"different on the ranks. Rank 0: .*to=0\). Rank 1: .*to=1\)",
        ),
    ]
    for call, message in calls:
        with pytest.raises(ValueError, match=message):
            call()


def test_doors(tmp_path: Path) -> None:
    run_ranks(body_doors, 2, tmp_path, (tmp_path,))


def body_hybrid(rank: int, world_size: int) -> None:
    """Over FSDP2: one rank of a replica has it, and the state may be offloaded."""
    for dtype, options in FORMS:
        twins = Twins(Case(dtypes=(dtype,), options=options), mesh_of(2, 2))
        twins.step(0)
        optimizer = twins.optimizer
        expected = optimizer.full_state_dict()
        for to in range(2):
            optimizer.consolidate_state_dict(to=to)
            state = optimizer.state_dict()
            if rank == 2 * to:
                assert_same_states(state, expected)
            else:
                assert any(isinstance(t, BoxTensor) for entry in state["state"].values() for t in entry.values())
        differ: list[Callable[[], object]] = [  # over the ranks that shard a replica
            lambda optimizer=optimizer: optimizer.consolidate_state_dict(to=rank % 2),  # type: ignore[misc]
            lambda optimizer=optimizer: optimizer.full_state_dict(rank0_only=rank % 2 == 0),  # type: ignore[misc]
            lambda optimizer=optimizer: optimizer.statistics(by=("group", "parameter")[rank % 2]),  # type: ignore[misc]
        ]
        for call in differ:
            with pytest.raises(ValueError, match="different on the ranks"):
                call()
        optimizer.offload_state()
        assert_same_states(optimizer.full_state_dict(), expected)
        for entry in optimizer.state.values():
            for name, t in entry.items():
                entry[name] = t.clone()
        optimizer.reload_state()
        twins.step(1)
        twins.check("goes on")
        twins.check_state("goes on")


def test_hybrid(tmp_path: Path) -> None:
    run_ranks(body_hybrid, 4, tmp_path)
