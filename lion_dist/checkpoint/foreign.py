"""Checkpoints of torch.distributed.checkpoint's own storage, read without executing what is in them.

That storage pickles its metadata and every value that is not a tensor, and torch's reader unpickles them: whoever wrote
the files decides what runs. `TorchReader` takes from the metadata the few classes it is made of and nothing else, and
from the values what ``weights_only=True`` takes.
"""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from ..sharding.boxes import Box, check_cover
from .folders import Key

_KNOWN = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
}  # fmt: skip


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _KNOWN.get(module, ()):
            raise ValueError(f"its metadata wants {module}.{name}, which no checkpoint needs: it may be an attack")
        return super().find_class(module, name)


class TorchReader(FileSystemReader):
    """torch's reader of its own checkpoints in a folder, for ``dcp.load(state, storage_reader=TorchReader(path))``.

    Raises:
        ValueError: from dcp.load, for metadata with anything foreign in it, files out of the folder, or tensors that
            are not covered whole.
    """

    def __init__(self, path: Key) -> None:
        super().__init__(path)

    # No **kwargs by that name, at which torch would look for metadata of one rank, and unpickle it.
    def read_metadata(self, *_: Any, **unused: Any) -> Metadata:
        path = Path(self.path) / ".metadata"
        try:
            metadata = _Unpickler(io.BytesIO(path.read_bytes())).load()
            if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
                raise ValueError("its metadata is something else")
            for info in metadata.storage_data.values():
                name = os.fspath(info.relative_path)
                if name in ("", ".", "..") or os.path.basename(name) != name:
                    raise ValueError(f"it refers to {name!r}, outside of its folder")
            for name, held in metadata.state_dict_metadata.items():
                if isinstance(held, TensorStorageMetadata):
                    try:
                        check_cover(held.size, [Box(tuple(c.offsets), tuple(c.sizes)) for c in held.chunks])
                    except ValueError as error:
                        raise ValueError(f"{name} is not whole: {error}") from None
        except FileNotFoundError:
            raise FileNotFoundError(f"{self.path} is no checkpoint of torch's: there is no .metadata") from None
        except Exception as error:  # of many types, by what is wrong
            raise ValueError(f"{self.path} cannot be loaded: {error}") from error
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        return super().read_data(plan, _Guard(planner))  # type: ignore[arg-type]


class _Guard:
    """A planner that is given values only as ``weights_only=True`` understands them."""

    def __init__(self, planner: LoadPlanner) -> None:
        self._planner = planner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._planner, name)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        try:
            found = torch.load(value, weights_only=True, map_location="cpu")
        except Exception as error:
            raise ValueError(f"{read_item.storage_index.fqn} is no plain value: {error}") from error
        again = io.BytesIO()
        torch.save(found, again)
        again.seek(0)
        self._planner.load_bytes(read_item, again)
