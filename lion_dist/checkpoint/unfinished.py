"""Checkpoints that are being written or removed: made under a hidden name, committed by one rename, swept if dead.

    runs/step-100                               a checkpoint; it is whole, because the rename came last
    runs/.step-200.<run>-<random>.unfinished    being written, being removed, or left behind by a crash

[Note: Who removes what]
Independent jobs may save into one folder, even to one path. So nothing is removed unless it is known to be dead:

- Whoever writes or removes an unfinished folder holds an exclusive lock on the manifest.json in it, which is the first
  file made there. The operating system ends the lock with the process. A folder whose lock can be taken is dead.
- A save removes dead folders of its own final name. With ``keep_last`` it also removes older checkpoints that have its
  stem and belong to its run or to an earlier run of the same training (see `runs.Run`), and dead folders of that stem
  and training, whatever their numbers.
- A folder is renamed before anything in it is removed. A process that lost its folder (because it had no lock yet, or
  because locks do not work between these machines) therefore finds the whole folder missing, and can never commit a
  part of it.
- Where the file system has no locks, a folder is dead if nothing in it has changed for a day.
- Readers hold a shared lock on the checkpoint's manifest.json. ``keep_last`` skips a checkpoint that is being read; the
  next save tries again.

A crash leaves one unfinished folder: of the name that was being saved or removed; after a save's rename, none. A
training that resumes saves under the same names again, or uses ``keep_last``; both sweep that folder.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from .files import MANIFEST, make_folder_durably, sync_folder
from .locks import FileLock

DEAD_AFTER_S = 24 * 3600.0  # seconds without a change, where there are no locks
_NAME = re.compile(r"\.(?P<name>.+)\.(?:(?P<token>[0-9a-f]{16})-)?[0-9a-f]{8}\.unfinished", re.DOTALL)


@dataclass(frozen=True)
class Unfinished:
    """A checkpoint that is being written.

    Attributes:
        folder: where it is written.
        path: where it will be once it is committed.
        lock: the lock on the manifest.json in ``folder``; that file is empty at first.
    """

    folder: Path
    path: Path
    lock: FileLock

    @staticmethod
    def make(path: Path, token: str | None = None) -> Unfinished:
        """Makes and locks the folder, and removes what dead saves to the same path have left.

        Args:
            path: where the checkpoint will be.
            token: token of the training that saves (`runs.Run.token`), which becomes part of the folder's name.

        Raises:
            FileExistsError: there is something at ``path``. A checkpoint is never overwritten: while its files were
                replaced, it would be neither the old one nor the new one.
        """
        make_folder_durably(path.parent)
        for left in leftovers(path.parent):
            if left.name == path.name:
                remove_if_dead(left.folder)
        if os.path.lexists(path):
            raise FileExistsError(f"{path} exists: save under another name (such as {path.name}-2), or remove it first")
        for _ in range(100):
            folder = _new_name(path, token)
            folder.mkdir()
            # Until the folder is locked, another save to this path may take it for dead; it then renames the folder.
            with contextlib.suppress(BlockingIOError, FileNotFoundError):
                lock = FileLock(folder / MANIFEST, os.O_RDWR | os.O_CREAT)
                if folder.exists():
                    return Unfinished(folder, path, lock)
        raise OSError(f"{path} cannot be saved: another process removes every folder that is made for it")

    def write_manifest(self, text: bytes) -> None:
        """Writes and syncs manifest.json through the descriptor that holds the lock."""
        with open(os.dup(self.lock.fd), "wb") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    def commit(self) -> None:
        """Renames the folder to ``path``. From here on the checkpoint exists, and is whole.

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
                    f"{self.path} appeared while it was being saved: another save to the same path was faster, and "
                    "this one was dropped. Give every job its own names, and let the ranks of one job save together: "
                    "where each stage of a pipeline has a ShardedLion of its own, pass process_group= with all stages"
                ) from None
            raise
        sync_folder(self.path.parent)

    def discard(self) -> None:
        """Removes the folder. No rank may be writing into it any more."""
        with contextlib.suppress(OSError):  # a later save sweeps what is left
            remove(self.folder, self.lock)


def vanished(path: Path) -> FileNotFoundError:
    """The error for a folder, or a file in it, that is missing although it is being saved."""
    return FileNotFoundError(
        f"{path} is not there, though it is being saved: another process has removed it, or not every rank sees the "
        "same file system. This save has failed; save again"
    )


class Leftover(NamedTuple):
    """An unfinished folder, alive or dead.

    Attributes:
        folder: its path.
        name: name of the checkpoint that was being saved or removed.
        token: token of the training that it belongs to (`runs.Run.token`); None if it has none.
    """

    folder: Path
    name: str
    token: str | None


def leftovers(folder: Path) -> Iterator[Leftover]:
    """The unfinished folders in a folder."""
    for left in list(folder.iterdir()):
        match = _NAME.fullmatch(left.name)
        if match and left.is_dir() and not left.is_symlink():
            yield Leftover(left, match["name"], match["token"])


def remove_if_dead(left: Path) -> None:
    """Removes an unfinished folder, unless its owner may be alive."""
    with contextlib.suppress(OSError):  # it is locked, belongs to another user, or was committed or removed just now
        newest = max(os.lstat(path).st_mtime for path in (left, *left.iterdir()))
        lock = FileLock(left / MANIFEST, os.O_RDWR | os.O_CREAT)
        if lock.supported or time.time() - newest > DEAD_AFTER_S:
            remove(left, lock)
        lock.release()


def remove(folder: Path, lock: FileLock, token: str | None = None) -> None:
    """Removes a checkpoint or an unfinished folder, and releases its lock.

    Args:
        folder: what to remove.
        lock: the exclusive lock on its manifest.json.
        token: token of the training that a checkpoint belongs to; an unfinished folder has it in its name.

    Raises:
        OSError: the folder cannot be renamed. Nothing in it was changed.
    """
    match = _NAME.fullmatch(folder.name)
    name, token = (match["name"], match["token"]) if match else (folder.name, token)
    doomed = _new_name(folder.parent / name, token)
    try:
        _rename(folder, doomed, lock)
        shutil.rmtree(doomed, ignore_errors=True)
    finally:
        lock.release()
    shutil.rmtree(doomed, ignore_errors=True)  # NFS keeps a removed file until it is closed


def _new_name(path: Path, token: str | None) -> Path:
    """A new name for an unfinished folder of the checkpoint ``path``."""
    random = secrets.token_hex(4)
    return path.parent / f".{path.name}.{random if token is None else f'{token}-{random}'}.unfinished"


def _rename(source: Path, target: Path, lock: FileLock) -> None:
    try:
        source.rename(target)
    except OSError:
        if lock.fd < 0:
            raise
        lock.release()  # SMB does not move a folder in which a file is open
        source.rename(target)
