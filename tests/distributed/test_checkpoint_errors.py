"""Refusals reach every rank and change nothing; and saves beside the training."""

from __future__ import annotations

import os
import random
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lion_dist import Lion, ShardedLion, checkpoint
from lion_dist.checkpoint import folders, saving, writer
from lion_dist.checkpoint.files import write_block
from tests.asserts import assert_same_tensors
from tests.harness import device_of, run_ranks
from tests.scenarios.checkpoint_toy import FIRST, MORE, SEED, CheckpointToy, Run, groups, uninterrupted
from tests.scenarios.tampering import ATTACKS, flip, manifest_edit, rewrite

# Of those attacks, a few that every rank must hear of; the rest are tried in one process.
ON_RANKS = {
    "flipped last byte": "is damaged", "truncated": "bytes, not", "no data": "no data-00000", "link": "cannot be",
    "pickled manifest": "sha256", "absolute path": "not the name", "no digest": "no manifest.sha256",
}  # fmt: skip


def drop_half(raw: dict[str, Any]) -> None:
    """Drops half of a tensor, as if one rank alone had saved."""
    held = raw["tensors"]["optim.state.embedding.exp_avg"]
    held["chunks"] = held["chunks"][: len(held["chunks"]) // 2]


def body_refused(rank: int, world_size: int, folder: Path) -> None:
    os.environ["LION_DIST_TEST_BOMB"] = str(folder / "exploded")
    good = folder / "good"
    run = Run("signs", SEED, dist.group.WORLD).train(range(FIRST))
    checkpoint.save(good, run.wrapped, run.optimizer, schedulers=run.scheduler)
    run.train(range(30, 32))
    before, hyper_parameters, lr = run.whole(), run.hyper_parameters(), run.scheduler.state_dict()

    def refused(message: str, what: str, here: str = "", **changed: Any) -> None:
        given = {"schedulers": run.scheduler, "path": folder / "bad", "model": run.wrapped, "optimizer": run.optimizer}
        given.update(changed)
        with pytest.raises((ValueError, OSError, RuntimeError), match=here or message):
            checkpoint.load(given.pop("path"), given.pop("model"), given.pop("optimizer"), **given)
        assert_same_tensors(run.whole(), before, f"after {what}")
        assert run.hyper_parameters() == hyper_parameters
        assert run.scheduler.state_dict() == lr

    attacks = {name: (ATTACKS[name][0], message) for name, message in ON_RANKS.items()}
    attacks["half of a tensor"] = (manifest_edit(drop_half), "is not whole")
    # Read by one rank alone: both must hear of it.
    attacks["last byte of the second file"] = (lambda path: flip(path / "data-00001.bin", -1), "is damaged")
    for name, (attack, message) in attacks.items():
        if rank == 0:
            shutil.rmtree(folder / "bad", ignore_errors=True)
            shutil.copytree(good, folder / "bad")
            attack(folder / "bad")
        dist.barrier()
        refused(message, name)

    other = CheckpointToy(0)
    other.block.one = nn.Parameter(torch.zeros(2))
    refused("has shape", "a model of another shape", model=other, optimizer=Lion(groups(other)), path=good)
    other = CheckpointToy(0)
    other.more = nn.Parameter(torch.zeros(2))
    refused(r"has 1 tensors that the checkpoint has not: model\.more", "more", model=other, optimizer=None, path=good)
    other = CheckpointToy(0)
    del other.block.one
    refused(
        r"has 1 tensors that the model.* has not: model\.block\.one", "less", model=other, optimizer=None, path=good
    )
    other = CheckpointToy(0).double()
    refused("cast=True", "a model of another dtype", model=other, optimizer=None, path=good)
    other = CheckpointToy(0)
    all_in_one = Lion(other.parameters())
    refused("is not a group of the checkpoint", "other groups", model=other, optimizer=all_in_one, path=good)
    other = CheckpointToy(0)
    other.block.one.requires_grad_(False)
    frozen = Lion(groups(other))  # loads a momentum that was trained, though it is frozen here
    checkpoint.load(good, other, frozen, schedulers=torch.optim.lr_scheduler.LambdaLR(frozen, lambda step: 1.0))
    assert frozen.state[other.get_parameter("block.one")]["exp_avg"].any()
    del other.block._parameters["one"]
    refused(r"model\.block\.one", "a parameter less", model=other, optimizer=Lion(groups(other)), path=good)
    other = CheckpointToy(0)
    fewer = Lion([{**group, "params": group["params"][:1]} for group in groups(other)])
    refused(r"embedding|gain|block|low", "an optimizer of fewer", model=other, optimizer=fewer, path=good)
    refused("1 schedulers, and 0 were given", "no scheduler", schedulers=(), path=good)
    refused("1 schedulers, and 2 were given", "two schedulers", schedulers=[run.scheduler] * 2, path=good)
    refused("no manifest", "no checkpoint", path=folder / "absent")
    # On one rank alone.
    here = "no manifest" if rank == 1 else "rank 1 failed|different on the ranks"
    refused("", "one rank's own path", here=here, path=folder / "absent" if rank == 1 else good)
    two = folder / "two"
    if rank == 0:
        shutil.copytree(good, two)
        rewrite(two, lambda raw: raw["objects"].update(extra=7))
    dist.barrier()
    refused("different on the ranks", "two checkpoints", path=two if rank == 1 else good)

    with pytest.raises((TypeError, RuntimeError), match="cannot hold"):
        checkpoint.save(folder / "x", run.wrapped, run.optimizer, extra=object() if rank == 0 else None)
    optimizer = run.optimizer if rank == 0 else torch.optim.SGD(run.model.parameters(), lr=1.0)
    with pytest.raises((TypeError, RuntimeError), match="expected lion_dist's Lion or ShardedLion, got SGD"):
        checkpoint.save(folder / "x", run.model, optimizer, process_group=dist.group.WORLD)
    # A ShardedLion on one rank of its group alone.
    refused("of rank 0 is that of ranks .0, 1., but ranks .1. have not", "an optimizer on rank 0 alone",
            optimizer=run.optimizer if rank == 0 else None, path=good)  # fmt: skip
    with pytest.raises(ValueError, match=r"of rank 1 is that of ranks .0, 1., but ranks .0. have not"):
        checkpoint.save(folder / "x", run.wrapped, run.optimizer if rank == 1 else None)
    with pytest.raises(FileExistsError, match="good exists"):
        checkpoint.save(good, run.wrapped, run.optimizer)
    with pytest.raises(ValueError, match="not in the model"):
        checkpoint.save(folder / "x", CheckpointToy(0), run.optimizer)
    dist.barrier()
    assert {p.name for p in folder.iterdir() if not p.name.startswith("rank")} == {"good", "bad", "two", "real"}

    # The good one still loads; with casts where they are asked for.
    checkpoint.load(good, run.wrapped, run.optimizer, schedulers=run.scheduler)
    then, later, _ = uninterrupted()
    assert_same_tensors(run.whole(), then, "the good one")
    run.train(range(FIRST, FIRST + MORE))
    assert_same_tensors(run.whole(), later, "the good one, later")
    narrow = CheckpointToy(0).to(device_of(rank, world_size))
    optimizer = ShardedLion(groups(narrow), momentum_dtype=torch.bfloat16)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, float)
    checkpoint.load(good, narrow, optimizer, schedulers=scheduler, cast=True)
    for i, entry in optimizer.full_state_dict()["state"].items():
        assert entry["exp_avg"].dtype == torch.bfloat16
        assert entry["exp_avg"].any(), i
    assert optimizer.param_groups[0]["momentum_dtype"] == torch.bfloat16


