"""Reads a checkpoint through torch.distributed.checkpoint's interfaces; see writer.py.

    dcp.load(state, storage_reader=Reader("runs/step-100"))

Each rank first reads and verifies all that it will need while it plans, and torch lets no rank go on to load before
every rank has planned: so whatever is damaged, nothing has been changed. (Only of dtypes that differ, which torch's
plan does not tell of, a rank learns as it loads; lion_dist.checkpoint.load compares them before.) The files stay open
in between: a checkpoint that is renamed or removed meanwhile is read to its end.
"""

from __future__ import annotations

import io
import os
import weakref
import zlib
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from ..sharding.boxes import Box
from .blocks import Buffers, as_tensor, copy_in, finished, in_threads, read_block, synchronize
from .folders import Key, local_path, reading
from .folders import Lock as FolderLock
from .manifest import BLOCK_BYTES, DIGEST, MAX_DIGEST_BYTES, Chunk, Manifest, RegularFile, read_small
from .plain import DTYPES, from_plain

try:
    import resource
except ImportError:  # not on this system
    resource = None  # type: ignore[assignment]


class DataFiles:
    """The data files of a checkpoint, opened when they are first asked for and kept open.

    Files beyond a quarter of what the process may have open are opened anew for each block. They are found through the
    folder itself, which is kept open too: it may be renamed meanwhile, but not removed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        self._open: dict[str, RegularFile] = {}
        self._most = _most_open()
        self._lock = Lock()
        self.close = weakref.finalize(self, _close, self._folder, self._open)

    def read(self, name: str, position: int, buffer: memoryview) -> None:
        """Fills the buffer with a file's bytes; raises OSError or ValueError."""
        with self._lock:
            file = self._open.get(name) or RegularFile(Path(name), self._folder)
            kept = name in self._open or len(self._open) < self._most
            if kept:
                self._open[name] = file
        try:
            read_block(file.fd, position, buffer)
        finally:
            if not kept:
                file.close()


