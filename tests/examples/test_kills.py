"""kill -9 at any moment: under torchrun's restarts a run ends with the bits of one that nobody disturbed."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lion_dist import checkpoint
from tests.examples.test_train import (
    LAST_LINE,
    assert_same_checkpoint,
    errors_of,
    on_proc,
    run_well,
    start,
    step_of,
    workers,
)
from tests.harness import spawn_only

RUNS, KILLS, RANKS = 4, 5, 2  # 20 kills
# A checkpoint every other step, so that about half of the time goes into saving.
OPTIONS = ("--steps", "120", "--checkpoint-every", "2", "--eval-every", "60")


def unfinished(out: Path) -> bool:
    return any(out.glob(".*"))


@spawn_only
@on_proc
@pytest.mark.exhaustive
@pytest.mark.timeout(1200)
def test_twenty_kills(tmp_path: Path) -> None:
    """Of one rank each, in turn while a checkpoint is being written and at a random moment after one."""
    moments = random.Random(0)
    whole = tmp_path / "whole"
    run_well(RANKS, whole, *OPTIONS)
    in_save = 0
    for number in range(RUNS):
        out = tmp_path / f"killed{number}"
        process = start(RANKS, out, *OPTIONS, torchrun=("--max_restarts", str(KILLS)))

        def wait_for(what: str, is_so: Callable[[], bool], process=process) -> None:  # type: ignore[no-untyped-def]
            end = time.monotonic() + 120
            while not is_so():
                assert process.poll() is None, f"the run ended before {what}"
                assert time.monotonic() < end, f"no {what} after two minutes"

        try:
            for kill in range(KILLS):
                before = step_of(out) if checkpoint.checkpoints(out) else 0
                wait_for("a new checkpoint", lambda: bool(checkpoint.checkpoints(out)) and step_of(out) > before)
                if kill % 2:
                    wait_for("a save", lambda: unfinished(out))
                    time.sleep(moments.uniform(0, 0.002))
                else:
                    time.sleep(moments.uniform(0, 0.1))
                victims = workers(process.pid)
                os.kill(victims[moments.randrange(len(victims))], signal.SIGKILL)
                in_save += unfinished(out)
            said, _ = process.communicate(timeout=120)
        finally:
            process.kill()
        assert process.returncode == 0, errors_of(out).read_text()
        assert LAST_LINE.fullmatch(said.splitlines()[-1])
        assert_same_checkpoint(out, whole)
        assert not unfinished(out)
    assert in_save >= RUNS * (KILLS // 2) // 2, "too few kills met a save to show anything about it"
    print(f"{RUNS * KILLS} kills, {in_save} of them during a save: the weights of the undisturbed run each time")
