"""Checkpoints as folders beside each other: made under another name, committed by one rename, swept.

runs/step-100                          a checkpoint: it is whole, since the rename came last
runs/.step-200.3f2a.unfinished         being written, or what a crash left; swept by the next save
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import shutil
from pathlib import Path

from .manifest import NAME

Key = str | os.PathLike[str]  # a folder, as callers name it

logger = logging.getLogger("lion_dist")

_UNFINISHED = re.compile(r"\.(.+)\.[0-9a-f]{8}\.unfinished")


def local_path(key: Key) -> Path:
    """The folder.

    Raises:
        ValueError: it is an address.
    """
    if "://" in os.fspath(key):
        raise ValueError(f"{os.fspath(key)} is no folder: checkpoints are saved to file systems, mounted on every rank")
    return Path(os.path.abspath(key))


def new_unfinished(path: Path) -> Path:
    """Makes the folder that is to become ``path``, and sweeps what earlier saves left beside it.

    Raises:
        FileExistsError: there is something at ``path``. A checkpoint is never overwritten: while its files were
            replaced, it would be neither the old one nor the new.
    """
    if path.exists() or path.is_symlink():
        raise FileExistsError(f"{path} exists: save under another name (such as {path.name}-2), or remove it first")
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.iterdir():
        found = _UNFINISHED.fullmatch(left.name)
        if found and stem_of(found[1]) == stem_of(path.name):  # others' may be being written
            shutil.rmtree(left, ignore_errors=True)
    folder = path.parent / f".{path.name}.{secrets.token_hex(4)}.unfinished"
    folder.mkdir()
    return folder


def write_durably(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """So that names in it outlive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def commit(unfinished: Path, path: Path) -> None:
    """From here on the checkpoint exists, whole."""
    sync_folder(unfinished)
    if path.exists():  # rename would replace an empty folder
        raise FileExistsError(f"{path} has appeared while it was being saved")
    unfinished.rename(path)
    sync_folder(path.parent)


def number_of(name: str) -> int | None:
    """The number at the end of a checkpoint's name, such as 100 of step-100."""
    found = re.search(r"([0-9]+)$", name)
    return int(found[1]) if found else None


def stem_of(name: str) -> str:
    """What stands before the number, which checkpoints of one run have in common."""
    return re.sub(r"[0-9]+$", "", name)


def checkpoints(folder: str | os.PathLike[str]) -> list[Path]:
    """The checkpoints in a folder whose names end in a number, the smallest first."""
    if not Path(folder).is_dir():
        return []
    found = []
    for path in Path(folder).iterdir():
        number = number_of(path.name)
        if number is not None and (path / NAME).is_file() and not path.name.startswith("."):
            found.append((number, path))
    return [path for _, path in sorted(found)]


def latest(folder: str | os.PathLike[str]) -> Path:
    """The checkpoint in a folder whose name ends in the largest number.

    Raises:
        FileNotFoundError: there is none.
    """
    found = checkpoints(folder)
    if not found:
        raise FileNotFoundError(f"there is no checkpoint in {os.fspath(folder)}")
    return found[-1]


def keep_last(path: Path, count: int) -> None:
    """Removes the checkpoints beside ``path`` whose names differ from it in the number alone, but the last ``count``,
    and never ``path`` itself."""
    of_this_run = [old for old in checkpoints(path.parent) if stem_of(old.name) == stem_of(path.name)]
    for old in of_this_run[:-count]:
        if old == path:
            continue
        doomed = old.parent / f".{old.name}.{secrets.token_hex(4)}.unfinished"  # a half removed one is none
        with contextlib.suppress(OSError):
            old.rename(doomed)
            shutil.rmtree(doomed)
