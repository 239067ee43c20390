"""To a safetensors file: https://huggingface.co/docs/safetensors, "Format".

The file begins with the header's length as 8 bytes, little-endian. The header is JSON: for each name the dtype, the
shape and where the tensor's bytes begin and end, counted from the header's end; and strings under ``__metadata__``. The
bytes of all tensors follow, each in row-major order, without gaps. The package safetensors is not needed.
"""

from __future__ import annotations

import json
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ...param_groups import remainder_column
from ...sharded_lion import ShardedLion
from ...update.codecs import join
from ...update.state import REMAINDER
from ..blocks import Buffers, copy_out
from ..files import sync_folder
from ..folders import Key, local_path
from ..keys import MODEL
from ..logical import Logical
from ..manifest import BLOCK_BYTES
from ..model_state import ModelState
from ..names import Names
from ..optimizer_state import check_optimizer, unwrapped

# Names of dtypes in the format.
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.complex64: "C64",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class _Entry:
    """A tensor of the file: ``tensor`` as it is or, joined with a remainder, a float32 master weight."""

    tensor: Tensor
    remainder: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype if self.remainder is None else torch.float32

    @property
    def nbytes(self) -> int:
        return self.tensor.numel() * self.dtype.itemsize

    def read(self) -> Tensor:
        return self.tensor if self.remainder is None else join(self.tensor, self.remainder)


def to_safetensors(file: Key, model: nn.Module, optimizer: Optimizer | None = None) -> None:
    """Writes a model's weights to a file that ``safetensors.torch.load_file`` reads.

    bfloat16 parameters with ``master_weights=True`` are written as the float32 numbers that they are together with
    their remainders. Other parameters, and persistent buffers, are written in their own dtypes; extra states of modules
    are not. Names are those of the unwrapped model. A tied weight is written once, under the alphabetically first of
    its names; the others stand in the metadata, as ``safetensors.torch.save_model`` writes them.

    The file appears, or replaces another, by one rename once it is whole. One joined weight at a time is in memory.

    Under DDP call this on one rank. What FSDP or ShardedLion shards has to become whole first: save it with
    `lion_dist.checkpoint.save`, and load that into a model on one process, where a float32 model takes the master
    weights and needs no optimizer::

        whole = Model()                                   # float32, on the CPU
        lion_dist.checkpoint.load("runs/step-1000", whole)
        to_safetensors("model.safetensors", whole)

    Args:
        file: Path of the file.
        model: The model, whole, wrapped or not.
        optimizer: `Lion` over parameters of the model; None where it has no master weights.

    Raises:
        TypeError: A parameter is sharded, the optimizer is not `Lion`, or a dtype has no name in the format. Nothing
            has been written.
    """
    optimizer = unwrapped(optimizer)
    check_optimizer(optimizer)
    whole = (
        "save it with lion_dist.checkpoint.save, load that into a model on one process (into float32 weights no "
        "optimizer is needed), and write that model"
    )
    if isinstance(optimizer, ShardedLion):
        raise TypeError(f"ShardedLion shards its state; expected Lion: {whole}")
    names, logical = Names.read(model), Logical(model)
    for p in model.parameters():
        if logical.is_sharded(p):
            raise TypeError(f"{names.of(p)} is sharded; expected a whole model: {whole}")
    _write(local_path(file), _entries(model, optimizer, names, logical), {"format": "pt", **names.aliases})


def _entries(model: nn.Module, optimizer: Optimizer | None, names: Names, logical: Logical) -> dict[str, _Entry]:
    """The tensors of the file, by name, in the order in which they lie there: those of large elements first, so that
    each is aligned."""
    read = ModelState.read(model, names, logical)
    remainders = {} if optimizer is None else _remainders(optimizer, names)
    entries = {
        key.removeprefix(MODEL): _Entry(t, remainders.get(key.removeprefix(MODEL)))
        for key, t in {**read.params, **read.buffers}.items()
    }
    for name, entry in entries.items():
        if entry.dtype not in DTYPES:
            raise TypeError(
                f"{name} is {entry.dtype}, which safetensors files cannot hold: convert it, or take it out of the model"
            )
    return dict(sorted(entries.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])))


def _remainders(optimizer: Optimizer, names: Names) -> dict[str, Tensor]:
    """The remainders of the parameters that have master weights, by name. Before the first step they are zeros."""
    found = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p in names and remainder_column(p, group) is not None:
                remainder = optimizer.state.get(p, {}).get(REMAINDER)
                found[names.of(p)] = torch.zeros_like(p, dtype=torch.int16) if remainder is None else remainder
    return found


def _write(path: Path, entries: dict[str, _Entry], metadata: dict[str, str]) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as out:
            out.write(_header(entries, metadata))
            buffers = Buffers(BLOCK_BYTES)
            for entry in entries.values():
                _write_tensor(out, entry.read(), buffers)
            out.flush()
            os.fsync(out.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def _header(entries: dict[str, _Entry], metadata: dict[str, str]) -> bytes:
    """The header and its length, padded with spaces to a multiple of 8 bytes."""
    header: dict[str, object] = {"__metadata__": metadata}
    at = 0
    for name, entry in entries.items():
        ends = [at, at + entry.nbytes]
        header[name] = {"dtype": DTYPES[entry.dtype], "shape": list(entry.tensor.shape), "data_offsets": ends}
        at += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_tensor(out: BinaryIO, t: Tensor, buffers: Buffers) -> None:
    step = BLOCK_BYTES // t.element_size()
    for start in range(0, t.numel(), step):
        buffer = buffers.get(min(step, t.numel() - start) * t.element_size())
        copy_out(t, start, buffer)
        out.write(buffer)
