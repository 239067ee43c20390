"""The files of a checkpoint: their names, reading that trusts no file, and writing that survives a power failure.

manifest.json       what the checkpoint holds; see manifest.py
manifest.sha256     the SHA-256 of manifest.json, as sha256sum writes it
data-00000.bin ...  raw bytes of tensors, one file for each rank that wrote any
"""

from __future__ import annotations

import os
import stat
import weakref
from contextlib import closing
from pathlib import Path
from threading import Lock

try:
    import resource
except ImportError:  # not on this system
    resource = None  # type: ignore[assignment]

MANIFEST = "manifest.json"
DIGEST = "manifest.sha256"
MAX_MANIFEST_BYTES = 1 << 30
MAX_DIGEST_BYTES = 4096


def data_name(rank: int) -> str:
    """Name of the file that this rank writes."""
    return f"data-{rank:05d}.bin"


# Reading --------------------------------------------------------------------------------------------


class RegularFile:
    """A file opened for reading. Links, devices and pipes are refused.

    Args:
        path: the file.
        folder: descriptor of the folder that a relative path is relative to; None: the working directory.

    Attributes:
        fd: the file's descriptor.
        size: its size in bytes.
    """

    def __init__(self, path: Path, folder: int | None = None) -> None:
        flags = os.O_RDONLY | os.O_NONBLOCK | getattr(os, "O_NOFOLLOW", 0)
        self.fd = os.open(path, flags, dir_fd=folder)
        status = os.fstat(self.fd)
        self.size = status.st_size
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise ValueError(f"{path.name} is not a regular file")

    def close(self) -> None:
        os.close(self.fd)


class DataFiles:
    """The data files of a checkpoint, opened at their first use and kept open.

    At most a quarter of the files that the process may have open are kept; further ones are opened anew for each block.
    Files are opened relative to the folder, which is kept open too, so the checkpoint may be renamed meanwhile, but not
    removed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        self._open: dict[str, RegularFile] = {}
        self._max_open = max_open_files()
        self._lock = Lock()
        self.close = weakref.finalize(self, _close, self._folder, self._open)

    def read(self, name: str, position: int, buffer: memoryview) -> None:
        """Fills the buffer with bytes of a file.

        Raises:
            OSError, ValueError: the file cannot be read, or is too short.
        """
        with self._lock:
            file = self._open.get(name) or RegularFile(Path(name), self._folder)
            kept = name in self._open or len(self._open) < self._max_open
            if kept:
                self._open[name] = file
        try:
            read_block(file.fd, position, buffer)
        finally:
            if not kept:
                file.close()


def max_open_files() -> int:
    """Number of data files that are kept open: a quarter of the process's limit."""
    limit = 256 if resource is None else resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return max(8, limit // 4)


def _close(folder: int, files: dict[str, RegularFile]) -> None:
    os.close(folder)
    for file in files.values():
        file.close()


def size_of(path: Path) -> int:
    """Size of a regular file in bytes."""
    with closing(RegularFile(path)) as file:
        return file.size


def read_small(path: Path, limit: int = MAX_MANIFEST_BYTES) -> bytes:
    """The content of a regular file.

    Raises:
        ValueError: the file has more than ``limit`` bytes.
    """
    with closing(RegularFile(path)) as file:
        if file.size > limit:
            raise ValueError(f"{path.name} has {file.size} bytes; expected at most {limit}")
        parts = []
        while part := os.read(file.fd, min(file.size + 1, 1 << 24)):
            parts.append(part)
        return b"".join(parts)


def read_block(fd: int, position: int, buffer: memoryview) -> None:
    """Fills the buffer from a position in a file.

    Raises:
        ValueError: the file ends before that.
    """
    while buffer:
        got = os.preadv(fd, [buffer], position)
        if not got:
            raise ValueError("the file is shorter than it should be")
        position, buffer = position + got, buffer[got:]


# Writing --------------------------------------------------------------------------------------------


def write_block(fd: int, position: int, buffer: memoryview) -> None:
    """Writes the whole buffer at a position in a file."""
    while buffer:
        written = os.pwrite(fd, buffer, position)
        position, buffer = position + written, buffer[written:]


def write_durably(path: Path, content: bytes) -> None:
    """Makes a file whose content has reached the disk when this returns.

    Raises:
        FileExistsError: there is a file at ``path``.
    """
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Waits until the names in a folder have reached the disk, so that they survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder_durably(folder: Path) -> None:
    """Makes a folder and its parents where they do not exist, and syncs each parent."""
    if not folder.is_dir():
        make_folder_durably(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)
