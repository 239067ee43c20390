"""Checkpoints of the toy, saved under some strategies and loaded under others."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from lion_dist import checkpoint
from tests.asserts import assert_same_tensors
from tests.scenarios.checkpoint_toy import FIRST, MORE, SEED, Run, uninterrupted


def body_matrix(
    rank: int, world_size: int, folder: Path, saves: tuple[str, ...], loads: tuple[str, ...], every: bool = True
) -> list[str]:
    """Every strategy in ``loads`` loads what those in ``saves`` (and earlier calls) left in the folder; without
    ``every`` only the first, the third and so on, and the next strategy the others."""
    alone = dist.new_group([0])
    then, later, hyper_parameters = uninterrupted()
    for strategy in saves:
        if strategy != "single" or rank == 0:
            run = Run(strategy, SEED, alone if strategy == "single" else dist.group.WORLD).train(range(FIRST))
            run.evaluate()
            torch.manual_seed(rank)
            checkpoint.save(
                folder / f"{strategy}{world_size}", run.wrapped, run.optimizer, schedulers=run.scheduler,
                extra={"step": FIRST, "pair": (1, 2.5)}, process_group=run.ranks,
            )  # fmt: skip
        dist.barrier()
    table = []
    for number, strategy in enumerate(loads):
        if strategy != "single" or rank == 0:
            run = Run(strategy, SEED + 1 + rank, alone if strategy == "single" else dist.group.WORLD)
            run.train(range(20, 21))  # what is there must be replaced
            paths = sorted(folder.iterdir())
            for path in paths if every else paths[(number + world_size) % 2 :: 2]:
                what = f"{path.name} -> {strategy}{world_size}"
                run.evaluate()
                extra = checkpoint.load(
                    path, run.wrapped, run.optimizer, schedulers=run.scheduler, process_group=run.ranks
                )
                assert extra == {"step": FIRST, "pair": (1, 2.5)}
                assert_same_tensors(run.whole(), then, f"{what}, loaded")
                run.train(range(FIRST, FIRST + MORE))
                assert_same_tensors(run.whole(), later, f"{what}, {MORE} steps later")
                assert run.hyper_parameters() == hyper_parameters, what
                table.append(f"{what}: same bits")
        dist.barrier()
    return table
