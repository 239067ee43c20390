"""Writes a checkpoint through torch.distributed.checkpoint's interfaces: raw bytes, a manifest in JSON, no pickle.

    dcp.save(state, storage_writer=Writer("runs/step-100"))

Each rank copies, sums and writes block by block. Values that are not tensors go into the manifest (see plain.py).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from . import folders
from .blocks import Buffers, checksum, copy_out, finished, in_threads, synchronize, write_block
from .folders import BEFORE, RUN, Key, Run, Unfinished, local_path
from .manifest import BLOCK_BYTES, DIGEST, NAME, Chunk, Manifest, TensorEntry, data_name, read_small, size_of
from .plain import DTYPES, dtype_name, to_plain


@dataclass(frozen=True)
class _DataFile:
    """Where a rank writes: the coordinator's decision, sent with the plan."""

    folder: str
    file: str


class Writer(StorageWriter):
    """Writes one checkpoint, which appears at ``path`` once it is whole.

    Args:
        path: a folder that does not exist, on a file system that all ranks share.
        keep_last: how many of the checkpoints of this run stay, of those in the same folder whose names differ from
            this one's in the number at the end; see `lion_dist.checkpoint.save`. It needs ``run``. None: all.
        run: a name of the training that saves, which it keeps over restarts and shares with no other.
        progress: called from several threads with the bytes that this rank has written, block by block.

    Attributes:
        unfinished: on the first rank, the folder written to, until it is renamed.

    Several may write at the same time, to different paths. Two to one path: one of them raises FileExistsError. Where
    several ranks save, calls of torch's dcp.async_save that overlap need a process group each, since their collectives
    would mix.
    """

    def __init__(
        self,
        path: Key,
        *,
        keep_last: int | None = None,
        run: str | Run | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        if keep_last is not None and keep_last < 1:
            raise ValueError(f"keep_last must be at least 1 or None, got {keep_last}")
        if keep_last is not None and run is None:
            raise ValueError(
                "keep_last removes older checkpoints of the same run alone, and needs to know which these are: pass "
                'run="...", a name that this training keeps over restarts and shares with no other'
            )
        self._keep_last, self._run = keep_last, Run(run) if isinstance(run, str) else run
        self._progress = progress
        self.unfinished: Unfinished | None = None
        self.reset(path)

    def reset(self, checkpoint_id: Key | None = None) -> None:
        self.abandon()  # what a save that failed has left
        if checkpoint_id is not None:
            self._path = local_path(checkpoint_id)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Key) -> bool:
        return "://" not in os.fspath(checkpoint_id)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if not kwargs.get("use_collectives", True):
            raise ValueError("lion_dist's checkpoints have one manifest, so they need use_collectives=True")

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        self.unfinished = Unfinished.make(self._path, self._run)
        folder = str(self.unfinished.folder)
        places = (_DataFile(folder, data_name(rank)) for rank in range(len(plans)))
        return [replace(plan, storage_data=place) for plan, place in zip(plans, places, strict=True)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        place: _DataFile = plan.storage_data
        results, tensors = [], []
        for item in plan.items:
            if item.type == WriteItemType.BYTE_IO:
                results.append(WriteResult(item.index, 0, _as_text(item, planner)))
            else:
                tensors.append(item)
        if tensors:
            results += self._write(Path(place.folder) / place.file, tensors, planner)
        return finished(results)

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
        try:
            opened = path.open("xb")
        except FileNotFoundError as error:
            raise folders.vanished(path.parent) from error
        with opened as file:
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
        try:
            manifest = self._manifest(metadata, results)
            text = manifest.dumps()
            digest = f"{hashlib.sha256(text).hexdigest()}  {NAME}\n".encode()
            self._check_sizes(self.unfinished.folder, manifest.files)
            self.unfinished.write_manifest(text)
            folders.write_durably(self.unfinished.folder / DIGEST, digest)
            self.unfinished.commit()
            # Still under the lock: what is there now must be what was written here.
            if read_small(self._path / DIGEST) != digest:
                raise OSError(f"{self._path} has been replaced since it was saved, by another process. Save again")
            self._check_sizes(self._path, manifest.files)
        except BaseException as error:
            self.abandon()
            if isinstance(error, FileNotFoundError) and error.filename is not None:
                raise folders.vanished(Path(error.filename)) from error
            raise
        self.release()
        if self._keep_last is not None:
            assert self._run is not None
            folders.keep_last(self._path, self._keep_last, self._run)

    def _manifest(self, metadata: Metadata, results: list[list[WriteResult]]) -> Manifest:
        files: dict[str, int] = {}
        objects: dict[str, Any] = {} if self._run is None else {RUN: self._run.name}
        if self._run is not None and self._run.before:
            objects[BEFORE] = list(self._run.before)
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
            tensors[name] = TensorEntry(dtypes[name].pop(), tuple(known.size), tuple(of_tensor))
        manifest = Manifest(files, tensors, objects, BLOCK_BYTES)
        manifest.check()
        return manifest

    def _check_sizes(self, folder: Path, sizes: dict[str, int]) -> None:
        for name, size in sizes.items():
            there = size_of(folder / name)
            if there != size:
                raise ValueError(f"{name} has {there} bytes here, not {size}: is {self._path.parent} shared?")

    def abandon(self) -> None:
        """Removes what has been written, on the first rank, once no rank writes any more."""
        if self.unfinished is not None:
            self.unfinished.discard()
            self.unfinished = None

    def release(self) -> None:
        """Ends the lock and removes nothing: what is unfinished is left to a later save."""
        if self.unfinished is not None:
            self.unfinished.lock.release()
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
