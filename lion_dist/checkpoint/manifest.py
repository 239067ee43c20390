"""The manifest: what a checkpoint holds, and where. No torch but for the names of dtypes.

A checkpoint is a folder of

    manifest.json       this; see `Manifest`
    manifest.sha256     of manifest.json, as sha256sum writes it
    data-00000.bin ...  raw bytes, a file a rank that wrote any

A tensor is held as *chunks*, boxes that cover it once, each row-major in one run of a file's bytes, with a crc32 for
every *block* of ``block_bytes`` of it (the last may be shorter). Nothing in a manifest is believed before it has been
checked: see `Manifest.parse`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..sharding.boxes import Box, check_cover
from .plain import DTYPES, MAX_DEPTH, too_deep

FORMAT = "lion_dist.checkpoint"
VERSION = 1
NAME = "manifest.json"
DIGEST = "manifest.sha256"
BLOCK_BYTES = 8 << 20  # a multiple of every dtype's size
MAX_MANIFEST_BYTES = 1 << 30
MAX_DIGEST_BYTES = 4096
MAX_DIMS = 64  # torch's own limit
_MAX_NAME = 4096
_MAX_DIGITS = 1300  # of a whole number: more than plain.MAX_BITS
_DATA = re.compile(r"data-[0-9]{5}\.bin")


def data_name(rank: int) -> str:
    return f"data-{rank:05d}.bin"


@dataclass(frozen=True)
class Chunk:
    """``checksums``: a crc32 a block."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    checksums: tuple[int, ...]

    @property
    def box(self) -> Box:
        return Box(self.offsets, self.sizes)


