"""Master weights and 8-bit momenta, saved under one strategy and loaded under another, in any form."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

from lion_dist import checkpoint
from tests.asserts import assert_same_tensors
from tests.harness import DEADLINE_S, run_ranks
from tests.scenarios.checkpoint_form_runs import Way, assert_loaded, kept
from tests.scenarios.checkpoint_forms import MOMENTA, WEIGHTS
from tests.scenarios.checkpoint_toy import FIRST, MORE, OVER_TWO_DIMENSIONS, SEED, STRATEGIES

Ways = tuple[tuple[str, str, str], ...]


def body_matrix(rank: int, world_size: int, folder: Path, saves: Ways, loads: Ways, every: bool) -> list[str]:
    """Every way in ``loads`` loads what those in ``saves``, of this call and earlier ones, left in the folder; without
    ``every`` only the second, the fourth and so on, and the next way the others."""
    alone = dist.new_group([0])
    for way in map(Way._make, saves):
        if way.strategy != "single" or rank == 0:
            run = way.start(SEED, alone if way.strategy == "single" else dist.group.WORLD).train(range(FIRST))
            name = f"{'.'.join(way)}.{world_size}"
            checkpoint.save(
                folder / name, run.wrapped, run.optimizer, schedulers=run.scheduler, process_group=run.ranks
            )
            then = kept(run)
            later = kept(run.train(range(FIRST, FIRST + MORE)))
            if rank == 0:
                torch.save((then, later), folder / f"{name}.pt")
        dist.barrier()
    table = []
    for number, way in enumerate(map(Way._make, loads)):
        if way.strategy != "single" or rank == 0:
            run = way.start(SEED + 1 + rank, alone if way.strategy == "single" else dist.group.WORLD)
            run.train(range(20, 21))  # what is there must be replaced
            paths = sorted(path for path in folder.iterdir() if path.is_dir())
            for path in paths if every else paths[1 - number % 2 :: 2]:
                *names, size = path.name.split(".")
                saved, what = Way(*names), f"{path.name} -> {'.'.join(way)}.{world_size}"
                (weights, momenta), later = torch.load(folder / f"{path.name}.pt")
                checkpoint.load(
                    path, run.wrapped, run.optimizer, schedulers=run.scheduler, cast=way.needs_cast(saved),
                    process_group=run.ranks,
                )  # fmt: skip
                assert_loaded(run, way, saved, weights, momenta, what)
                same_cut = (way.strategy, world_size) == (saved.strategy, int(size))
                if way.loses_nothing(saved, same_cut):
                    for got, expected in zip(kept(run.train(range(FIRST, FIRST + MORE))), later, strict=True):
                        assert_same_tensors(got, expected, f"{what}, {MORE} steps later")
                    what += ", and the same run from there"
                table.append(what)
        dist.barrier()
    return table


def over_world_sizes(
    saves: Mapping[int, Ways], loads: Mapping[int, Ways], tmp_path: Path, every: bool = True,
    deadline: float = DEADLINE_S,
) -> list[str]:  # fmt: skip
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    table = []
    for world_size in sorted(saves.keys() | loads.keys()):
        arguments = folder, saves.get(world_size, ()), loads.get(world_size, ()), every
        table += run_ranks(body_matrix, world_size, tmp_path, arguments, deadline=deadline)[0]
    print(*table, sep="\n")
    return table


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_pairs(every: bool, tmp_path: Path) -> None:
    """Each strategy saves and loads master weights and 8-bit momenta, and meets the others' in several forms."""
    saves = {
        2: (
            ("single", "master", "int8"), ("ddp", "bf16", "int8"), ("stage1", "master", "int8"),
            ("signs", "master", "fp32"), ("fsdp1", "master", "int8"), ("fsdp2", "fp32", "int8"),
        ),
        4: (("tp", "master", "int8"),),
    }  # fmt: skip
    loads = {
        2: (
            ("single", "bf16", "fp32"), ("ddp", "fp32", "int8"),
            ("fsdp1", "master", "int8"), ("fsdp2", "master", "fp32"),
        ),
        3: (("stage2", "master", "int8"), ("signs", "master", "int8"), ("fsdp2", "master", "int8")),
        4: (("hsdp", "master", "int8"), ("tp", "master", "int8")),
    }  # fmt: skip
    table = over_world_sizes(saves, loads, tmp_path, every)
    assert len(table) == (6 * 7 + 7 * 2 if every else 3 * 7 + 3 + 4)
    assert sum("the same run" in line for line in table) > 4


def body_torch_doors(rank: int, world_size: int, folder: Path) -> None:
    """What torch's own functions make of the state and save through Writer, checkpoint.load reads."""
    ways = [Way("stage1", "master", "int8"), Way("fsdp2", "master", "int8")]
    for way in ways:
        run = way.start(SEED, dist.group.WORLD).train(range(FIRST))
        state = {
            "model": get_model_state_dict(run.wrapped),
            "optim": get_optimizer_state_dict(run.wrapped, run.optimizer),
        }
        dcp.save(state, storage_writer=checkpoint.Writer(folder / way.strategy))
        weights, momenta = kept(run)
        for here in (*ways, Way("fsdp1", "master", "fp32"), Way("fsdp1", "fp32", "int8"), Way("fsdp2", "fp32", "int8")):
            run = here.start(SEED + 1, dist.group.WORLD).train(range(20, 21))
            checkpoint.load(folder / way.strategy, run.wrapped, run.optimizer)
            assert_loaded(run, here, way, weights, momenta, f"{way.strategy} by dcp.save -> {here.strategy}")


def test_what_torchs_functions_save(tmp_path: Path) -> None:
    run_ranks(body_torch_doors, 2, tmp_path, (tmp_path,))


@pytest.mark.exhaustive
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("world_sizes", [(2, 2), (2, 3), (3, 4)])
def test_all_pairs_by_precision(world_sizes: tuple[int, int], tmp_path: Path) -> None:
    """Every strategy, weights and momentum against every other one."""
    before, after = world_sizes
    saves, loads = (
        tuple(product((*STRATEGIES, *(OVER_TWO_DIMENSIONS if size == 4 else ())), WEIGHTS, MOMENTA))
        for size in world_sizes
    )
    table = over_world_sizes({before: saves}, {after: loads}, tmp_path, deadline=3000)
    assert len(table) == len(saves) * len(loads)
