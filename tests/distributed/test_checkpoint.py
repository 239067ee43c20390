"""Saved under one strategy, loaded under another: the same bits, and the same run from there."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

from lion_dist import Lion, ShardedLion, checkpoint
from tests.asserts import assert_same_tensors
from tests.harness import DEADLINE_S, run_ranks
from tests.scenarios.checkpoint_matrix import body_matrix
from tests.scenarios.checkpoint_toy import FIRST, MORE, OVER_TWO_DIMENSIONS, SEED, STRATEGIES, Run, uninterrupted


def test_all_pairs_on_two_ranks(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    table = run_ranks(body_matrix, 2, tmp_path, (folder, STRATEGIES, STRATEGIES))[0]
    print(*table, sep="\n")
    assert len(table) == len(STRATEGIES) ** 2


# Sizes and strategies such that each of either is saved and loaded, and most sizes meet. By world size.
SAVES = {1: ("signs", "fsdp1"), 2: ("single", "ddp"), 3: ("stage1", "fsdp2"), 4: ("stage2", "hsdp", "tp")}
LOADS = {1: ("stage2",), 2: ("stage1", "fsdp2"), 3: ("signs", "fsdp1"), 4: ("ddp", "hsdp", "tp")}


def over_world_sizes(
    saves: dict[int, tuple[str, ...]], loads: dict[int, tuple[str, ...]], tmp_path: Path, every: bool,
    deadline: float = DEADLINE_S,
) -> list[str]:  # fmt: skip
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    table = []
    for world_size, strategies in saves.items():
        run_ranks(body_matrix, world_size, tmp_path, (folder, strategies, ()), deadline=deadline)
    for world_size, strategies in loads.items():
        table += run_ranks(body_matrix, world_size, tmp_path, (folder, (), strategies, every), deadline=deadline)[0]
    print(*table, sep="\n")
    return table


def test_pairs_over_world_sizes(tmp_path: Path) -> None:
    """Half of the pairs, among which each checkpoint is loaded on at least three numbers of ranks."""
    assert len(over_world_sizes(SAVES, LOADS, tmp_path, every=False)) == 36


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
def test_all_pairs_over_world_sizes(tmp_path: Path) -> None:
    """29 ways to save and to load, so 841 pairs."""
    evenly = (*STRATEGIES[1:], *OVER_TWO_DIMENSIONS)
    ways = {1: STRATEGIES, 2: evenly, 3: STRATEGIES[1:], 4: evenly}
    assert len(over_world_sizes(ways, ways, tmp_path, every=True, deadline=1800)) == 29**2


def convolutions(way: str, seed: int) -> tuple[nn.Module, Lion | ShardedLion]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Conv2d(5, 4, 3))
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if way == "stage2":
        return model, ShardedLion(model.parameters())
    device = torch.device("cpu")
    wrapped = FSDP(model, use_orig_params=True, device_id=device) if way == "fsdp1" else model
    return wrapped, Lion(wrapped.parameters())


def body_channels_last(rank: int, world_size: int, folder: Path) -> None:
    """Momenta are made equal to the weights, by hand, and so must be after a load."""
    alone = [dist.new_group([r]) for r in range(world_size)][rank]
    for way in ("single", "fsdp1"):
        model, optimizer = convolutions(way, SEED)
        optimizer.init_state()
        for p, entry in optimizer.state.items():
            entry["exp_avg"].copy_(p.detach())
        if way == "fsdp1" or rank == 0:
            group = alone if way == "single" else None
            checkpoint.save(folder / way, model, optimizer, process_group=group)
        dist.barrier()
    expected = dict(convolutions("single", SEED)[0].named_parameters())
    for source in ("single", "fsdp1"):
        for way in ("single", "stage2", "fsdp1"):
            model, optimizer = convolutions(way, SEED + 1)
            group = alone if way == "single" else None
            checkpoint.load(folder / source, model, optimizer, process_group=group)
            whole: Any = FSDP.summon_full_params(model) if way == "fsdp1" else nullcontext()
            with whole:
                for name, p in model.named_parameters():
                    wanted = expected[name.replace("_fsdp_wrapped_module.", "")].detach()
                    assert torch.equal(p.detach(), wanted), f"{source} -> {way}: {name}"
            if way == "fsdp1":
                for p, entry in optimizer.state.items():
                    assert torch.equal(entry["exp_avg"], p.detach()), f"{source} -> {way}: momentum"
            else:
                state = optimizer.full_state_dict() if isinstance(optimizer, ShardedLion) else optimizer.state_dict()
                for i, wanted in enumerate(expected.values()):
                    assert torch.equal(state["state"][i]["exp_avg"], wanted.detach()), (
                        f"{source} -> {way}: momentum {i}"
                    )


def test_channels_last(tmp_path: Path) -> None:
    """Flat cuts follow the memory, and FSDP1 keeps the memory's order too."""
    run_ranks(body_channels_last, 2, tmp_path, (tmp_path,), on_cpu=True)


