"""Reads a checkpoint through torch.distributed.checkpoint's interfaces; see writer.py.

    dcp.load(state, storage_reader=Reader("runs/step-100"))

Each rank first reads and verifies all that it will need while it plans, and torch lets no rank go on to load before
every rank has planned: so whatever is damaged, nothing has been changed. (Only of dtypes that differ, which torch's
plan does not tell of, a rank learns as it loads; lion_dist.checkpoint.load compares them before.)
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
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
from .blocks import Buffers, as_tensor, checksum, copy_in, finished, in_threads, read_block, synchronize
from .folders import Key, local_path, reading
from .manifest import BLOCK_BYTES, DIGEST, Manifest, RegularFile, read_small
from .plain import DTYPES, from_plain


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

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Key) -> bool:
        return "://" not in os.fspath(checkpoint_id)

    @property
    def digest(self) -> str:
        """Of the manifest, which ranks can compare."""
        return read_small(self._path / DIGEST).decode(errors="replace")

    @property
    def manifest(self) -> Manifest:
        if self._manifest is None:
            self._lock = reading(self._path)  # for as long as this reader lives
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
        """Raises ValueError if blocks are not what was saved. Nothing is kept in memory."""

        def look(_: _Block, buffer: memoryview) -> None:
            if progress:
                progress(len(buffer))

        self._read(blocks, look)

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
        synchronize(list(targets.values()))
        for i, target in targets.items():
            planner.commit_tensor(plan.items[i], target)
        return finished(None)

    def _read(self, blocks: _Blocks, use: Callable[[_Block, memoryview], None]) -> None:
        """Calls ``use``, from several threads, for every block with its bytes, once they are known to be right."""
        size = self.manifest.block_bytes
        buffers, lock = Buffers(size), Lock()
        opened: dict[str, RegularFile] = {}

        def read(block: _Block) -> None:
            name, number, index = block
            held = self.manifest.tensors[name]
            chunk = held.chunks[number]
            nbytes = chunk.box.numel * DTYPES[held.dtype].itemsize
            buffer = buffers.get(min(size, nbytes - index * size))
            with lock:
                if chunk.file not in opened:
                    opened[chunk.file] = RegularFile(self._path / chunk.file)
            try:
                read_block(opened[chunk.file].fd, chunk.start + index * size, buffer)
            except (OSError, ValueError) as error:
                raise ValueError(f"{self._path / chunk.file} cannot be read: {error}") from error
            if checksum(buffer) != chunk.checksums[index]:
                raise ValueError(
                    f"{self._path / chunk.file} is damaged: the bytes from {chunk.start + index * size}, of {name}, "
                    "are not those that were saved. Load another checkpoint"
                )
            use(block, buffer)

        try:
            in_threads(read, blocks)
        finally:
            for file in opened.values():
                file.close()

    def fetch(self, name: str) -> Tensor:
        """A small tensor, whole and verified."""
        held = self.manifest.tensors[name]
        if held.nbytes > BLOCK_BYTES:
            raise ValueError(f"{name} has {held.nbytes} bytes; expected a small tensor")
        found = torch.empty(held.shape, dtype=DTYPES[held.dtype])

        def copy(block: _Block, buffer: memoryview) -> None:
            box = held.chunks[block[1]].box
            values = as_tensor(buffer, found.dtype)
            copy_in(found[box.slices()], Box((0,) * len(box.sizes), box.sizes), box.sizes,
                    block[2] * self.manifest.block_bytes // found.itemsize, values)  # fmt: skip

        self._read({block: [] for block in self.every_block() if block[0] == name}, copy)
        return found

    def every_block(self) -> _Blocks:
        """All of the checkpoint."""
        return {
            (name, number, index): []
            for name, held in self.manifest.tensors.items()
            for number, chunk in enumerate(held.chunks)
            for index in range(len(chunk.checksums))
        }


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