def test_refused_on_every_rank(tmp_path: Path) -> None:
    run_ranks(body_refused, 2, tmp_path, (tmp_path,))


# Beside the training --------------------------------------------------------------------------------


class Gate:
    """Holds a save back at its first write."""

    def __init__(self, write: Callable[..., None]) -> None:
        self.write, self.open = write, threading.Event()

    def __call__(self, *args: Any) -> None:
        self.open.wait(60)
        self.write(*args)


def blocks_written_by(function: Callable[..., None]) -> None:
    """Makes saves write their blocks with another function from now on."""
    vars(writer)["write_block"] = function


def body_async(rank: int, world_size: int, folder: Path) -> None:
    then, later, _ = uninterrupted()
    for strategy in ("signs", "fsdp1", "ddp"):
        run = Run(strategy, SEED, dist.group.WORLD).train(range(FIRST))
        gate = Gate(write_block)
        blocks_written_by(gate)
        extra = {"places": [1]}
        pending = checkpoint.async_save(
            folder / f"{strategy}-1", run.wrapped, run.optimizer, schedulers=run.scheduler, extra=extra
        )
        extra["places"].append(2)  # what was saved is what was then
        run.train(range(FIRST, FIRST + MORE))  # with the training's own collectives
        assert_same_tensors(run.whole(), later, f"{strategy}, beside a save")
        assert not pending.done()
        assert pending.progress()[0] == 0 < pending.progress()[1]
        with pytest.raises(TimeoutError):
            pending.result(0.01)
        gate.open.set()
        # One at a time: this one waits for the other.
        second = checkpoint.async_save(folder / f"{strategy}-2", run.wrapped, run.optimizer, schedulers=run.scheduler)
        assert pending.done()
        second.result()
        blocks_written_by(gate.write)
        assert second.done()
        assert second.progress()[0] == second.progress()[1] > 0
        for name, expected in (("1", then), ("2", later)):
            extra = checkpoint.load(folder / f"{strategy}-{name}", run.wrapped, run.optimizer, schedulers=run.scheduler)
            assert extra == ({"places": [1]} if name == "1" else None)
            assert_same_tensors(run.whole(), expected, f"{strategy}-{name}")

    # An error of one rank's is raised on all: by result(), or by the next save if nobody asked.
    write = write_block

    def fail(*args: Any) -> None:
        raise OSError("the disk is full")

    for asked in (True, False):
        blocks_written_by(fail if rank == 1 else write)
        pending = checkpoint.async_save(folder / "failed-1", run.wrapped, run.optimizer)
        pending._thread.join()
        blocks_written_by(write)
        if asked:
            with pytest.raises(OSError, match="the disk is full"):
                pending.result()
        else:
            with pytest.raises(OSError, match="the disk is full"):
                checkpoint.save(folder / "after-1", run.wrapped, run.optimizer)
            assert not (folder / "after-1").exists()
        dist.barrier()
        assert not any("failed" in p.name for p in folder.iterdir())
    buffer = saving._buffer

    def no_memory(nbytes: int) -> torch.Tensor:
        raise MemoryError("no room for a copy")

    saving._buffer = no_memory if rank == 1 else buffer
    with pytest.raises(RuntimeError, match=r"no room for a copy \(on ranks \[1\]\)"):  # on both
        checkpoint.async_save(folder / "failed-1", run.wrapped, run.optimizer)
    saving._buffer = buffer
    dist.barrier()
    assert not any("failed" in p.name for p in folder.iterdir())
    checkpoint.save(folder / "after-1", run.wrapped, run.optimizer, keep_last=1)
    dist.barrier()
    assert folders.checkpoints(folder) != []


def test_saves_beside_the_training(tmp_path: Path) -> None:
    run_ranks(body_async, 2, tmp_path, (tmp_path,))


def body_generators(rank: int, world_size: int, folder: Path, saves: bool) -> list[float]:
    """Random numbers that follow a save, or a load."""
    run = Run("signs", SEED, dist.group.WORLD)
    torch.manual_seed(100 + rank if saves else 0)
    random.seed(200 + rank if saves else 0)
    (checkpoint.save if saves else checkpoint.load)(folder / "c", run.wrapped, run.optimizer, schedulers=run.scheduler)
    return [torch.rand(()).item(), random.random()]


def test_random_generators_resume(tmp_path: Path) -> None:
    saved = run_ranks(body_generators, 2, tmp_path, (tmp_path, True))
    assert len({tuple(numbers) for numbers in saved}) == 2  # a key a rank
    assert run_ranks(body_generators, 2, tmp_path, (tmp_path, False)) == saved
    # With other ranks they are left as they are.
    torch.manual_seed(0)
    random.seed(0)
    left = [torch.rand(()).item(), random.random()]
    assert run_ranks(body_generators, 3, tmp_path, (tmp_path, False)) == [left] * 3
