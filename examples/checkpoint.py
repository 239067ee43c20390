"""Which checkpoint a run continues from.

lion_dist.checkpoint keeps them: `step-<n>` in the run's folder, each with the weights, the momentum and the schedule,
under any strategy and number of ranks. Beside these, as its *extra*: `step` (optimizer steps done), `run` (what a
resumed run must have in common) and `history` (the curve so far).
"""

from pathlib import Path
from typing import Any

from lion_dist import checkpoint

KEPT = 2  # checkpoints; the last may be of a moment at which something was already wrong


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step}"


def find_checkpoint(folder: Path, run: dict[str, Any]) -> Path:
    """The folder's last checkpoint, checked to be one of `run`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or of a run that differs in the data, the model or the schedule.
    """
    path = checkpoint.latest(folder, default=None)
    if path is None:
        raise FileNotFoundError(f"nothing to resume in {folder}: start without --resume, or correct --out")
    theirs = checkpoint.read_extra(path)["run"]
    differences = [
        f"{name} is {theirs.get(name)!r} in the checkpoint, {run.get(name)!r} now"
        for name in sorted(theirs.keys() | run.keys())
        if theirs.get(name) != run.get(name)
    ]
    if differences:
        raise ValueError(
            f"{path} is of another run: {'; '.join(differences)}. Repeat the options it was started with, "
            "or give another --out and no --resume"
        )
    return path


def check_unused(folder: Path) -> None:
    """Raises ValueError if another run has left checkpoints in the folder, which a new one must not be mixed with."""
    if checkpoint.checkpoints(folder):
        raise ValueError(
            f"{folder} has checkpoints of an earlier run: continue it with --resume, give another --out, or remove them"
        )
