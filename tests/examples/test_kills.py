"""kill -9 at any moment: under torchrun's restarts a run ends with the bits of one that nobody disturbed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from lion_dist import checkpoint
from tests.examples.runs import (
    LAST_LINE,
    assert_same_checkpoint,
    await_checkpoint,
    errors_of,
    on_proc,
    run_well,
    start,
    step_of,
    workers,
)
from tests.harness import DEADLINE_S, spawn_only

RUNS, KILLS, RANKS = 4, 5, 2  # 20 kills
FORMS = {"float32": (), "master weights": ("--dtype", "bf16", "--master-weights", "--momentum", "int8")}
# A checkpoint every other step, so that about half of the time goes into saving.
OPTIONS = ("--steps", "120", "--checkpoint-every", "2", "--eval-every", "60")


def unfinished(out: Path) -> bool:
    return any(out.glob(".*"))


def await_save(process: subprocess.Popen[str], out: Path) -> None:
    end = time.monotonic() + DEADLINE_S
    while not unfinished(out):
        assert process.poll() is None, errors_of(out).read_text()
        assert time.monotonic() < end


def step_done(out: Path) -> int:
    return step_of(out) if checkpoint.checkpoints(out) else 0


def run_killed(out: Path, moments: random.Random, form: tuple[str, ...]) -> int:
    """A run of which KILLS ranks are killed, one after another, and which ends; how many kills met a save."""
    in_save = 0
    process = start(RANKS, out, *OPTIONS, *form, torchrun=("--max_restarts", str(KILLS)))

    try:
        for kill in range(KILLS):
            before = step_done(out)
            await_checkpoint(lambda: process.poll() is None, out, after=before)
            if kill % 2:
                await_save(process, out)
                time.sleep(moments.uniform(0, 0.002))
            else:
                time.sleep(moments.uniform(0, 0.1))
            os.kill(moments.choice(workers(process.pid)), signal.SIGKILL)
            in_save += unfinished(out)
        said, _ = process.communicate(timeout=DEADLINE_S)
    finally:
        process.kill()
    assert process.returncode == 0, errors_of(out).read_text()
    assert LAST_LINE.fullmatch(said.splitlines()[-1])
    return in_save


@spawn_only
@on_proc
@pytest.mark.exhaustive
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("form", FORMS.values(), ids=list(FORMS))
def test_twenty_kills(form: tuple[str, ...], tmp_path: Path) -> None:
    """One rank is killed each time, in turn while a checkpoint is being written and at a random moment after one."""
    moments = random.Random(0)
    whole = tmp_path / "whole"
    run_well(RANKS, whole, *OPTIONS, *form)
    in_save = 0
    for number in range(RUNS):
        out = tmp_path / f"killed{number}"
        in_save += run_killed(out, moments, form)
        assert_same_checkpoint(out, whole)
        assert not unfinished(out)
    assert in_save >= RUNS, "too few kills met a save to show anything about it"
    print(f"{RUNS * KILLS} kills, {in_save} of them during a save: the weights of the undisturbed run each time")