def _most_open() -> int:
    limit = 256 if resource is None else resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return max(8, limit // 4)


def _close(folder: int, files: dict[str, RegularFile]) -> None:
    os.close(folder)
    for file in files.values():
        file.close()


class Reader(StorageReader):
    """Reads a checkpoint that `Writer` wrote.

    Args:
        path: the checkpoint's folder.
        cast: whether tensors may be loaded into ones of another dtype; an error otherwise.
    """

    def __init__(self, path: Key, *, cast: bool = False) -> None:
        self._cast = cast
        self.reset(path)

    def reset(self, checkpoint_id: Key | None = None) -> None:
        if checkpoint_id is not None:
            self._path = local_path(checkpoint_id)
        self._manifest: Manifest | None = None
        self._files: DataFiles | None = None
        self._kept: FolderLock | None = None

    def close(self) -> None:
        """Closes the data files, which are opened again when they are needed, and lets ``keep_last`` remove the
        checkpoint."""
        if self._files is not None:
            self._files.close()
            self._files = None
        if self._kept is not None:
            self._kept.release()
            self._kept = None

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Key) -> bool:
        return "://" not in os.fspath(checkpoint_id)

    @property
    def digest(self) -> str:
        """Of the manifest, which ranks can compare."""
        return repr(read_small(self._path / DIGEST, MAX_DIGEST_BYTES))

    @property
    def manifest(self) -> Manifest:
        if self._manifest is None:
            self._kept = reading(self._path)  # until `close`, or for as long as this reader lives
            self._manifest = Manifest.read(self._path)
        return self._manifest

    # Named otherwise than torch names them: a **kwargs would be taken for a reader of one manifest a rank.
    def read_metadata(self, *_: Any, **unused: Any) -> Metadata:
        found: dict[str, Any] = {name: BytesStorageMetadata() for name in self.manifest.objects}
        for name, held in self.manifest.tensors.items():
            found[name] = TensorStorageMetadata(
                TensorProperties(DTYPES[held.dtype]),
                torch.Size(held.shape),
                [ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)) for c in held.chunks],
            )
        return Metadata(found)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        self.verify(_blocks(self.manifest, plan.items))
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def verify(self, blocks: _Blocks, progress: Callable[[int], None] | None = None) -> None:
        """Raises ValueError if blocks are not what was saved. Nothing is kept in memory, and the files stay open."""
        self._read(blocks, None, progress)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        targets: dict[int, Tensor] = {}
        for i, item in enumerate(plan.items):
            if item.type == LoadItemType.TENSOR:
                targets[i] = planner.resolve_tensor(item).detach()
                saved = DTYPES[self.manifest.tensors[item.storage_index.fqn].dtype]
                if targets[i].dtype != saved and not self._cast:
                    raise ValueError(
                        f"{item.storage_index.fqn} is {saved} in {self._path} and {targets[i].dtype} here; pass "
                        "cast=True if it is to be converted"
                    )
        for item in plan.items:
            if item.type == LoadItemType.BYTE_IO:
                # Pickled here, for the planner that will unpickle it: no byte of it comes from the file but as JSON.
                value = io.BytesIO()
                torch.save(from_plain(self.manifest.objects[item.storage_index.fqn]), value)
                value.seek(0)
                planner.load_bytes(item, value)
        synchronize(list(targets.values()))
        blocks = _blocks(self.manifest, plan.items)

        def copy(block: _Block, buffer: memoryview) -> None:
            name, _, _ = block
            held = self.manifest.tensors[name]
            values = as_tensor(buffer, DTYPES[held.dtype])
            start = block[2] * self.manifest.block_bytes // values.itemsize
            with torch.no_grad():
                for i in blocks[block]:
                    item = plan.items[i]
                    wanted = Box(tuple(item.storage_offsets), tuple(item.lengths))
                    copy_in(targets[i], wanted, held.chunks[block[1]].sizes, start, values)

        self._read(blocks, copy)
        self.close()
        synchronize(list(targets.values()))
        for i, target in targets.items():
            planner.commit_tensor(plan.items[i], target)
        return finished(None)

    def _read(
        self,
        blocks: _Blocks,
        use: Callable[[_Block, memoryview], None] | None,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Reads and verifies blocks in several threads. Calls ``use`` for every block with its bytes, once they are
        known to be right; where it is None, the bytes are let go of piece by piece."""
        files = self._files = self._files or DataFiles(self._path)
        largest = max((self._place(block)[2] for block in blocks), default=0)
        # A manifest may speak of larger blocks than its tensors have.
        buffers = Buffers(largest if use is not None else min(largest, BLOCK_BYTES))

        def read(block: _Block) -> None:
            chunk, start, nbytes = self._place(block)
            at, total, whole = 0, 0, memoryview(b"")
            while at < nbytes:
                whole = buffers.get(nbytes if use is not None else min(BLOCK_BYTES, nbytes - at))
                try:
                    files.read(chunk.file, start + at, whole)
                except (OSError, ValueError) as error:
                    raise ValueError(f"{self._path / chunk.file} cannot be read: {error}") from error
                total = zlib.crc32(whole, total)
                at += len(whole)
                if progress:
                    progress(len(whole))
            if total != chunk.checksums[block[2]]:
                raise ValueError(
                    f"{self._path / chunk.file} is damaged: the bytes from {start}, of {block[0]}, are not those that "
                    "were saved. Load another checkpoint"
                )
            if use is not None:
                use(block, whole)

        in_threads(read, blocks)

    def _place(self, block: _Block) -> tuple[Chunk, int, int]:
        """The chunk of a block, where the block begins in the chunk's file, and its length in bytes."""
        name, number, index = block
        held, size = self.manifest.tensors[name], self.manifest.block_bytes
        chunk = held.chunks[number]
        nbytes = chunk.box.numel * DTYPES[held.dtype].itemsize
        return chunk, chunk.start + index * size, min(size, nbytes - index * size)

    def fetch(self, name: str) -> Tensor:
        """A small tensor, whole and verified."""
        held = self.manifest.tensors[name]
        if held.nbytes > BLOCK_BYTES:
            raise ValueError(f"{name} has {held.nbytes} bytes; expected a small tensor")
        try:
            found = torch.empty(held.shape, dtype=DTYPES[held.dtype])
        except RuntimeError as error:  # extents too large for torch, of which one is 0
            raise ValueError(f"{name} cannot be a tensor of shape {held.shape}: {error}") from error

        def copy(block: _Block, buffer: memoryview) -> None:
            box = held.chunks[block[1]].box
            values = as_tensor(buffer, found.dtype)
            copy_in(found[box.slices()], Box((0,) * len(box.sizes), box.sizes), box.sizes,
                    block[2] * self.manifest.block_bytes // found.itemsize, values)  # fmt: skip

        self._read(self._blocks_of(name), copy)
        return found

    def every_block(self) -> _Blocks:
        """All of the checkpoint."""
        return {block: of for name in self.manifest.tensors for block, of in self._blocks_of(name).items()}

    def _blocks_of(self, name: str) -> _Blocks:
        chunks = enumerate(self.manifest.tensors[name].chunks)
        return {(name, number, index): [] for number, chunk in chunks for index in range(len(chunk.checksums))}


_Block = tuple[str, int, int]  # a tensor's name, the number of a chunk of it, and of a block of that
_Blocks = dict[_Block, list[int]]  # with the numbers of the read items that need it


def _blocks(manifest: Manifest, items: list[ReadItem]) -> _Blocks:
    """The blocks in which the items' elements lie."""
    blocks: _Blocks = {}
    for i, item in enumerate(items):
        if item.type != LoadItemType.TENSOR:
            continue
        index: MetadataIndex = item.storage_index
        held = manifest.tensors[index.fqn]
        number = index.index
        if number is None or held.chunks[number].offsets != tuple(index.offset or ()):
            number = [chunk.offsets for chunk in held.chunks].index(tuple(index.offset or ()))
        start, stop = Box(tuple(item.storage_offsets), tuple(item.lengths)).hull(held.chunks[number].sizes)
        itemsize = DTYPES[held.dtype].itemsize
        if start < stop:
            for block in range(start * itemsize // manifest.block_bytes, -(-stop * itemsize // manifest.block_bytes)):
                blocks.setdefault((index.fqn, number, block), []).append(i)
    return blocks
