"""Writes a checkpoint through torch.distributed.checkpoint's interfaces: raw bytes and a manifest in JSON, no pickle.

    dcp.save(state, storage_writer=Writer("runs/step-100"))

Each rank copies, checksums and writes its tensors block by block. Values that are not tensors go into the manifest; see
json_values.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
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

from ..dtypes import DTYPES, dtype_name
from .blocks import Buffers, copy_out, in_threads, synchronize
from .computed import ComputedPart
from .files import DIGEST, MANIFEST, data_name, read_small, size_of, write_block, write_durably
from .folders import Key, local_path
from .json_values import to_json
from .manifest import BLOCK_BYTES, Chunk, Manifest, TensorEntry
from .retention import keep_last
from .runs import Run
from .unfinished import Unfinished, vanished


@dataclass(frozen=True)
class _DataFile:
    """The file that a rank writes. The coordinator chooses it and sends it with the plan."""

    folder: str
    name: str


class Writer(StorageWriter):
    """Writes one checkpoint, which appears at ``path`` once it is whole.

    Several writers may write to different paths at the same time. If two write to one path, one of them
    raises FileExistsError. If several ranks save, overlapping calls of torch's dcp.async_save need one process group
    each, because their collectives would mix.

    Args:
        path: a folder that does not exist, on a file system that all ranks share.
        keep_last: number of checkpoints of this run to keep, among those in the same folder whose names differ from
            this one's only in the number at the end; see `lion_dist.checkpoint.save`. It needs ``run``. None keeps all.
        run: a name for the training that saves. The training keeps it over restarts and shares it with no other.
        progress: called from several threads with the number of bytes of each block that this rank has written.

    Attributes:
        unfinished: on the first rank, the folder that is written to, until it is renamed.
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
                "keep_last removes only older checkpoints of the same run, and needs to know which these are: pass "
                'run="...", a name that this training keeps over restarts and shares with no other'
            )
        self._keep_last, self._run = keep_last, Run(run) if isinstance(run, str) else run
        self._progress = progress
        self.unfinished: Unfinished | None = None
        self.reset(path)

    # Methods that torch.distributed.checkpoint calls ----------------------------------------------

    def reset(self, checkpoint_id: Key | None = None) -> None:
        self.abandon()  # what a failed save has left
        if checkpoint_id is not None:
            self._path = local_path(checkpoint_id)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Key) -> bool:
        return "://" not in os.fspath(checkpoint_id)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if not kwargs.get("use_collectives", True):
            raise ValueError("lion_dist's checkpoints have one manifest for all ranks: use_collectives must be True")

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        self.unfinished = Unfinished.make(self._path, None if self._run is None else self._run.token)
        folder = str(self.unfinished.folder)
        files = (_DataFile(folder, data_name(rank)) for rank in range(len(plans)))
        return [replace(plan, storage_data=file) for plan, file in zip(plans, files, strict=True)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        file: _DataFile = plan.storage_data
        results, tensors = [], []
        for item in plan.items:
            if item.type == WriteItemType.BYTE_IO:
                results.append(WriteResult(item.index, 0, _value_text(item, planner)))
            else:
                tensors.append(item)
        if tensors:
            results += self._write(Path(file.folder) / file.name, tensors, planner)
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        assert self.unfinished is not None
        try:
            manifest = self._manifest(metadata, results)
            text = manifest.dumps()
            digest = f"{hashlib.sha256(text).hexdigest()}  {MANIFEST}\n".encode()
            self._check_sizes(self.unfinished.folder, manifest.files)
            self.unfinished.write_manifest(text)
            write_durably(self.unfinished.folder / DIGEST, digest)
            self.unfinished.commit()
            # Still under the lock: what is at the path now must be what was written here.
            if read_small(self._path / DIGEST) != digest:
                raise OSError(f"another process has replaced {self._path} since it was saved. Save again")
            self._check_sizes(self._path, manifest.files)
        except BaseException as error:
            self.abandon()
            if isinstance(error, FileNotFoundError) and error.filename is not None:
                raise vanished(Path(error.filename)) from error
            raise
        self.release()
        if self._keep_last is not None:
            assert self._run is not None
            keep_last(self._path, self._keep_last, self._run)

    # ----------------------------------------------------------------------------------------------

    def abandon(self) -> None:
        """Removes what has been written, on the first rank. No rank may be writing any more."""
        if self.unfinished is not None:
            self.unfinished.discard()
            self.unfinished = None

    def release(self) -> None:
        """Releases the lock without removing anything: a later save sweeps what is unfinished."""
        if self.unfinished is not None:
            self.unfinished.lock.release()
            self.unfinished = None

    def _write(self, path: Path, items: list[WriteItem], planner: SavePlanner) -> list[WriteResult]:
        """Writes the tensors of these items one after another into a new file, in several threads."""
        tensors: list[Tensor | ComputedPart] = []
        chunks: list[Chunk] = []
        jobs: list[tuple[int, int]] = []  # index of the item, index of the block in it
        end = 0
        for i, item in enumerate(items):
            tensor, box = _tensor_of(item, planner)
            blocks = -(-tensor.nbytes // BLOCK_BYTES)
            chunks.append(Chunk(*box, path.name, end, (0,) * blocks))
            tensors.append(tensor)
            jobs += [(i, block) for block in range(blocks)]
            end += tensor.nbytes
        synchronize(tensors)
        checksums = [[0] * len(chunk.checksums) for chunk in chunks]
        buffers = Buffers(BLOCK_BYTES)
        try:
            opened = path.open("xb")
        except FileNotFoundError as error:
            raise vanished(path.parent) from error
        with opened as file:
            fd = file.fileno()

            def write(job: tuple[int, int]) -> None:
                i, block = job
                tensor, begin = tensors[i], block * BLOCK_BYTES
                buffer = buffers.get(min(BLOCK_BYTES, tensor.nbytes - begin))
                with torch.no_grad():
                    copy_out(tensor, begin // tensor.itemsize, buffer)
                checksums[i][block] = zlib.crc32(buffer)
                write_block(fd, chunks[i].start + begin, buffer)
                if self._progress:
                    self._progress(len(buffer))

            in_threads(write, jobs)
            os.fsync(fd)
        return [
            WriteResult(item.index, t.nbytes, (dtype_name(t.dtype), replace(chunk, checksums=tuple(of_blocks))))
            for item, t, chunk, of_blocks in zip(items, tensors, chunks, checksums, strict=True)
        ]

    def _manifest(self, metadata: Metadata, results: list[list[WriteResult]]) -> Manifest:
        files: dict[str, int] = {}
        objects: dict[str, Any] = {} if self._run is None else self._run.as_objects()
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
            raise ValueError(f"tensors have different dtypes on different ranks: {mixed}")
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
            found = size_of(folder / name)
            if found != size:
                raise ValueError(
                    f"{name} has {found} bytes as this rank sees it, not {size}: do all ranks share the file system of "
                    f"{self._path.parent}?"
                )


def _tensor_of(
    item: WriteItem, planner: SavePlanner
) -> tuple[Tensor | ComputedPart, tuple[tuple[int, ...], tuple[int, ...]]]:
    """The tensor of an item, and its box (offsets, sizes) in the whole tensor."""
    assert item.tensor_data is not None
    tensor: Any = planner.resolve_data(item)
    assert isinstance(tensor, (Tensor, ComputedPart))
    if dtype_name(tensor.dtype) not in DTYPES:
        raise TypeError(f"{item.index.fqn} has dtype {tensor.dtype}, which a checkpoint cannot hold")
    chunk = item.tensor_data.chunk
    return tensor.detach() if isinstance(tensor, Tensor) else tensor, (tuple(chunk.offsets), tuple(chunk.sizes))


def _value_text(item: WriteItem, planner: SavePlanner) -> str:
    """The value of an item as JSON. Not by the planner's resolve_data, which would pickle it."""
    look_up = getattr(planner, "lookup_object", None)
    if look_up is None:
        raise TypeError(
            f"{type(planner).__name__} has no lookup_object(), which is needed to save the value {item.index.fqn} "
            "without pickle: use torch's DefaultSavePlanner or a subclass of it"
        )
    return json.dumps(to_json(look_up(item.index), item.index.fqn), allow_nan=False)
