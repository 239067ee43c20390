"""File locks that tell a running process from a dead one: the operating system ends a lock with its process."""

from __future__ import annotations

import os
import weakref
from pathlib import Path

from .files import MANIFEST

try:
    import fcntl
except ImportError:  # a system without flock is treated as a file system without locks
    fcntl = None  # type: ignore[assignment]


class FileLock:
    """A lock on a file, held until `release` or the end of the process.

    It holds between processes, between two saves of one process, and over NFS if the file is open for writing.

    Args:
        path: the file.
        flags: flags of ``os.open``.
        shared: take a shared lock instead of an exclusive one.

    Attributes:
        fd: descriptor of the open file; -1 after `release`.
        supported: False where the file system has no locks. Then the file is open, but not locked.

    Raises:
        BlockingIOError: another holder has the lock.
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
        """Ends the lock and closes the file. Does nothing the second time."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    __del__ = release


_locks: weakref.WeakSet[FileLock] = weakref.WeakSet()


def _release_in_child() -> None:
    """A forked child shares the parent's open files and with them its locks, which would outlive the parent."""
    for lock in list(_locks):
        lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release_in_child)


def lock_for_reading(checkpoint: Path) -> FileLock | None:
    """Takes a shared lock on a checkpoint, so that ``keep_last`` does not remove it while the lock is held.

    Returns:
        The lock; None if the checkpoint cannot be locked. Its reader then finds out if the checkpoint vanishes.
    """
    try:
        return FileLock(checkpoint / MANIFEST, os.O_RDONLY | os.O_NONBLOCK, shared=True)
    except OSError:
        return None