# torch's own doors ----------------------------------------------------------------------------------


def tutorial_state(run: Run) -> dict[str, Any]:
    """The state of user code, as in torch's tutorials."""
    return {
        "model": get_model_state_dict(run.wrapped),
        "optim": get_optimizer_state_dict(run.wrapped, run.optimizer),
    }


def untie(state: dict[str, Any]) -> dict[str, Any]:
    """lion_dist.checkpoint saves a parameter once; torch's model state has it under both names."""
    return {**state, "model": {n: t for n, t in state["model"].items() if n != "tied"}}


def body_torch_doors(rank: int, world_size: int, folder: Path) -> None:
    group = dist.group.WORLD
    then, later, _ = uninterrupted()

    def check(run: Run, what: str) -> None:
        assert_same_tensors(run.whole(), then, what)
        assert_same_tensors(run.train(range(FIRST, FIRST + MORE)).whole(), later, f"{what}, later")

    # The buffer is not what counts here: the doors load each rank's own.
    beside = dist.new_group(backend="gloo")  # torch saves asynchronously over a group that knows the CPU
    for strategy in ("signs", "stage1", "fsdp2"):
        run = Run(strategy, SEED, group).train(range(FIRST))
        state = tutorial_state(run)
        assert_same_tensors(run.whole(), then, f"{strategy}: asking for the state changes nothing")
        dcp.save(state, storage_writer=checkpoint.Writer(folder / f"{strategy}-ours"))
        dcp.save(state, checkpoint_id=folder / f"{strategy}-torch")  # torch's own storage
        flat = StateDictOptions(flatten_optimizer_state_dict=True, cpu_offload=True)
        dcp.save(
            {"optim": get_optimizer_state_dict(run.wrapped, run.optimizer, options=flat)},
            storage_writer=checkpoint.Writer(folder / f"{strategy}-flat"),
        )
        future: Any = dcp.async_save(
            tutorial_state(run), storage_writer=checkpoint.Writer(folder / f"{strategy}-async"), process_group=beside
        )
        run.train(range(50, 53))  # while it is being saved
        future.result()

    for source, target in (("signs", "fsdp2"), ("stage1", "signs"), ("fsdp2", "stage1")):
        for kind in ("ours", "torch", "async"):
            path, what = folder / f"{source}-{kind}", f"{source} -> {target}, {kind}"
            run = Run(target, SEED + 1, group).train(range(20, 21))
            state = tutorial_state(run)
            dcp.load(
                state, **({"checkpoint_id": path} if kind == "torch" else {"storage_reader": checkpoint.Reader(path)})
            )
            # Of DDP torch's set_model_state_dict does not find tied weights under their second name.
            set_model_state_dict(run.wrapped if target == "fsdp2" else run.model, state["model"])
            set_optimizer_state_dict(run.wrapped, run.optimizer, state["optim"])
            run.scheduler.load_state_dict(Run("single", 0, None).train(range(FIRST)).scheduler.state_dict())
            check(run, what)
        expected = {n: t for n, t in then.items() if n.startswith("m ")}
        flat_run = Run(target, SEED + 1, group).train(range(20, 21))
        flat_options = StateDictOptions(flatten_optimizer_state_dict=True)
        state = {"optim": get_optimizer_state_dict(flat_run.wrapped, flat_run.optimizer, options=flat_options)}
        dcp.load(state, storage_reader=checkpoint.Reader(folder / f"{source}-flat"))
        set_optimizer_state_dict(flat_run.wrapped, flat_run.optimizer, state["optim"], options=flat_options)
        momenta = {n: t for n, t in flat_run.whole().items() if n.startswith("m ")}
        assert_same_tensors(momenta, expected, f"{source} -> {target}, flat")
        # What user code saved, lion_dist.checkpoint loads, and the other way round.
        run = Run(target, SEED + 1, group).train(range(20, 21))
        checkpoint.load(folder / f"{source}-ours", run.wrapped, run.optimizer)
        assert_same_tensors(run.whole(), then, f"{source} by dcp.save, {target} by lion_dist.checkpoint")
        checkpoint.save(folder / f"{target}-again", run.wrapped, run.optimizer)
        run = Run(source, SEED + 1, group).train(range(20, 21))
        state = untie(tutorial_state(run))
        dcp.load(state, storage_reader=checkpoint.Reader(folder / f"{target}-again"))
        set_optimizer_state_dict(run.wrapped, run.optimizer, state["optim"])
        momenta = {n: t for n, t in run.whole().items() if n.startswith("m ")}
        assert_same_tensors(momenta, expected, f"{target} -> {source} by dcp.load")


def test_state_dict_functions_of_torch(tmp_path: Path) -> None:
    run_ranks(body_torch_doors, 2, tmp_path, (tmp_path,))