@dataclass(frozen=True)
class TensorEntry:
    """A tensor of the checkpoint; ``dtype`` by its name."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Manifest:
    """``files``: bytes of each. ``objects``: what is not a tensor, as `plain.to_plain` makes it."""

    files: dict[str, int]
    tensors: dict[str, TensorEntry]
    objects: dict[str, Any]
    block_bytes: int
    format: str = field(default=FORMAT, init=False)
    version: int = field(default=VERSION, init=False)

    def dumps(self) -> bytes:
        return json.dumps(asdict(self), separators=(",", ":"), allow_nan=False).encode()

    def check(self) -> None:
        """Raises ValueError unless every tensor is covered once, and every byte of the files belongs to one chunk."""
        for name in (*self.tensors, *self.objects):
            check_name(name)
        runs: dict[str, list[tuple[int, int, str]]] = {name: [] for name in self.files}
        for name, held in self.tensors.items():
            try:
                check_cover(held.shape, [chunk.box for chunk in held.chunks])
            except ValueError as error:
                raise ValueError(f"{name} is not whole: {error}") from None
            itemsize = DTYPES[held.dtype].itemsize
            for chunk in held.chunks:
                nbytes = chunk.box.numel * itemsize
                if len(chunk.checksums) != -(-nbytes // self.block_bytes):
                    raise ValueError(f"{name} has {len(chunk.checksums)} checksums for {nbytes} bytes")
                if chunk.file not in runs:
                    raise ValueError(f"{name} is said to lie in {chunk.file[:80]!r}, which is not among the files")
                runs[chunk.file].append((chunk.start, chunk.start + nbytes, name))
        for file, claimed in runs.items():
            end = 0
            for start, stop, name in sorted(claimed):
                if start != end:
                    raise ValueError(f"{name} begins at byte {start} of {file}, and the one before it ends at {end}")
                end = stop
            if end != self.files[file]:
                raise ValueError(f"{file} is said to have {self.files[file]} bytes, of which {end} belong to tensors")

    @staticmethod
    def parse(text: bytes) -> Manifest:
        """From `dumps`, every value of it checked, and the whole by `check`.

        Raises:
            ValueError: saying what is wrong.
        """
        try:
            raw = json.loads(
                text.decode(), object_pairs_hook=_once, parse_int=_int, parse_float=_float, parse_constant=_float
            )
        except (RecursionError, MemoryError):
            raise ValueError("it is nested too deeply") from None
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            raise ValueError(f'it has no "format": "{FORMAT}"')
        if raw.get("version") != VERSION:
            found = repr(raw.get("version"))[:40]
            raise ValueError(f"it is of version {found}; this lion_dist reads version {VERSION}")
        block_bytes = _number(raw.get("block_bytes"), "block_bytes")
        if not 64 <= block_bytes <= 1 << 30 or block_bytes % 64:
            raise ValueError(f"block_bytes is {block_bytes}; expected a multiple of 64 up to 2**30")
        files = {}
        for name, size in _dict(raw.get("files"), "files").items():
            if not _DATA.fullmatch(name):
                raise ValueError(f"{name[:80]!r} is not the name of a data file, such as {data_name(0)}")
            files[name] = _number(size, name)
        tensors = {check_name(name): _held(name, held) for name, held in _dict(raw.get("tensors"), "tensors").items()}
        objects = _dict(raw.get("objects"), "objects")
        for name, value in objects.items():
            if check_name(name) in tensors:
                raise ValueError(f"{name} is said to be a tensor and a value")
            if too_deep(value):
                raise ValueError(f"{name} is nested more than {MAX_DEPTH} deep")
        manifest = Manifest(files, tensors, objects, block_bytes)
        manifest.check()
        return manifest

    @staticmethod
    def read(folder: Path) -> Manifest:
        """A checkpoint's manifest, and its files' sizes compared with it.

        Raises:
            FileNotFoundError: there is none.
            ValueError: naming the folder, for one that is damaged or not ours.
        """
        try:
            text = read_small(folder / NAME)
            digest = read_small(folder / DIGEST, MAX_DIGEST_BYTES).split()[:1]
            if digest != [hashlib.sha256(text).hexdigest().encode()]:
                raise ValueError(f"its sha256 is not the one in {DIGEST}")
            manifest = Manifest.parse(text)
            for name, size in manifest.files.items():
                found = size_of(folder / name)
                if found != size:
                    raise ValueError(f"{name} has {found} bytes, not {size}")
        except FileNotFoundError as error:
            missing = Path(error.filename).name
            if missing == NAME and (folder / ".metadata").exists():
                raise ValueError(
                    f"{folder} is a checkpoint of torch.distributed.checkpoint's own storage, which is pickled: if you "
                    "trust whoever wrote it, load it by torch.distributed.checkpoint.load() (the README shows how)"
                ) from None
            raise FileNotFoundError(f"{folder} is not a whole checkpoint of lion_dist: there is no {missing}") from None
        except (ValueError, OSError) as error:
            raise ValueError(f"{folder} cannot be loaded: {error}") from error
        return manifest


class RegularFile:
    """A file opened for reading; links, devices and pipes are refused. ``fd``: its descriptor; ``size``: in bytes."""

    def __init__(self, path: Path, folder: int | None = None) -> None:
        """
        Args:
            folder: the descriptor of the folder that a relative path begins at; None: the working directory.
        """
        flags = os.O_RDONLY | os.O_NONBLOCK | getattr(os, "O_NOFOLLOW", 0)
        self.fd = os.open(path, flags, dir_fd=folder)
        found = os.fstat(self.fd)
        self.size = found.st_size
        if not stat.S_ISREG(found.st_mode):
            self.close()
            raise ValueError(f"{path.name} is not a regular file")

    def close(self) -> None:
        os.close(self.fd)


def size_of(path: Path) -> int:
    with closing(RegularFile(path)) as file:
        return file.size


def read_small(path: Path, limit: int = MAX_MANIFEST_BYTES) -> bytes:
    with closing(RegularFile(path)) as file:
        if file.size > limit:
            raise ValueError(f"{path.name} has {file.size} bytes; expected at most {limit}")
        parts = []
        while part := os.read(file.fd, min(file.size + 1, 1 << 24)):
            parts.append(part)
        return b"".join(parts)


def check_name(name: str) -> str:
    """The name of a tensor or value, which may be shown on terminals.

    Raises:
        ValueError: it has characters that terminals act upon, or is too long.
    """
    if not name.isprintable() or len(name) > _MAX_NAME:
        raise ValueError(f"{name[:80]!r} cannot be a name: expected up to {_MAX_NAME} printable characters")
    return name


def _int(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"a number has {len(digits)} digits; expected at most {_MAX_DIGITS}")
    return int(digits)


def _float(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits[:40]} is no number of this format")
    return number


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def _dict(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{what} is {str(value)[:40]!r}; expected a dict")
    return value


def _number(value: Any, what: str) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError(f"{what} is {str(value)[:40]!r}; expected a whole number, not negative")
    return value


def _numbers(value: Any, what: str) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise ValueError(f"{what} is {str(value)[:40]!r}; expected a list")
    return tuple(_number(v, what) for v in value)


def _held(name: str, raw: Any) -> TensorEntry:
    held = _dict(raw, name)
    dtype = held.get("dtype")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{name} is of dtype {str(dtype)[:40]!r}, which is none of torch's")
    if not isinstance(held.get("chunks"), list):
        raise ValueError(f"{name} has no list of chunks")
    shape = _numbers(held.get("shape"), f"the shape of {name}")
    if len(shape) > MAX_DIMS:
        raise ValueError(f"{name} has {len(shape)} dimensions; expected at most {MAX_DIMS}")
    return TensorEntry(dtype, shape, tuple(_chunks(name, held["chunks"])))


def _chunks(name: str, raw: list[Any]) -> Iterator[Chunk]:
    for entry in raw:
        chunk = _dict(entry, f"a chunk of {name}")
        if not isinstance(chunk.get("file"), str):
            raise ValueError(f"a chunk of {name} names no file")
        yield Chunk(
            _numbers(chunk.get("offsets"), f"offsets of {name}"),
            _numbers(chunk.get("sizes"), f"sizes of {name}"),
            chunk["file"],
            _number(chunk.get("start"), f"start of {name}"),
            _numbers(chunk.get("checksums"), f"checksums of {name}"),
        )
