"""Entries of others in a sharded optimizer's state, and loads in which one rank's own code fails."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.optim.lr_scheduler import LambdaLR

from lion_dist import ShardedLion, checkpoint
from lion_dist.dtensors import is_dtensor, local
from lion_dist.fsdp import is_flat_view
from tests.asserts import assert_same_bits, assert_same_tensors
from tests.harness import device_of, run_ranks
from tests.scenarios.checkpoint_toy import FIRST, CheckpointToy, Run, groups

SEED = 3
STRATEGIES = ("single", "ddp", "fsdp1", "fsdp2")


def entries_of(run: Run) -> list[tuple[torch.Tensor, dict[str, Any]]]:
    return [(p, entry) for p, entry in run.optimizer.state.items() if isinstance(p, torch.Tensor)]


def check_sharded_lion(folder: Path) -> None:
    """Its entries take others' beside the momentum, and bring them along, also of a parameter that is frozen here."""
    run = Run("signs", SEED, dist.group.WORLD).train(range(FIRST))
    frozen = CheckpointToy(0).to(device_of(dist.get_rank(), dist.get_world_size()))
    frozen.gain.requires_grad_(False)
    optimizer = ShardedLion(groups(frozen))
    checkpoint.load(folder / "single", frozen, optimizer, schedulers=LambdaLR(optimizer, float))
    assert_same_bits(optimizer.state[frozen.gain]["slow"], frozen.gain.detach() * 3, "a frozen parameter")
    for strategy in ("single", "signs"):
        checkpoint.load(folder / strategy, run.wrapped, run.optimizer, schedulers=run.scheduler)
        assert run.optimizer.state["rounds"] == 4
        assert sorted(entry["count"] for _, entry in entries_of(run)) == list(range(7))
        for p, entry in entries_of(run):
            assert_same_bits(entry["slow"], p.detach() * 3, "ShardedLion")
            assert_same_bits(entry["wide"], p.detach().double(), "ShardedLion")
            assert entry["step"] == 2.5
        if strategy == "single":
            checkpoint.save(folder / "signs", run.wrapped, run.optimizer, schedulers=run.scheduler)
        other = Run("ddp", SEED + 1, dist.group.WORLD)
        checkpoint.load(folder / "signs", other.wrapped, other.optimizer, schedulers=other.scheduler)
        assert all(torch.equal(entry["slow"], p * 3) for p, entry in entries_of(other))


