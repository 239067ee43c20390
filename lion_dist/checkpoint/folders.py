"""Checkpoints as folders beside each other: made under another name, committed by one rename, swept.

    runs/step-100                               a checkpoint: it is whole, since the rename came last
    runs/.step-200.<run>-<random>.unfinished    being written or being removed, or what a crash left

[Note: Who removes what]
Jobs that know nothing of each other may save into one folder, even to one path. So nothing is removed unless it is
known to be dead:

- Whoever writes or removes an unfinished folder holds an exclusive lock on the manifest.json in it, which is made
  first. The operating system ends the lock with the process. A folder whose lock can be taken is dead.
- A save removes dead folders of its own final name. With ``keep_last`` it also removes older checkpoints of its stem
  and of its own run or the runs before that (see `Run`), and dead folders of these runs and stem, whatever their
  numbers.
- A folder is renamed before anything in it is removed. So whoever lost it finds it gone as a whole, be it because it
  had no lock yet or because locks do not reach over these machines, and can never commit a part of it.
- Where the file system has no locks, a folder is dead in which nothing has changed for a day.
- Readers hold a shared lock on the manifest.json of the checkpoint, and ``keep_last`` leaves to the next save what
  somebody reads.

What a crash leaves: in a save an unfinished folder of the name that was being saved; in a removal one of the name that
was being removed; after the rename of a save nothing. A training that resumes saves under the same names again, or has
``keep_last``: either sweeps them.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import re
import secrets
import shutil
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, overload

from .manifest import NAME, Manifest

try:
    import fcntl
except ImportError:  # not on this system: as on a file system without locks
    fcntl = None  # type: ignore[assignment]

Key = str | os.PathLike[str]  # a folder, as callers name it
T = TypeVar("T")

logger = logging.getLogger("lion_dist")

RUN = "lion_dist.run"  # the manifest's key of the run that a checkpoint belongs to
BEFORE = "lion_dist.run.before"  # and of the runs before that
DEAD_AFTER_S = 24 * 3600.0  # without a change, where there are no locks
_UNFINISHED = re.compile(r"\.(?P<name>.+)\.(?:(?P<run>[0-9a-f]{16})-)?[0-9a-f]{8}\.unfinished", re.DOTALL)


def local_path(key: Key) -> Path:
    """The folder.

    Raises:
        ValueError: it is an address.
    """
    if "://" in os.fspath(key):
        raise ValueError(f"{os.fspath(key)} is no folder: checkpoints are saved to file systems, mounted on every rank")
    return Path(os.path.abspath(key))


# Locks ----------------------------------------------------------------------------------------------


class Lock:
    """The operating system's lock on a file, which lasts until `release` or the end of the process.

    It holds between processes, between two saves of one process, and over NFS if the file is open for writing.

    Args:
        path: the file.
        flags: of ``os.open``.
        shared: whether others may share it.

    Attributes:
        fd: the open file.
        supported: False where the file system has no locks, and nothing is known.

    Raises:
        BlockingIOError: another has it.
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path, flags: int, *, shared: bool = False) -> None:
        self.fd = -1
        self.fd = os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0), 0o666)
        self.supported = fcntl is not None
        _locks.add(self)
        if self.supported:
            try:
                fcntl.flock(self.fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except BlockingIOError:
                self.release()
                raise
            except OSError:
                self.supported = False

    def release(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    __del__ = release


_locks: weakref.WeakSet[Lock] = weakref.WeakSet()


def _release_in_child() -> None:
    """A forked child shares the parent's open files, and so its locks, which would outlive the parent."""
    for lock in list(_locks):
        lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release_in_child)


def reading(checkpoint: Path) -> Lock | None:
    """Keeps a checkpoint from being removed by ``keep_last`` for as long as the lock is held.

    None: it cannot be locked. Its reader finds out if it vanishes."""
    try:
        return Lock(checkpoint / NAME, os.O_RDONLY | os.O_NONBLOCK, shared=True)
    except OSError:
        return None


# Saving ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unfinished:
    """``folder``, which is to become ``path``, and the lock on the manifest.json in it, which is empty at first."""

    folder: Path
    path: Path
    lock: Lock

    @staticmethod
    def make(path: Path, run: Run | None = None) -> Unfinished:
        """Makes the folder, and sweeps what dead saves to the same path have left.

        Raises:
            FileExistsError: there is something at ``path``. A checkpoint is never overwritten: while its files were
                replaced, it would be neither the old one nor the new.
        """
        _make_durably(path.parent)
        for left in _leftovers(path.parent):
            if left.name == path.name:
                _remove_dead(left.folder)
        if os.path.lexists(path):
            raise FileExistsError(f"{path} exists: save under another name (such as {path.name}-2), or remove it first")
        for _ in range(100):
            folder = _other_name(path, None if run is None else run.token)
            folder.mkdir()
            # Another save to this path may take the folder for dead until it is locked, and renames it then.
            with contextlib.suppress(BlockingIOError, FileNotFoundError):
                lock = Lock(folder / NAME, os.O_RDWR | os.O_CREAT)
                if folder.exists():
                    return Unfinished(folder, path, lock)
        raise OSError(f"{path} cannot be saved: others remove what is made for it")

    def write_manifest(self, text: bytes) -> None:
        """Writes and syncs it. Other files are those of `write_durably`."""
        with open(os.dup(self.lock.fd), "wb") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    def commit(self) -> None:
        """Renames it. From here on the checkpoint exists, whole.

        Raises:
            FileExistsError: another save to the same path was faster.
            FileNotFoundError: the folder has vanished.
        """
        try:
            sync_folder(self.folder)
            if os.path.lexists(self.path):  # rename would replace an empty folder
                raise FileExistsError
            _rename(self.folder, self.path, self.lock)
        except OSError as error:
            if not self.folder.exists():
                raise vanished(self.folder) from error
            if os.path.lexists(self.path):
                raise FileExistsError(
                    f"{self.path} has appeared while it was being saved: another save to the same path was faster, and "
                    "this one is dropped. Let every job save under names of its own, and the ranks of one job save "
                    "together: where each stage of a pipeline has a ShardedLion of its own, pass process_group= of all "
                    "stages"
                ) from None
            raise
        sync_folder(self.path.parent)

    def discard(self) -> None:
        """Removes it; nobody may be writing into it any more."""
        with contextlib.suppress(OSError):  # what is left is swept by a later save
            _remove(self.folder, self.lock)


def vanished(folder: Path) -> FileNotFoundError:
    """The error for a folder, or a file in it, that is not there though it is being saved."""
    return FileNotFoundError(
        f"{folder} is not there, though it is being saved: another process has removed it, or not every rank sees the "
        "same file system. This save has failed; save again"
    )


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


def _make_durably(folder: Path) -> None:
    if not folder.is_dir():
        _make_durably(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


# Removing: see [Note: Who removes what] -------------------------------------------------------------


class _Leftover(NamedTuple):
    """An unfinished folder, alive or dead; ``name``: of the checkpoint; ``token``: of its run, or None."""

    folder: Path
    name: str
    token: str | None


def _leftovers(folder: Path) -> Iterator[_Leftover]:
    for left in list(folder.iterdir()):
        found = _UNFINISHED.fullmatch(left.name)
        if found and left.is_dir() and not left.is_symlink():
            yield _Leftover(left, found["name"], found["run"])


def _token(run: str) -> str:
    return hashlib.sha256(run.encode()).hexdigest()[:16]


def _other_name(path: Path, token: str | None) -> Path:
    """A new name for an unfinished folder of the checkpoint ``path``."""
    random = secrets.token_hex(4)
    return path.parent / f".{path.name}.{random if token is None else f'{token}-{random}'}.unfinished"


def _rename(source: Path, target: Path, lock: Lock) -> None:
    try:
        source.rename(target)
    except OSError:
        if lock.fd < 0:
            raise
        lock.release()  # SMB moves no folder in which a file is open
        source.rename(target)


def _remove_dead(left: Path) -> None:
    """Removes a leftover, unless its owner may be alive."""
    with contextlib.suppress(OSError):  # it is locked, another's, or was committed or removed just now
        newest = max(os.lstat(path).st_mtime for path in (left, *left.iterdir()))
        lock = Lock(left / NAME, os.O_RDWR | os.O_CREAT)
        if lock.supported or time.time() - newest > DEAD_AFTER_S:
            _remove(left, lock)
        lock.release()


def _remove(folder: Path, lock: Lock, token: str | None = None) -> None:
    """Removes a checkpoint of the run of that token, or an unfinished folder, whose lock is held. Ends the lock.

    Raises:
        OSError: it cannot be renamed, and is as it was.
    """
    found = _UNFINISHED.fullmatch(folder.name)
    name, token = (found["name"], found["run"]) if found else (folder.name, token)
    doomed = _other_name(folder.parent / name, token)
    try:
        _rename(folder, doomed, lock)
        shutil.rmtree(doomed, ignore_errors=True)
    finally:
        lock.release()
    shutil.rmtree(doomed, ignore_errors=True)  # NFS keeps a removed file until it is closed


# Runs -----------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """A part of a training between two loads, and those before it: ``keep_last`` removes nothing of other runs.

    Every load begins another run, so those that go on from one checkpoint leave each other's alone.

    Attributes:
        name: of the run, which no other has.
        before: names of the runs that it goes on from, the first one first.
    """

    name: str
    before: tuple[str, ...] = ()

    @property
    def token(self) -> str:
        """As it stands in the name of an unfinished folder: of the first run, since whoever goes on from that sweeps
        what has died."""
        return _token((*self.before, self.name)[0])

    @staticmethod
    def new(before: Sequence[str] = ()) -> Run:
        return Run(secrets.token_hex(8), (*before[:1], *before[1:][-_MOST_BEFORE:]))


_MOST_BEFORE = 255
# By optimizer and by model: the run in a folder.
_runs: weakref.WeakKeyDictionary[object, dict[str, Run]] = weakref.WeakKeyDictionary()
_told: set[tuple[Path, str]] = set()


def run_of(owners: Sequence[object], path: Path) -> Run:
    """The run that a checkpoint at ``path`` will belong to: that of the first of its owners (the optimizer, the model)
    that has one in this folder. From now on it is that of all of them."""
    folder = os.path.realpath(path.parent)
    known = [_runs[owner][folder] for owner in owners if folder in _runs.get(owner, {})]
    run = known[0] if known else Run.new()
    for owner in owners:
        _runs.setdefault(owner, {})[folder] = run
    return run


def continue_run(owners: Sequence[object], path: Path, objects: dict[str, Any]) -> None:
    """After a load from ``path``, whose manifest has these ``objects``: later saves beside it go on from its run."""
    name, before = objects.get(RUN), objects.get(BEFORE)
    names = [*before, name] if isinstance(before, list) else [name]
    known = [name for name in names if isinstance(name, str)]
    if known == names:
        run = Run.new(known)
        for owner in owners:
            _runs.setdefault(owner, {})[os.path.realpath(path.parent)] = run


def keep_last(path: Path, count: int, run: Run) -> None:
    """Removes the checkpoints of the run, and of those before it, whose names differ from that of ``path`` in the
    number alone, but the last ``count``, and never ``path`` itself; and what is dead of these runs. What is being read
    stays, for the next time."""
    stem = stem_of(path.name)
    names = {run.name, *run.before}
    alike = [old for old in checkpoints(path.parent, stem=stem) if stem_of(old.name) == stem]
    mine = [old for old in alike if _read_run(old) in names]
    if len(mine) < len(alike) and (path.parent, stem) not in _told:
        _told.add((path.parent, stem))
        others = [old.name for old in alike if old not in mine]
        logger.warning(
            "lion_dist: keep_last leaves %d checkpoints in %s to the runs that saved them (%s): this training has "
            "neither saved them nor been loaded from one of theirs. Remove them by hand if nobody needs them",
            len(others),
            path.parent,
            ", ".join(others[:5]),
        )
    for old in mine[:-count]:
        if old != path and not old.is_symlink():
            with contextlib.suppress(OSError):  # somebody reads it, or another save removes it
                _remove(old, Lock(old / NAME, os.O_RDWR), run.token)
    for left in _leftovers(path.parent):
        if left.token == run.token and stem_of(left.name) == stem:
            _remove_dead(left.folder)


def _read_run(checkpoint: Path) -> str | None:
    try:
        return _run_in(checkpoint, (checkpoint / NAME).stat().st_mtime_ns)
    except (OSError, ValueError):  # damaged: nothing is known about it
        return None


@functools.lru_cache(maxsize=1024)
def _run_in(checkpoint: Path, _modified: int) -> str | None:
    """Remembered, since every save asks, and a manifest of many ranks is long."""
    run = Manifest.read(checkpoint).objects.get(RUN)
    return run if isinstance(run, str) else None


# Finding --------------------------------------------------------------------------------------------


def number_of(name: str) -> int | None:
    """The number at the end of a checkpoint's name, such as 100 of step-100."""
    found = re.search(r"([0-9]+)$", name)
    return int(found[1]) if found else None


def stem_of(name: str) -> str:
    """What stands before the number, which checkpoints of one run have in common."""
    return re.sub(r"[0-9]+$", "", name)


def checkpoints(folder: Key, *, stem: str | None = None) -> list[Path]:
    """The checkpoints in a folder whose names end in a number, the smallest first.

    Args:
        stem: what stands before the number, with or without its separator: "step" and "step-" both find step-100.
            A checkpoint whose whole name is the stem, such as ``best``, is found too, and comes first. None: any stem,
            and no name without a number.
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
        if wanted and (path / NAME).is_file() and not path.name.startswith("."):
            found.append((-1 if number is None else number, path))
    return [path for _, path in sorted(found)]


class _Raise:
    """The type of the default of `latest`."""


_RAISE = _Raise()


@overload
def latest(folder: Key, *, stem: str | None = None) -> Path: ...
@overload
def latest(folder: Key, *, stem: str | None = None, default: T) -> Path | T: ...
def latest(folder: Key, *, stem: str | None = None, default: T | _Raise = _RAISE) -> Path | T:
    """The checkpoint in a folder whose name ends in the largest number.

    Args:
        folder: it need not exist.
        stem: only those of this name before the number, as for `checkpoints`: ``latest("runs", stem="best")`` is
            ``runs/best-20``, or ``runs/best`` if none has a number. None: any, but only those with a number.
        default: returned if there is none, such as None.

    Raises:
        FileNotFoundError: there is none, and no default.
    """
    found = checkpoints(folder, stem=stem)
    if found:
        return found[-1]
    if not isinstance(default, _Raise):
        return default
    others = _named(Path(folder)) if stem is None else ""
    which = "no checkpoint whose name ends in a number" if others else "no checkpoint"
    of = "" if stem is None else f" of the stem {stem!r}"
    raise FileNotFoundError(f"there is {which}{of} in {os.fspath(folder)}{others}")


def _named(folder: Path) -> str:
    """Names the checkpoints without a number, for an error's message."""
    names = sorted(path.parent.name for path in folder.glob(f"*/{NAME}"))
    return f", but {', '.join(map(repr, names[:5]))}: give its path, or stem={names[0]!r}" if names else ""
