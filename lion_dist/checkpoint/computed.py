"""Tensors that a save computes from others while it writes them, so that they never lie in memory as a whole.

A master weight is computed from a bfloat16 parameter and its remainder, and a float32 momentum from 8-bit codes and
their scales (update/codecs.py). What they are computed from is sharded as the result is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..dtensors import is_dtensor
from ..update.codecs import join
from .codes import CodeRun, decode_at

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import MetadataIndex
    from torch.distributed.checkpoint.planner import WriteItem


class ComputedPart(ABC):
    """A box of a computed tensor, which is plain; indexing it by slices computes elements.

    Attributes:
        source: a tensor of the same shape that it is computed from.
    """

    dtype = torch.float32
    itemsize = 4

    def __init__(self, source: Tensor) -> None:
        self.source = source
        self.shape, self.device, self.is_cuda = source.shape, source.device, source.is_cuda
        self.nbytes = source.numel() * self.itemsize

    @abstractmethod
    def __getitem__(self, slices: tuple[slice, ...]) -> Tensor:
        """The elements of a box, float32."""


class Computed(ABC):
    """This rank's part of a float32 tensor that is computed when it is written.

    Args:
        source: a tensor of the same shape and sharding: plain, a BoxTensor or a DTensor.

    Attributes:
        shape: shape of the whole tensor.
    """

    dtype = torch.float32

    def __init__(self, source: Tensor) -> None:
        self.source = source
        self.shape = tuple(source.shape)

    @abstractmethod
    def sampled(self, key: str) -> dict[str, Tensor]:
        """Tensors whose equal parts must have equal elements on all ranks, for `union.samples`."""

    @abstractmethod
    def part(self, index: MetadataIndex) -> ComputedPart:
        """The box of a write item."""

    def __create_write_items__(self, fqn: str, _: Any) -> list[WriteItem]:
        """Called by torch.distributed.checkpoint: the boxes of the source, in float32."""
        if is_dtensor(self.source) and self.source.device_mesh.get_coordinate() is None:  # type: ignore[attr-defined]
            return []
        return [_in_float32(item) for item in _write_items(fqn, self.source)]


def _write_items(fqn: str, source: Any) -> list[WriteItem]:
    if hasattr(source, "__create_write_items__"):
        found: list[WriteItem] = source.__create_write_items__(fqn, source)
        return found
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
    from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

    offsets = torch.Size([0] * source.dim())
    data = TensorWriteData(
        ChunkStorageMetadata(offsets, source.shape), TensorProperties(source.dtype), torch.Size(source.shape)
    )
    return [WriteItem(MetadataIndex(fqn, offsets), WriteItemType.TENSOR, tensor_data=data)]


def _in_float32(item: WriteItem) -> WriteItem:
    assert item.tensor_data is not None
    properties = replace(item.tensor_data.properties, dtype=torch.float32)
    return replace(item, tensor_data=replace(item.tensor_data, properties=properties))


def _found(t: Any, index: MetadataIndex) -> Tensor:
    """The box of a write item, of one of the tensors that others are computed from."""
    found: Tensor = t.__get_tensor_shard__(index) if hasattr(t, "__get_tensor_shard__") else t
    return found.detach()


# Master weights -------------------------------------------------------------------------------------


class MasterWeight(Computed):
    """The master weights of a bfloat16 parameter.

    Args:
        weight: the parameter, bfloat16.
        remainder: its remainder, int16, of the same shape and sharding.
    """

    def __init__(self, weight: Tensor, remainder: Tensor) -> None:
        super().__init__(weight)
        self._remainder = remainder

    def sampled(self, key: str) -> dict[str, Tensor]:
        return {f"{key} (remainder)": self._remainder}

    def part(self, index: MetadataIndex) -> ComputedPart:
        return _MasterPart(_found(self.source, index), _found(self._remainder, index))


class _MasterPart(ComputedPart):
    def __init__(self, weight: Tensor, remainder: Tensor) -> None:
        super().__init__(weight)
        self._remainder = remainder

    def __getitem__(self, slices: tuple[slice, ...]) -> Tensor:
        weight = self.source[slices]
        return join(weight, self._remainder[slices].to(weight.device))  # the state may be offloaded


# 8-bit momentum -------------------------------------------------------------------------------------


class DecodedMomentum(Computed):
    """The momentum that 8-bit codes stand for.

    Args:
        codes: the codes, int8, in the parameter's shape and sharding.
        runs: the same codes with their scales.
    """

    def __init__(self, codes: Tensor, runs: Sequence[CodeRun]) -> None:
        super().__init__(codes)
        self._runs = runs

    def sampled(self, key: str) -> dict[str, Tensor]:
        return {key: self.source}

    def part(self, index: MetadataIndex) -> ComputedPart:
        codes = _found(self.source, index)
        at = codes.storage_offset()
        runs = [run for run in self._runs if run.first <= at < run.first + run.numel]
        return _DecodedPart(codes, runs[0] if codes.numel() else None)


class _DecodedPart(ComputedPart):
    def __init__(self, codes: Tensor, run: CodeRun | None) -> None:
        super().__init__(codes)
        self._run = run

    def __getitem__(self, slices: tuple[slice, ...]) -> Tensor:
        codes = self.source[slices]
        assert self._run is not None
        first = int(codes.storage_offset()) - self._run.first
        index: Tensor = torch.full((), first, dtype=torch.int64, device=codes.device)
        for d, (size, stride) in enumerate(zip(codes.shape, codes.stride(), strict=True)):
            steps = torch.arange(size, device=codes.device) * stride
            index = index + steps.view([-1 if i == d else 1 for i in range(codes.dim())])
        return decode_at(codes, index, self._run.scale)
