"""Reads a checkpoint through torch.distributed.checkpoint's interfaces; see writer.py.

    dcp.load(state, storage_reader=Reader("runs/step-100"))

[Note: Verified before loaded]
Each rank reads and verifies everything that it will need while it plans, and torch lets no rank load before every rank
has planned. So if anything is damaged, nothing has been changed. (One check comes later: torch's plan does not contain
the dtypes of the targets, so a rank notices a different dtype while it loads. lion_dist.checkpoint.load compares dtypes
before.) The files stay open in between, so a checkpoint that is renamed or removed meanwhile can be read to its end.
"""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

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
from ..update.state import EXP_AVG
from .blocks import Buffers, as_tensor, copy_in, in_threads, synchronize
from .codes import PIECE
from .conversions import Conversion, Where, cast
from .files import DIGEST, MAX_DIGEST_BYTES, DataFiles, read_small
from .folders import Key, local_path
from .json_values import from_json
from .locks import FileLock, lock_for_reading
from .manifest import BLOCK_BYTES, Chunk, Manifest


class Block(NamedTuple):
    """A block of a stored tensor.

    Attributes:
        tensor: key of the tensor.
        chunk: index of the chunk in the tensor.
        number: index of the block in the chunk.
    """

    tensor: str
    chunk: int
    number: int


