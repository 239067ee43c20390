"""Runs: which checkpoints belong to which training, so that ``keep_last`` removes none of another training."""

from __future__ import annotations

import functools
import hashlib
import os
import secrets
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .files import MANIFEST
from .manifest import Manifest

RUN = "lion_dist.run"  # key in the manifest: name of the run that a checkpoint belongs to
BEFORE = "lion_dist.run.before"  # key in the manifest: names of the runs before that one
_MAX_BEFORE = 255


class Run(NamedTuple):
    """The part of a training between two loads.

    Every load begins a new run. So of two jobs that continue from one checkpoint, neither removes what the other saves.

    Attributes:
        name: a name that no other run has.
        before: names of the runs that this one continues, the first one first.
    """

    name: str
    before: tuple[str, ...] = ()

    @property
    def token(self) -> str:
        """16 hexadecimal digits for the names of unfinished folders. They come from the first run's name, so that all
        runs of a training share them, and a resumed training removes what died before."""
        return hashlib.sha256((*self.before, self.name)[0].encode()).hexdigest()[:16]

    @staticmethod
    def new(before: Sequence[str] = ()) -> Run:
        """A run that continues these; of many, the first and the last ones are remembered."""
        return Run(secrets.token_hex(8), (*before[:1], *before[1:][-_MAX_BEFORE:]))

    def as_objects(self) -> dict[str, Any]:
        """The run as values of a manifest, by key."""
        return {RUN: self.name, BEFORE: list(self.before)} if self.before else {RUN: self.name}


# The current run of an optimizer or a model in each folder.
_runs: weakref.WeakKeyDictionary[object, dict[str, Run]] = weakref.WeakKeyDictionary()


def run_of(owners: Sequence[object], path: Path) -> Run:
    """The run that a checkpoint at ``path`` will belong to.

    Args:
        owners: the optimizer and the model. The run is that of the first one that has one in this folder, and all of
            them have that run from now on.
        path: where the checkpoint will be.
    """
    folder = os.path.realpath(path.parent)
    known = [_runs[owner][folder] for owner in owners if folder in _runs.get(owner, {})]
    run = known[0] if known else Run.new()
    for owner in owners:
        _runs.setdefault(owner, {})[folder] = run
    return run


def continue_run(owners: Sequence[object], path: Path, objects: Mapping[str, Any]) -> None:
    """Begins a run that continues that of a loaded checkpoint, for later saves into the same folder.

    Args:
        owners: the optimizer and the model that were loaded.
        path: the checkpoint.
        objects: values in its manifest, by key.
    """
    name, before = objects.get(RUN), objects.get(BEFORE)
    names = [*before, name] if isinstance(before, list) else [name]
    known = [name for name in names if isinstance(name, str)]
    if known == names:
        run = Run.new(known)
        for owner in owners:
            _runs.setdefault(owner, {})[os.path.realpath(path.parent)] = run


def read_run(checkpoint: Path) -> str | None:
    """Name of the run that a checkpoint belongs to; None if it is damaged or names none."""
    try:
        return _read_run(checkpoint, (checkpoint / MANIFEST).stat().st_mtime_ns)
    except (OSError, ValueError):
        return None


@functools.lru_cache(maxsize=1024)
def _read_run(checkpoint: Path, _modified: int) -> str | None:
    """Cached, because every save asks and the manifest of many ranks is long."""
    run = Manifest.read(checkpoint).objects.get(RUN)
    return run if isinstance(run, str) else None
