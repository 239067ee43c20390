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
import os
import re
import stat
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from ..sharding.boxes import Box, check_cover
from .plain import DTYPES

FORMAT = "lion_dist.checkpoint"
VERSION = 1
NAME = "manifest.json"
DIGEST = "manifest.sha256"
BLOCK_BYTES = 8 << 20  # a multiple of every dtype's size
MAX_MANIFEST_BYTES = 1 << 30
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
class Held:
    """A tensor of the checkpoint; ``dtype`` by its name."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Manifest:
    """``files``: bytes of each. ``objects``: what is not a tensor, as `plain.to_plain` makes it."""

    files: dict[str, int]
    tensors: dict[str, Held]
    objects: dict[str, Any]
    block_bytes: int
    format: str = field(default=FORMAT, init=False)
    version: int = field(default=VERSION, init=False)

    def dumps(self) -> bytes:
        return json.dumps(asdict(self), separators=(",", ":"), allow_nan=False).encode()

    def check(self) -> None:
        """Raises ValueError unless every tensor is covered once, and every byte of the files belongs to one chunk."""
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
                    raise ValueError(f"{name} is said to lie in {chunk.file!r}, which is not among the files")
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
            raw = json.loads(text, object_pairs_hook=_once)
        except RecursionError:
            raise ValueError("it is nested too deeply") from None
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            raise ValueError(f'it has no "format": "{FORMAT}"')
        if raw.get("version") != VERSION:
            raise ValueError(f"it is of version {raw.get('version')!r}; this lion_dist reads version {VERSION}")
        block_bytes = _number(raw.get("block_bytes"), "block_bytes")
        if not 64 <= block_bytes <= 1 << 30 or block_bytes % 64:
            raise ValueError(f"block_bytes is {block_bytes}; expected a multiple of 64 up to 2**30")
        files = {}
        for name, size in _dict(raw.get("files"), "files").items():
            if not _DATA.fullmatch(name):
                raise ValueError(f"{name!r} is not the name of a data file, such as {data_name(0)}")
            files[name] = _number(size, name)
        tensors = {name: _held(name, held) for name, held in _dict(raw.get("tensors"), "tensors").items()}
        manifest = Manifest(files, tensors, _dict(raw.get("objects"), "objects"), block_bytes)
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
            digest = read_small(folder / DIGEST).split()[:1]
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
                    f"{folder} is a checkpoint of torch.distributed.checkpoint's own storage, which is pickled: see "
                    "lion_dist.checkpoint.convert"
                ) from None
            raise FileNotFoundError(f"{folder} is not a whole checkpoint of lion_dist: there is no {missing}") from None
        except (ValueError, OSError) as error:
            raise ValueError(f"{folder} cannot be loaded: {error}") from error
        return manifest


class RegularFile:
    """A file opened for reading; links, devices and pipes are refused. ``fd``: its descriptor; ``size``: in bytes."""

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | getattr(os, "O_NOFOLLOW", 0))
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


def read_small(path: Path) -> bytes:
    with closing(RegularFile(path)) as file:
        if file.size > MAX_MANIFEST_BYTES:
            raise ValueError(f"{path.name} has {file.size} bytes; expected at most {MAX_MANIFEST_BYTES}")
        parts = []
        while part := os.read(file.fd, 1 << 24):
            parts.append(part)
        return b"".join(parts)


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


def _held(name: str, raw: Any) -> Held:
    held = _dict(raw, name)
    if held.get("dtype") not in DTYPES:
        raise ValueError(f"{name} is of dtype {str(held.get('dtype'))[:40]!r}, which is none of torch's")
    if not isinstance(held.get("chunks"), list):
        raise ValueError(f"{name} has no list of chunks")
    return Held(
        held["dtype"], _numbers(held.get("shape"), f"the shape of {name}"), tuple(_chunks(name, held["chunks"]))
    )


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
