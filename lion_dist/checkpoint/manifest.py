"""The manifest: which tensors and values a checkpoint holds, and in which bytes of which files (see files.py).

A tensor is stored as *chunks*: boxes that together cover every element once. Each chunk is row-major and contiguous in
one file, and has a CRC-32 for every *block* of ``block_bytes`` bytes (the last block may be shorter). A manifest may
come from anybody, so every value in it is checked before it is used: see `Manifest.parse`.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..dtypes import DTYPES
from ..sharding.boxes import Box, check_cover
from .files import DIGEST, MANIFEST, MAX_DIGEST_BYTES, data_name, read_small, size_of
from .json_values import MAX_DEPTH, too_deep

FORMAT = "lion_dist.checkpoint"
VERSION = 1
BLOCK_BYTES = 8 << 20  # a multiple of every dtype's size
MAX_DIMS = 64  # torch's own limit
_MAX_NAME = 4096  # characters
_MAX_DIGITS = 1300  # digits of an integer: more than an integer of json_values.MAX_BITS has
_DATA = re.compile(r"data-[0-9]{5}\.bin")


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor, in one file.

    Attributes:
        offsets, sizes: the box.
        file: name of the file.
        start: position of the first byte in the file.
        checksums: CRC-32 of each block.
    """

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
    """A tensor of the checkpoint.

    Attributes:
        dtype: name of the dtype, a key of `DTYPES`.
        shape: shape of the whole tensor.
        chunks: the boxes in which it is stored.
    """

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return DTYPES[self.dtype].itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * self.itemsize


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json.

    Attributes:
        files: size in bytes of each data file, by name.
        tensors: by key.
        objects: values that are not tensors, by key, as `json_values.to_json` makes them.
        block_bytes: number of bytes that share a checksum.
    """

    files: dict[str, int]
    tensors: dict[str, TensorEntry]
    objects: dict[str, Any]
    block_bytes: int
    format: str = field(default=FORMAT, init=False)
    version: int = field(default=VERSION, init=False)

    def dumps(self) -> bytes:
        """The manifest as JSON."""
        return json.dumps(asdict(self), separators=(",", ":"), allow_nan=False).encode()

    def check(self) -> None:
        """Checks that chunks cover every tensor once, and that every byte of the files belongs to one chunk.

        Raises:
            ValueError: names the first tensor or file for which this is not so.
        """
        for name in (*self.tensors, *self.objects):
            check_name(name)
        ranges: dict[str, list[tuple[int, int, str]]] = {name: [] for name in self.files}
        for name, entry in self.tensors.items():
            try:
                check_cover(entry.shape, [chunk.box for chunk in entry.chunks])
            except ValueError as error:
                raise ValueError(f"{name} is not whole: {error}") from None
            for chunk in entry.chunks:
                nbytes = chunk.box.numel * entry.itemsize
                if len(chunk.checksums) != -(-nbytes // self.block_bytes):
                    raise ValueError(f"{name} has {len(chunk.checksums)} checksums for {nbytes} bytes")
                if chunk.file not in ranges:
                    raise ValueError(f"{name} refers to the file {chunk.file[:80]!r}, which is not among the files")
                ranges[chunk.file].append((chunk.start, chunk.start + nbytes, name))
        for file, claimed in ranges.items():
            end = 0
            for start, stop, name in sorted(claimed):
                if start != end:
                    raise ValueError(f"{name} begins at byte {start} of {file}, but the tensor before it ends at {end}")
                end = stop
            if end != self.files[file]:
                raise ValueError(f"{file} is listed with {self.files[file]} bytes, of which {end} belong to tensors")

    @staticmethod
    def parse(text: bytes) -> Manifest:
        """Reads what `dumps` wrote, and checks every value, and the whole by `check`.

        Raises:
            ValueError: says what is wrong.
        """
        try:
            raw = json.loads(
                text.decode(), object_pairs_hook=_unique, parse_int=_int, parse_float=_float, parse_constant=_float
            )
        except (RecursionError, MemoryError):
            raise ValueError("it is nested too deeply") from None
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            raise ValueError(f'it has no "format": "{FORMAT}"')
        if raw.get("version") != VERSION:
            found = repr(raw.get("version"))[:40]
            raise ValueError(f"it has version {found}; this lion_dist reads version {VERSION}")
        block_bytes = _number(raw.get("block_bytes"), "block_bytes")
        if not 64 <= block_bytes <= 1 << 30 or block_bytes % 64:
            raise ValueError(f"block_bytes is {block_bytes}; expected a multiple of 64 up to 2**30")
        files = {}
        for name, size in _dict(raw.get("files"), "files").items():
            if not _DATA.fullmatch(name):
                raise ValueError(f"{name[:80]!r} is not the name of a data file, such as {data_name(0)}")
            files[name] = _number(size, name)
        tensors = {check_name(name): _entry(name, of) for name, of in _dict(raw.get("tensors"), "tensors").items()}
        objects = _dict(raw.get("objects"), "objects")
        for name, value in objects.items():
            if check_name(name) in tensors:
                raise ValueError(f"{name} is listed as a tensor and a value")
            if too_deep(value):
                raise ValueError(f"{name} is nested more than {MAX_DEPTH} deep")
        manifest = Manifest(files, tensors, objects, block_bytes)
        manifest.check()
        return manifest

    @staticmethod
    def read(folder: Path) -> Manifest:
        """Reads a checkpoint's manifest, and compares the sizes of its files with it.

        Raises:
            FileNotFoundError: there is no checkpoint in ``folder``.
            ValueError: the checkpoint is damaged, or in another format; names the folder.
        """
        try:
            text = read_small(folder / MANIFEST)
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
            if missing == MANIFEST and (folder / ".metadata").exists():
                raise ValueError(
                    f"{folder} is in torch.distributed.checkpoint's own format, which is pickled: if you trust whoever "
                    "wrote it, load it with torch.distributed.checkpoint.load(), as lion_dist's documentation shows"
                ) from None
            raise FileNotFoundError(f"{folder} is not a whole checkpoint of lion_dist: there is no {missing}") from None
        except (ValueError, OSError) as error:
            raise ValueError(f"{folder} cannot be loaded: {error}") from error
        return manifest


def check_name(name: str) -> str:
    """Returns the name of a tensor or value, which messages may show on terminals.

    Raises:
        ValueError: it has control characters, or is too long.
    """
    if not name.isprintable() or len(name) > _MAX_NAME:
        raise ValueError(f"{name[:80]!r} cannot be a name: expected up to {_MAX_NAME} printable characters")
    return name


# Values of the JSON, checked -------------------------------------------------------------------------


def _int(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"a number has {len(digits)} digits; expected at most {_MAX_DIGITS}")
    return int(digits)


def _float(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits[:40]} is not a finite number, as this format requires")
    return number


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
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


def _entry(name: str, raw: Any) -> TensorEntry:
    entry = _dict(raw, name)
    dtype = entry.get("dtype")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{name} has the dtype {str(dtype)[:40]!r}; expected the name of a torch.dtype")
    if not isinstance(entry.get("chunks"), list):
        raise ValueError(f"{name} has no list of chunks")
    shape = _numbers(entry.get("shape"), f"the shape of {name}")
    if len(shape) > MAX_DIMS:
        raise ValueError(f"{name} has {len(shape)} dimensions; expected at most {MAX_DIMS}")
    return TensorEntry(dtype, shape, tuple(_chunks(name, entry["chunks"])))


def _chunks(name: str, raw: list[Any]) -> Iterator[Chunk]:
    for value in raw:
        chunk = _dict(value, f"a chunk of {name}")
        if not isinstance(chunk.get("file"), str):
            raise ValueError(f"a chunk of {name} names no file")
        yield Chunk(
            _numbers(chunk.get("offsets"), f"offsets of {name}"),
            _numbers(chunk.get("sizes"), f"sizes of {name}"),
            chunk["file"],
            _number(chunk.get("start"), f"start of {name}"),
            _numbers(chunk.get("checksums"), f"checksums of {name}"),
        )
