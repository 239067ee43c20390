"""Finds the checkpoint that a run continues from.

lion_dist.checkpoint writes them: `step-<n>` in the run's folder, each with the weights, the momentum and the schedule,
under any strategy and number of ranks. Its *extra* holds `step` (optimizer steps done), `run` (the options that a
resumed run must have in common) and `history` (the curve so far).
"""

from pathlib import Path
from typing import Any

from lion_dist import checkpoint

# Options that runs of earlier versions did not have, with the values that stand for what these did.
ADDED = {"dtype": "fp32", "master_weights": False, "momentum": "auto"}

KEPT = 2  # number of checkpoints; something may already have been wrong when the last one was saved


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step}"


def find_checkpoint(folder: Path, run: dict[str, Any]) -> Path:
    """Returns the folder's last checkpoint, after checking that it belongs to `run`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or belongs to a run with other data, another model or another schedule.
    """
    path = checkpoint.latest(folder, default=None)
    if path is None:
        raise FileNotFoundError(f"there is nothing to resume in {folder}: start without --resume, or correct --out")
    theirs = {**ADDED, **checkpoint.read_extra(path)["run"]}
    differences = [
        f"{name} is {theirs.get(name)!r} in the checkpoint, {run.get(name)!r} now"
        for name in sorted(theirs.keys() | run.keys())
        if theirs.get(name) != run.get(name)
    ]
    if differences:
        raise ValueError(
            f"{path} belongs to another run: {'; '.join(differences)}. Repeat the options that run was started with, "
            "or give another --out without --resume"
        )
    return path


def check_unused(folder: Path) -> None:
    """Raises ValueError if the folder has checkpoints of another run, with which a new run must not be mixed."""
    if checkpoint.checkpoints(folder):
        raise ValueError(
            f"{folder} has checkpoints of an earlier run: continue it with --resume, give another --out, or remove them"
        )
