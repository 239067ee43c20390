"""Removes the older checkpoints of a training; see [Note: Who removes what] in unfinished.py."""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path

from .files import MANIFEST
from .folders import checkpoints, stem_of
from .locks import FileLock
from .runs import Run, read_run
from .unfinished import leftovers, remove, remove_if_dead

logger = logging.getLogger("lion_dist")
_warned: set[tuple[Path, str]] = set()


def keep_last(path: Path, count: int, run: Run) -> None:
    """Removes all but the last ``count`` checkpoints of a training that are named like ``path``, and what its dead
    saves have left. A checkpoint that is being read stays until the next call.

    Args:
        path: a checkpoint that was just saved, which is never removed. Others are named like it if their names differ
            only in the number at the end.
        count: number of checkpoints to keep.
        run: the run that saved ``path``; checkpoints of this run and of the runs before it may be removed.
    """
    stem = stem_of(path.name)
    names = {run.name, *run.before}
    alike = [old for old in checkpoints(path.parent, stem=stem) if stem_of(old.name) == stem]
    mine = [old for old in alike if read_run(old) in names]
    if len(mine) < len(alike) and (path.parent, stem) not in _warned:
        _warned.add((path.parent, stem))
        others = [old.name for old in alike if old not in mine]
        logger.warning(
            "lion_dist: keep_last does not remove %d checkpoints in %s that another run saved (%s): this training has "
            "neither saved them nor continued from one of that run. Remove them by hand if they are not needed",
            len(others),
            path.parent,
            ", ".join(others[:5]),
        )
    for old in mine[:-count]:
        if old != path and not old.is_symlink():
            with contextlib.suppress(OSError):  # it is being read, or another save removes it
                remove(old, FileLock(old / MANIFEST, os.O_RDWR), run.token)
    for left in leftovers(path.parent):
        if left.token == run.token and stem_of(left.name) == stem:
            remove_if_dead(left.folder)