def body_entries(rank: int, world_size: int, folder: Path) -> None:
    alone = [dist.new_group([r]) for r in range(world_size)][rank]

    def make(strategy: str, seed: int) -> Run:
        return Run(strategy, seed, alone if strategy == "single" else dist.group.WORLD).train(range(FIRST))

    for strategy in STRATEGIES:
        run = make(strategy, SEED)
        for i, (p, entry) in enumerate(entries_of(run)):
            entry["slow"] = (p.detach() * 3).clone()  # sharded as the parameter is
            entry["part"] = (local(p).detach() * 5).clone()  # a plain tensor of this rank's part
            entry["wide"] = torch.zeros_like(p, dtype=torch.float64).copy_(p.detach())
            entry["count"], entry["step"] = i, torch.tensor(2.5)
        run.optimizer.state["rounds"] = 4
        if strategy != "single" or rank == 0:
            checkpoint.save(
                folder / strategy, run.wrapped, run.optimizer, schedulers=run.scheduler, process_group=run.ranks
            )
        dist.barrier()
    for strategy in STRATEGIES:
        run = make(strategy, SEED + 1)
        for source in STRATEGIES:
            what = f"{source} -> {strategy}"
            checkpoint.load(
                folder / source, run.wrapped, run.optimizer, schedulers=run.scheduler, process_group=run.ranks
            )
            assert run.optimizer.state["rounds"] == 4
            found = entries_of(run)
            assert len(found) == 7
            for p, entry in found:
                expected = {"slow": local(p).detach() * 3, "part": local(p).detach() * 5}
                expected["wide"] = local(p).detach().double()
                for key, t in expected.items():
                    assert is_dtensor(entry[key]) == is_dtensor(p)
                    assert_same_bits(local(entry[key]), t, f"{what}: {key}")
                assert entry["step"] == 2.5
            assert sorted(entry["count"] for _, entry in found) == list(range(7))
            del run.optimizer.state["rounds"]
        # A parameter that is frozen before the first step, and whose momentum is loaded all the same.
        fresh = Run(strategy, SEED + 1, run.ranks)
        for name, p in fresh.wrapped.named_parameters():
            p.requires_grad_(p.requires_grad and not name.endswith(("gain", "short")))
        checkpoint.load(
            folder / "fsdp1", fresh.wrapped, fresh.optimizer, schedulers=fresh.scheduler, process_group=run.ranks
        )
        assert len(entries_of(fresh)) == 7
        checkpoint.load(folder / "ddp", run.wrapped, run.optimizer, schedulers=run.scheduler, process_group=run.ranks)
        for loaded in (run, fresh):  # torch's door, by which they are compared, takes entries of one dtype alone
            del loaded.optimizer.state["rounds"]
            for _, entry in entries_of(loaded):
                for key in ("wide", "slow", "part", "count", "step"):
                    del entry[key]
        assert_same_tensors(fresh.whole(), run.whole(), f"{strategy}: with frozen parameters")
        if strategy == "ddp":
            check_sharded_lion(folder)
        # What cannot be saved, on one rank alone.
        p, entry = next(iter(entries_of(run)))
        if rank == 1 or strategy == "single":
            entry["odd"] = torch.zeros(7) if is_dtensor(p) or is_flat_view(p) else torch.zeros(99, 1000)
        with pytest.raises(
            TypeError, match=r"optim\.state\.\w+\.odd is a Tensor of shape .* which a checkpoint cannot"
        ):
            checkpoint.save(folder / "never", run.wrapped, run.optimizer, process_group=run.ranks)
        entry.pop("odd", None)
        if strategy.startswith("fsdp"):  # a counter, beside a part of one element on one rank and of none on the other
            for name, p in run.wrapped.named_parameters():
                if name.endswith("one"):
                    run.optimizer.state[p]["seen"] = torch.ones(1)
            with pytest.raises(
                ValueError, match=r"block\.one\.seen is a part of a sharded tensor on rank ., by its shape"
            ):
                checkpoint.save(folder / "never", run.wrapped, run.optimizer, process_group=run.ranks)
        dist.barrier()
        assert not (folder / "never").exists()


def test_entries_of_others_are_sharded_as_their_parameters(tmp_path: Path) -> None:
    run_ranks(body_entries, 2, tmp_path, (tmp_path,))


def check_refused(run: Run, path: Path, message: str, what: str) -> None:
    before, hypers, schedule = run.whole(), run.hyper_parameters(), run.scheduler.state_dict()
    generator = torch.get_rng_state()
    with pytest.raises((ValueError, RuntimeError), match=message):  # on both ranks
        checkpoint.load(path, run.wrapped, run.optimizer, schedulers=run.scheduler)
    assert_same_tensors(run.whole(), before, what)
    assert run.hyper_parameters() == hypers
    assert run.scheduler.state_dict() == schedule
    assert torch.equal(torch.get_rng_state(), generator)


def fail(*_: Any) -> None:
    raise ValueError("this rank's code fails")


def body_one_fails(rank: int, world_size: int, folder: Path) -> None:
    path = folder / "good"
    for strategy in ("signs", "fsdp1", "fsdp2"):
        run = Run(strategy, SEED, dist.group.WORLD).train(range(FIRST))
        if strategy == "signs":
            checkpoint.save(path, run.wrapped, run.optimizer, schedulers=run.scheduler)
        run = Run(strategy, SEED + 1, dist.group.WORLD).train(range(30, 32))
        for kind in ("pre", "post"):
            handle = None
            if rank == 1:
                handle = getattr(run.optimizer, f"register_load_state_dict_{kind}_hook")(fail)
            check_refused(run, path, "this rank's code fails", f"{strategy}: a {kind} hook")
            if handle is not None:
                handle.remove()
        with patch.object(LambdaLR, "load_state_dict", fail) if rank == 1 else nullcontext():
            message = "scheduler 0, a LambdaLR, does not take what was saved"
            check_refused(run, path, message, f"{strategy}: a scheduler")
        run.train(range(32, 33))
        checkpoint.load(path, run.wrapped, run.optimizer, schedulers=run.scheduler)
        expected = Run("single", SEED, None).train(range(FIRST)).whole()
        assert_same_tensors(run.whole(), expected, f"{strategy}: the good one")


def test_one_ranks_code_that_fails_changes_nothing_on_any(tmp_path: Path) -> None:
    run_ranks(body_one_fails, 2, tmp_path, (tmp_path,))
