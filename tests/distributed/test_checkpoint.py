"""Saved under one strategy, loaded under another: the same bits, and the same run from there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lion_dist import checkpoint
from tests.distributed.checkpoint_toy import FIRST, MORE, STRATEGIES, Run, assert_same
from tests.harness import run_ranks

SEED = 3


def uninterrupted() -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]:
    """Whole states of one process with Lion after FIRST and after FIRST + MORE steps, and its last groups."""
    run = Run("single", SEED, None).train(range(FIRST))
    then = run.whole()
    run.train(range(FIRST, FIRST + MORE))
    return then, run.whole(), run.hyper_parameters()


def ranks_of(strategy: str) -> dist.ProcessGroup | None:
    """None where this rank takes no part."""
    return dist.group.WORLD


def body_matrix(rank: int, world_size: int, folder: Path, saves: tuple[str, ...], loads: tuple[str, ...]) -> list[str]:
    """Every strategy in ``loads`` loads what those in ``saves`` (and earlier calls) left in the folder."""
    alone = dist.new_group([0])
    then, later, hyper_parameters = uninterrupted()
    for strategy in saves:
        if strategy != "single" or rank == 0:
            run = Run(strategy, SEED, alone if strategy == "single" else dist.group.WORLD).train(range(FIRST))
            torch.manual_seed(rank)
            checkpoint.save(
                folder / f"{strategy}{world_size}", run.wrapped, run.optimizer, schedulers=run.scheduler,
                extra={"step": FIRST, "pair": (1, 2.5)}, process_group=run.ranks,
            )  # fmt: skip
        dist.barrier()
    table = []
    for strategy in loads:
        if strategy != "single" or rank == 0:
            run = Run(strategy, SEED + 1 + rank, alone if strategy == "single" else dist.group.WORLD)
            run.train(range(20, 22))  # what is there must be replaced
            for path in sorted(folder.iterdir()):
                what = f"{path.name} -> {strategy}{world_size}"
                extra = checkpoint.load(
                    path, run.wrapped, run.optimizer, schedulers=run.scheduler, process_group=run.ranks
                )
                assert extra == {"step": FIRST, "pair": (1, 2.5)}
                assert_same(run.whole(), then, f"{what}, loaded")
                run.train(range(FIRST, FIRST + MORE))
                assert_same(run.whole(), later, f"{what}, {MORE} steps later")
                assert run.hyper_parameters() == hyper_parameters, what
                table.append(f"{what}: same bits")
        dist.barrier()
    return table


def test_all_pairs_on_two_ranks(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    table = run_ranks(body_matrix, 2, tmp_path, (folder, STRATEGIES, STRATEGIES))[0]
    print(*table, sep="\n")
    assert len(table) == len(STRATEGIES) ** 2