class Reader(StorageReader):
    """Reads a checkpoint that `Writer` wrote.

    Args:
        path: the checkpoint's folder.
        cast: load tensors into targets of another dtype too, but for momenta (``exp_avg``) from or to 8-bit codes.
            Otherwise a different dtype is an error.
    """

    def __init__(self, path: Key, *, cast: bool = False) -> None:
        self._cast = cast
        self.reset(path)

    def reset(self, checkpoint_id: Key | None = None) -> None:
        if checkpoint_id is not None:
            self._path = local_path(checkpoint_id)
        self._manifest: Manifest | None = None
        self._files: DataFiles | None = None
        self._lock: FileLock | None = None
        self._conversions: dict[str, Conversion] = {}
        self._origins: dict[str, str] = {}

    def close(self) -> None:
        """Closes the data files, which are opened again when needed, and lets ``keep_last`` remove the checkpoint."""
        if self._files is not None:
            self._files.close()
            self._files = None
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Key) -> bool:
        return "://" not in os.fspath(checkpoint_id)

    def open(self) -> Manifest:
        """Reads and checks the manifest, unless that is done. ``keep_last`` does not remove the checkpoint before
        `close`, or as long as this reader lives.

        Raises:
            FileNotFoundError, ValueError: as `Manifest.read`.
        """
        if self._manifest is None:
            self._lock = lock_for_reading(self._path)
            self._manifest = Manifest.read(self._path)
        return self._manifest

    @property
    def manifest(self) -> Manifest:
        """The checkpoint's manifest; see `open`."""
        return self.open()

    @property
    def digest(self) -> str:
        """The content of manifest.sha256. If it is the same on all ranks, they read the same checkpoint."""
        return repr(read_small(self._path / DIGEST, MAX_DIGEST_BYTES))

    def verify(self) -> None:
        """Reads every byte of the checkpoint and compares it with the checksums. Nothing is kept in memory.

        Raises:
            ValueError: some bytes are not those that were saved.
        """
        self._read([block for name in self.manifest.tensors for block in self._blocks_of(name)], None)

    def convert(self, name: str, conversion: Conversion, origin: str | None = None) -> None:
        """Makes `read_items` convert the elements of a tensor. Their dtypes are then not compared.

        Args:
            name: key of the tensor.
            conversion: converts elements.
            origin: key of the tensor that is converted, if it has another one. Then ``name`` is added to the manifest.
        """
        self._conversions[name] = conversion
        if origin is not None:
            self.manifest.tensors[name] = self.manifest.tensors[origin]
            self._origins[name] = origin

    def fetch(self, name: str, limit: int = BLOCK_BYTES) -> Tensor:
        """Reads and verifies a whole tensor.

        Args:
            name: key of a tensor.
            limit: largest number of bytes that it may have.

        Returns:
            The tensor, on the CPU.

        Raises:
            ValueError: the tensor is too large or damaged.
        """
        entry = self.manifest.tensors[name]
        if entry.nbytes > limit:
            raise ValueError(f"{name} has {entry.nbytes} bytes; expected at most {limit}")
        try:
            found = torch.empty(entry.shape, dtype=entry.torch_dtype, device="cpu")
        except RuntimeError as error:  # an empty tensor, one of whose extents is too large for torch
            raise ValueError(f"{name} cannot be a tensor of shape {entry.shape}: {error}") from error

        def copy(block: Block, buffer: memoryview) -> None:
            box = entry.chunks[block.chunk].box
            self._copy(block, buffer, found[box.slices()], Box((0,) * len(box.sizes), box.sizes))

        self._read(self._blocks_of(name), copy)
        return found

    def scan(self, name: str, check: Callable[[Tensor], None]) -> None:
        """Reads and verifies a whole tensor block by block.

        Args:
            name: key of a tensor.
            check: is called with the elements of each block, 1-D, from several threads.
        """
        dtype = self.manifest.tensors[name].torch_dtype
        self._read(self._blocks_of(name), lambda _, buffer: check(as_tensor(buffer, dtype)))

    # Methods that torch.distributed.checkpoint calls ----------------------------------------------

    # torch passes keyword arguments to readers that have a parameter called kwargs, and expects them to read one
    # metadata file per rank: so it must have another name.
    def read_metadata(self, *_: Any, **unused: Any) -> Metadata:
        found: dict[str, Any] = {name: BytesStorageMetadata() for name in self.manifest.objects}
        for name, entry in self.manifest.tensors.items():
            found[name] = TensorStorageMetadata(
                TensorProperties(entry.torch_dtype),
                torch.Size(entry.shape),
                [ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)) for c in entry.chunks],
            )
        return Metadata(found)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Verifies what this rank will read: see [Note: Verified before loaded]."""
        self._read(self._needed(plan.items), None)
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        self.read_items(plan.items, planner)
        self.close()
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def read_items(self, items: list[ReadItem], planner: LoadPlanner) -> None:
        """Reads some items of a plan; the data files stay open."""
        targets: dict[int, Tensor] = {}
        for i, item in enumerate(items):
            if item.type == LoadItemType.TENSOR:
                targets[i] = planner.resolve_tensor(item).detach()
                self._check_dtype(item.storage_index.fqn, targets[i].dtype)
        for item in items:
            if item.type == LoadItemType.BYTE_IO:
                # The planner will unpickle this. It was pickled here: the file itself holds nothing but JSON.
                value = io.BytesIO()
                torch.save(from_json(self.manifest.objects[item.storage_index.fqn]), value)
                value.seek(0)
                planner.load_bytes(item, value)
        synchronize(list(targets.values()))
        needed = self._needed(items)

        def copy(block: Block, buffer: memoryview) -> None:
            with torch.no_grad():
                for i in needed[block]:
                    item = items[i]
                    wanted = Box(tuple(item.storage_offsets), tuple(item.lengths))
                    self._copy(block, buffer, targets[i], wanted, self._conversions.get(item.storage_index.fqn))

        self._read(needed, copy)
        synchronize(list(targets.values()))
        for i, target in targets.items():
            planner.commit_tensor(items[i], target)

    def _check_dtype(self, name: str, dtype: torch.dtype) -> None:
        """Raises ValueError where a tensor cannot be read into a target of this dtype."""
        saved = self.manifest.tensors[name].torch_dtype
        if dtype == saved or name in self._conversions:
            return
        found = f"{name} is {saved} in {self._path} and {dtype} here"
        if name.rpartition(".")[2] == EXP_AVG and torch.int8 in (saved, dtype):
            raise ValueError(
                f"{found}: one of the two is the codes of a momentum in 8 bits, which have scales, and no cast reads "
                'them. Load into an optimizer that has momentum_dtype="int8" exactly if the saved one had it, whose '
                "state_dict another one then loads and converts, or use lion_dist.checkpoint.load, which converts them"
            )
        if not self._cast:
            raise ValueError(f"{found}; pass cast=True to convert it")

    # Blocks ---------------------------------------------------------------------------------------

    def _blocks_of(self, name: str) -> list[Block]:
        chunks = enumerate(self.manifest.tensors[name].chunks)
        return [Block(name, i, number) for i, chunk in chunks for number in range(len(chunk.checksums))]

    def _needed(self, items: list[ReadItem]) -> dict[Block, list[int]]:
        """The blocks in which the items' elements lie, each with the indices of the items that need it."""
        needed: dict[Block, list[int]] = {}
        for i, item in enumerate(items):
            if item.type != LoadItemType.TENSOR:
                continue
            index: MetadataIndex = item.storage_index
            name = self._origins.get(index.fqn, index.fqn)  # so that a block that two need is read once
            entry = self.manifest.tensors[name]
            offsets, chunk = tuple(index.offset or ()), index.index
            if chunk is None or entry.chunks[chunk].offsets != offsets:
                chunk = [chunk.offsets for chunk in entry.chunks].index(offsets)
            start, stop = Box(tuple(item.storage_offsets), tuple(item.lengths)).hull(entry.chunks[chunk].sizes)
            if start < stop:
                size = self.manifest.block_bytes
                for number in range(start * entry.itemsize // size, -(-stop * entry.itemsize // size)):
                    needed.setdefault(Block(name, chunk, number), []).append(i)
        return needed

    def _copy(
        self, block: Block, buffer: memoryview, target: Tensor, wanted: Box, conversion: Conversion | None = None
    ) -> None:
        """Copies or converts what a block has of the box ``wanted`` of its chunk into ``target``."""
        entry = self.manifest.tensors[block.tensor]
        start, values = block.number * self.manifest.block_bytes // entry.itemsize, as_tensor(buffer, entry.torch_dtype)
        chunk = entry.chunks[block.chunk]
        if conversion is None and target.dtype == values.dtype:
            copy_in(target, wanted, chunk.sizes, start, values)
            return
        first, last = wanted.hull(chunk.sizes)
        for at in range(0, values.numel(), PIECE):
            piece, begin = values[at : at + PIECE], start + at
            if begin < last and begin + piece.numel() > first:
                if conversion is not None:
                    piece = conversion(piece, Where(entry.shape, chunk.offsets, chunk.sizes, begin))
                copy_in(target, wanted, chunk.sizes, begin, cast(piece, target.dtype))

    def _read(self, blocks: Iterable[Block], use: Callable[[Block, memoryview], None] | None) -> None:
        """Reads and verifies blocks in several threads.

        Args:
            blocks: the blocks to read.
            use: is called with each block and its bytes once these are verified. None: the bytes are verified piece by
                piece and dropped.
        """
        blocks = list(blocks)
        files = self._files = self._files or DataFiles(self._path)
        largest = max((self._range(block)[2] for block in blocks), default=0)
        # A manifest may claim larger blocks than its tensors have.
        buffers = Buffers(largest if use is not None else min(largest, BLOCK_BYTES))

        def read(block: Block) -> None:
            chunk, start, nbytes = self._range(block)
            at, crc, buffer = 0, 0, memoryview(b"")
            while at < nbytes:
                buffer = buffers.get(nbytes if use is not None else min(BLOCK_BYTES, nbytes - at))
                try:
                    files.read(chunk.file, start + at, buffer)
                except (OSError, ValueError) as error:
                    raise ValueError(f"{self._path / chunk.file} cannot be read: {error}") from error
                crc = zlib.crc32(buffer, crc)
                at += len(buffer)
            if crc != chunk.checksums[block.number]:
                raise ValueError(
                    f"{self._path / chunk.file} is damaged: the bytes of {block.tensor} from position {start} on are "
                    "not those that were saved. Load another checkpoint"
                )
            if use is not None:
                use(block, buffer)

        in_threads(read, blocks)

    def _range(self, block: Block) -> tuple[Chunk, int, int]:
        """The chunk of a block, the position of the block in the chunk's file, and its length in bytes."""
        entry, size = self.manifest.tensors[block.tensor], self.manifest.block_bytes
        chunk = entry.chunks[block.chunk]
        nbytes = chunk.box.numel * entry.itemsize
        return chunk, chunk.start + block.number * size, min(size, nbytes - block.number * size)
