"""The storage, through torch.distributed.checkpoint's interfaces: raw bytes, a manifest in JSON, no pickle.

    dcp.save(state, storage_writer=Writer("runs/step-100"))
    dcp.load(state, storage_reader=Reader("runs/step-100"))

Values that are not tensors go into the manifest (see plain.py). Writing, each rank copies, sums and writes block by
block. Reading, each rank first reads and verifies all that it will need while it plans, and torch lets no rank go on
to load before every rank has planned: so whatever is damaged, nothing has been changed.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
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
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from ..sharding.boxes import Box
from . import folders
from .blocks import Buffers, as_tensor, checksum, copy_in, copy_out, in_threads, read_block, write_block
from .manifest import BLOCK_BYTES, DIGEST, NAME, Chunk, Held, Manifest, RegularFile, data_name, read_small, size_of
from .plain import DTYPES, dtype_name, from_plain, to_plain

Key = str | os.PathLike[str]


def _finished(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


def synchronize(tensors: list[Tensor]) -> None:
    """Waits for the devices, so that other threads may read and write these tensors, or have."""
    for device in {t.device for t in tensors if t.is_cuda}:
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class _Place:
    """Where a rank writes: the coordinator's decision, sent with the plan."""

    folder: str
    file: str


class Writer(StorageWriter):
    """Writes one checkpoint, which appears at ``path`` once it is whole.

    Args:
        path: a folder that does not exist, on a file system that all ranks share.
        keep_last: how many of the checkpoints in the same folder stay; see `folders.keep_last`. None: all.
        progress: called from several threads with the bytes that this rank has written, block by block.

    Attributes:
        unfinished: on the first rank, the folder written to, until it is renamed.
    """

    def __init__(
        self, path: Key, *, keep_last: int | None = None, progress: Callable[[int], None] | None = None
    ) -> None:
        if keep_last is not None and keep_last < 1:
            raise ValueError(f"keep_last must be at least 1 or None, got {keep_last}")
        self._keep_last = keep_last
        self._progress = progress
        self.reset(path)

    def reset(self, checkpoint_id: Key | None = None) -> None:
        if checkpoint_id is not None:
            self._path = Path(os.path.abspath(checkpoint_id))
        self.unfinished: Path | None = None

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Key) -> bool:
        return "://" not in os.fspath(checkpoint_id)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if not kwargs.get("use_collectives", True):
            raise ValueError("lion_dist's checkpoints have one manifest, so they need use_collectives=True")

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        self.unfinished = folders.new_unfinished(self._path)
        places = (_Place(str(self.unfinished), data_name(rank)) for rank in range(len(plans)))
        return [replace(plan, storage_data=place) for plan, place in zip(plans, places, strict=True)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        place: _Place = plan.storage_data
        results, tensors = [], []
        for item in plan.items:
            if item.type == WriteItemType.BYTE_IO:
                results.append(WriteResult(item.index, 0, _as_text(item, planner)))
            else:
                tensors.append(item)
        if tensors:
            results += self._write(Path(place.folder) / place.file, tensors, planner)
        return _finished(results)

    def _write(self, path: Path, items: list[WriteItem], planner: SavePlanner) -> list[WriteResult]:
        found: list[Tensor] = []
        chunks: list[Chunk] = []
        jobs: list[tuple[int, int]] = []  # number of the item, number of the block in it
        end = 0
        for i, item in enumerate(items):
            assert item.tensor_data is not None
            tensor = planner.resolve_data(item)
            assert isinstance(tensor, Tensor)
            tensor = tensor.detach()
            if dtype_name(tensor.dtype) not in DTYPES:
                raise TypeError(f"{item.index.fqn} is of {tensor.dtype}, which a checkpoint cannot hold")
            chunk = item.tensor_data.chunk
            blocks = -(-tensor.nbytes // BLOCK_BYTES)
            chunks.append(Chunk(tuple(chunk.offsets), tuple(chunk.sizes), path.name, end, (0,) * blocks))
            found.append(tensor)
            jobs += [(i, block) for block in range(blocks)]
            end += tensor.nbytes
        synchronize(found)
        sums = [[0] * len(chunk.checksums) for chunk in chunks]
        buffers = Buffers(BLOCK_BYTES)
        with path.open("xb") as file:
            fd = file.fileno()

            def write(job: tuple[int, int]) -> None:
                i, block = job
                tensor, begin = found[i], block * BLOCK_BYTES
                buffer = buffers.get(min(BLOCK_BYTES, tensor.nbytes - begin))
                with torch.no_grad():
                    copy_out(tensor, begin // tensor.itemsize, buffer)
                sums[i][block] = checksum(buffer)
                write_block(fd, chunks[i].start + begin, buffer)
                if self._progress:
                    self._progress(len(buffer))

            in_threads(write, jobs)
            os.fsync(fd)
        return [
            WriteResult(item.index, t.nbytes, (dtype_name(t.dtype), replace(chunk, checksums=tuple(of_blocks))))
            for item, t, chunk, of_blocks in zip(items, found, chunks, sums, strict=True)
        ]

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        assert self.unfinished is not None
        files: dict[str, int] = {}
        objects: dict[str, Any] = {}
        chunks: dict[str, list[Chunk]] = {}
        dtypes: dict[str, set[str]] = {}
        for of_rank in results:
            for result in of_rank:
                name = result.index.fqn
                if isinstance(result.storage_data, str):
                    objects[name] = json.loads(result.storage_data)
                    continue
                dtype, chunk = result.storage_data
                dtypes.setdefault(name, set()).add(dtype)
                chunks.setdefault(name, []).append(chunk)
                files[chunk.file] = max(files.get(chunk.file, 0), chunk.start + result.size_in_bytes)
        mixed = {name: of for name, of in dtypes.items() if len(of) > 1}
        if mixed:
            raise ValueError(f"tensors of different dtypes on the ranks: {mixed}")
        tensors = {}
        for name, of_tensor in chunks.items():
            known = metadata.state_dict_metadata[name]
            assert isinstance(known, TensorStorageMetadata)
            tensors[name] = Held(dtypes[name].pop(), tuple(known.size), tuple(of_tensor))
        manifest = Manifest(files, tensors, objects, BLOCK_BYTES)
        manifest.check()
        for name, size in files.items():
            there = size_of(self.unfinished / name)
            if there != size:
                raise ValueError(f"{name} has {there} bytes here, not {size}: is {self._path.parent} shared?")
        text = manifest.dumps()
        folders.write_durably(self.unfinished / NAME, text)
        folders.write_durably(self.unfinished / DIGEST, f"{hashlib.sha256(text).hexdigest()}  {NAME}\n".encode())
        folders.commit(self.unfinished, self._path)
        self.unfinished = None
        if self._keep_last is not None:
            folders.keep_last(self._path, self._keep_last)

    def abandon(self) -> None:
        """Removes what has been written, on the first rank, once no rank writes any more."""
        if self.unfinished is not None:
            shutil.rmtree(self.unfinished, ignore_errors=True)
            self.unfinished = None


def _as_text(item: WriteItem, planner: SavePlanner) -> str:
    """The value behind an item, as it goes into the manifest; without resolve_data, which would pickle it."""
    look_up = getattr(planner, "lookup_object", None)
    if look_up is None:
        raise TypeError(
            f"{type(planner).__name__} has no lookup_object(), by which values that are no tensors ({item.index.fqn}) "
            "are got at without pickle: use torch's DefaultSavePlanner or a subclass of it"
        )
    return json.dumps(to_plain(look_up(item.index), item.index.fqn), allow_nan=False)


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
            self._path = Path(os.path.abspath(checkpoint_id))
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
        return _finished(None)

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
