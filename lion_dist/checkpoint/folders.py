"""Checkpoints as folders beside each other: their names, and how to find them."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TypeVar, overload

from .files import MANIFEST

Key = str | os.PathLike[str]  # path of a folder, as callers give it
T = TypeVar("T")


def local_path(key: Key) -> Path:
    """The absolute path of a folder.

    Raises:
        ValueError: ``key`` is a URL.
    """
    if "://" in os.fspath(key):
        raise ValueError(
            f"{os.fspath(key)} is not a folder: checkpoints are saved to file systems, mounted on every rank"
        )
    return Path(os.path.abspath(key))


def number_of(name: str) -> int | None:
    """The number at the end of a checkpoint's name, such as 100 for step-100."""
    match = re.search(r"([0-9]+)$", name)
    return int(match[1]) if match else None


def stem_of(name: str) -> str:
    """The part of a checkpoint's name before the number at its end, such as "step-" for step-100."""
    return re.sub(r"[0-9]+$", "", name)


def checkpoints(folder: Key, *, stem: str | None = None) -> list[Path]:
    """Lists the checkpoints in a folder, sorted by the number at the end of their names.

    Args:
        folder: the folder that holds the checkpoints. It need not exist.
        stem: the part of the name before the number, with or without its separator: "step" and "step-" both find
            step-100. A checkpoint whose whole name is the stem, such as ``best``, is found too, and comes first.
            None: every checkpoint whose name ends in a number.

    Returns:
        The checkpoints' paths, the smallest number first.
    """
    if not Path(folder).is_dir():
        return []
    found = []
    for path in Path(folder).iterdir():
        number = number_of(path.name)
        if stem is None:
            wanted = number is not None
        else:
            wanted = path.name == stem or stem_of(path.name) == stem or stem_of(path.name).rstrip("-_.") == stem
        if wanted and (path / MANIFEST).is_file() and not path.name.startswith("."):
            found.append((-1 if number is None else number, path))
    return [path for _, path in sorted(found)]


class _Raise:
    """Type of the default value of `latest`."""


_RAISE = _Raise()


@overload
def latest(folder: Key, *, stem: str | None = None) -> Path: ...
@overload
def latest(folder: Key, *, stem: str | None = None, default: T) -> Path | T: ...
def latest(folder: Key, *, stem: str | None = None, default: T | _Raise = _RAISE) -> Path | T:
    """Finds the checkpoint with the largest number at the end of its name.

    Args:
        folder: the folder that holds the checkpoints. It need not exist.
        stem: the part of the name before the number, as in `checkpoints`: ``latest("runs", stem="best")`` is
            ``runs/best-20``, or ``runs/best`` if none has a number. None: any name that ends in a number.
        default: the value to return if there is no such checkpoint.

    Returns:
        The checkpoint's path, or ``default``.

    Raises:
        FileNotFoundError: there is no such checkpoint, and no default was given.
    """
    found = checkpoints(folder, stem=stem)
    if found:
        return found[-1]
    if not isinstance(default, _Raise):
        return default
    others = _describe_unnumbered(Path(folder)) if stem is None else ""
    which = "no checkpoint whose name ends in a number" if others else "no checkpoint"
    of = "" if stem is None else f" of the stem {stem!r}"
    raise FileNotFoundError(f"there is {which}{of} in {os.fspath(folder)}{others}")


def _describe_unnumbered(folder: Path) -> str:
    """Names the checkpoints that have no number, for an error's message; "" if there are none."""
    names = sorted(path.parent.name for path in folder.glob(f"*/{MANIFEST}"))
    return f", but {', '.join(map(repr, names[:5]))}: give its path, or stem={names[0]!r}" if names else ""
