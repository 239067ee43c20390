"""Several jobs save into one folder at the same time, and some are killed: every save is whole when it
returns, every other one raised, and what the dead have left is swept.

The jobs know nothing of each other. Job i of n saves ``step-<k * n + i>``, so that all names have one stem, and keeps
its own last two. Every other time all of them save ``same-<k>`` as well, which one of them gets. Weights and momenta
are filled with a number of the job and the step, so that a mixture of two saves shows.
"""

from __future__ import annotations

import os
import random
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from lion_dist import Lion, checkpoint
from lion_dist.checkpoint import Reader
from tests.harness import processes, spawn_only

KEPT = 2


def filled(value: float) -> tuple[nn.Module, Lion]:
    model = nn.Sequential(*[nn.Linear(40, 30) for _ in range(4)])
    optimizer = Lion(model.parameters())
    optimizer.init_state()
    fill(model, optimizer, value)
    return model, optimizer


def fill(model: nn.Module, optimizer: Lion, value: float) -> None:
    for p in model.parameters():
        p.data.fill_(value)
        optimizer.state[p]["exp_avg"].fill_(-value)


def value_of(job: int, k: int) -> int:
    return 1000 * (job + 1) + k


def own(folder: Path, job: int, jobs: int) -> list[Path]:
    """A job's checkpoints, the first to the last."""
    return [path for path in checkpoint.checkpoints(folder, stem="step-") if step(path) % jobs == job]


def step(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def run_job(job: int, jobs: int, steps: int, folder: Path, journal: Path) -> None:
    """Trains from the last checkpoint on, if there is one."""
    fd = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    model, optimizer = filled(0.0)
    there = own(folder, job, jobs)
    first = 0
    if there:
        first = checkpoint.load(there[-1], model, optimizer)["k"] + 1
    for k in range(first, steps):
        names = [f"step-{k * jobs + job}"]
        if k % 2 == 0:
            names.insert(0, f"same-{k}")
        for name in names:
            fill(model, optimizer, value_of(job, k))
            os.write(fd, f"begins {name}\n".encode())
            try:
                keep = KEPT if name.startswith("step") else None
                checkpoint.save(folder / name, model, optimizer, extra={"job": job, "k": k}, keep_last=keep)
            except Exception as error:
                os.write(fd, f"{type(error).__name__} {name}\n".encode())
                continue
            os.write(fd, f"returned {name}\n".encode())
            # At once, since this job's own later saves may remove it.
            try:
                whole = assert_whole(folder / name) == {"job": job, "k": k}
            except Exception:
                whole = False
            os.write(fd, f"{'whole' if whole else 'torn'} {name}\n".encode())
    os.write(fd, b"done all\n")
    os._exit(0)


def entries(journal: Path) -> list[tuple[str, str]]:
    lines = journal.read_text().splitlines() if journal.exists() else []
    return [(what, name) for what, name in (line.split() for line in lines)]


def assert_whole(path: Path) -> dict[str, Any]:
    """Whole, and of one save; its extra."""
    reader = Reader(path)
    reader.verify()
    extra = checkpoint.read_extra(path)
    expected = value_of(extra["job"], extra["k"])
    for name in reader.manifest.tensors:
        if not name.startswith("rng."):
            t = reader.fetch(name)
            assert (t == (-expected if name.endswith("exp_avg") else expected)).all(), f"{path}: {name}"
    return extra


def several_jobs(tmp_path: Path, jobs: int, steps: int, kills: int, seed: int, in_saves: int = 0) -> str:
    """``in_saves``: how many of the kills must hit a save, at least."""
    moments = random.Random(seed)
    folder, journals = tmp_path / "runs", [tmp_path / f"journal-{job}" for job in range(jobs)]
    folder.mkdir()
    arguments = [(job, jobs, steps, folder, journals[job]) for job in range(jobs)]
    running = processes(run_job, arguments)
    in_save, killed, read = 0, 0, 0
    end = time.monotonic() + 120 + 2 * steps * jobs
    try:
        while any(process.is_alive() for process in running):
            assert time.monotonic() < end
            # Meanwhile somebody reads: a whole one, or an error that says that it is gone.
            there = checkpoint.checkpoints(folder)
            if there:
                path = moments.choice(there)
                try:
                    assert_whole(path)
                    read += 1
                except FileNotFoundError:
                    pass
                except ValueError:
                    assert not path.exists()
            alive = [job for job, process in enumerate(running) if process.is_alive() and entries(journals[job])]
            if killed < kills and alive:
                job = moments.choice(alive)
                running[job].kill()
                running[job].join()
                killed += 1
                in_save += entries(journals[job])[-1][0] == "begins"
                running[job] = processes(run_job, [arguments[job]])[0]  # its successor
            time.sleep(moments.uniform(0, 0.05))
    finally:
        for process in running:
            process.kill()
            process.join()
    assert killed
    assert in_save >= in_saves
    winners = defaultdict(list)
    maybe = set()  # saves during which a job was killed
    returned = 0
    for job, journal in enumerate(journals):
        said = entries(journal)
        assert said[-1] == ("done", "all"), f"job {job} died: {said[-3:]}"
        for (what, _), before in zip(said[1:], said, strict=False):
            if what == "begins" and before[0] == "begins":
                maybe.add((job, before[1]))
        for what, name in said:
            returned += what == "returned"
            if what == "returned" and name.startswith("same"):
                winners[name].append(job)
            assert what in ("begins", "returned", "whole", "done") or (what, name[:4]) == ("FileExistsError", "same"), (
                job,
                what,
            )
        # What it kept: the last ones it saved, whatever the other jobs saved and kept. (One that was being read when it
        # was to be removed may be there too.)
        kept = own(folder, job, jobs)[-KEPT:]
        assert [step(path) // jobs for path in kept] == list(range(steps))[-KEPT:]
        for path in kept:
            assert assert_whole(path)["job"] == job
    for k in range(0, steps, 2):
        name = f"same-{k}"
        winner = assert_whole(folder / name)["job"]
        assert winners[name] == [winner] or (not winners[name] and (winner, name) in maybe), (name, winner, winners)
    # A job that was killed in its very last save or removal has no successor that saves: what it left is swept when it
    # is resumed once more.
    for job in range(jobs):
        model, optimizer = filled(0.0)
        checkpoint.load(own(folder, job, jobs)[-1], model, optimizer)
        checkpoint.save(folder / f"step-{steps * jobs + job}", model, optimizer, keep_last=KEPT)
        assert len(own(folder, job, jobs)) == KEPT
    assert not list(folder.glob(".*"))
    return (
        f"{returned} saves returned, {killed} kills, {in_save} of them during a save, {read} checkpoints read meanwhile"
    )


@spawn_only
def test_several_jobs_at_once(tmp_path: Path) -> None:
    print(several_jobs(tmp_path, jobs=3, steps=5, kills=3, seed=0))


@spawn_only
@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
def test_many_saves_of_several_jobs_at_once(tmp_path: Path) -> None:
    print(several_jobs(tmp_path, jobs=6, steps=70, kills=100, seed=1, in_saves=10))
