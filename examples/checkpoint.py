"""One file that a killed run continues from.

A *checkpoint* is a dict of tensors, numbers, strings, lists and dicts, nothing that unpickling would execute:
`step` (optimizer steps done), `model`, `optimizer` and `scheduler` (state dicts, tensors in logical shapes, so that
another strategy or world size can load them), `run` (what a resumed run must have in common), and `history` (the
curve so far).
"""

import os
from pathlib import Path
from typing import Any

import torch

Checkpoint = dict[str, Any]


def checkpoint_path(folder: Path) -> Path:
    return folder / "checkpoint.pt"


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Replace the folder's checkpoint in one step: whenever this process is killed, a whole one is there."""
    path = checkpoint_path(folder)
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())  # else the rename may reach the disk before the bytes do
    os.replace(unfinished, path)
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def load_checkpoint(folder: Path, run: dict[str, Any]) -> Checkpoint:
    """Read the folder's checkpoint, on the CPU, and check that it belongs to `run`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or of a run that differs in the data, the model or the schedule.
    """
    path = checkpoint_path(folder)
    if not path.is_file():
        raise FileNotFoundError(f"nothing to resume: {path} does not exist; start without --resume, or correct --out")
    try:
        checkpoint: Checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        theirs = checkpoint["run"]
    except Exception as error:  # of many types, by what the damage hit
        raise ValueError(
            f"{path} is not a whole checkpoint of this program (reading it: {type(error).__name__}): start without "
            "--resume, or correct --out"
        ) from error
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
    return checkpoint
