"""The two halves of a step with the buffer that carries the signs between them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lion_dist.sharding.exchange import ExchangeBuffer
from lion_dist.update.lion_update import LionUpdate
from lion_dist.update.reference import PER_BYTE, HyperParameters
from lion_dist.update.segments import Segment, StepTensors
from lion_dist.update.signs import SignUpdate


class ExchangedSigns:
    """A `SignUpdate` of one rank, and its `ExchangeBuffer`.

    Args:
        numel: elements of each rank's momentum buffer.
        slices: for every rank the runs that it owns: (entry, start in the parameter, start in the rank's momentum
            buffer, length).

    Attributes:
        rows: uint8, shape (ranks, bytes of a row).
        numbers: int64, shape (ranks,): the checksums in the rows.
    """

    def __init__(
        self, update: LionUpdate, numel: int, rank: int, slices: Sequence[Sequence[tuple[int, int, int, int]]],
        device: torch.device,
    ) -> None:  # fmt: skip
        self._exchange = exchange = ExchangeBuffer(numel // PER_BYTE, rank, len(slices), device)
        self.rows = exchange.bytes.view(len(slices), -1)
        self.numbers = exchange.numbers
        segments = [
            Segment(entry, start, 0, exchange.position(r, shard_start // PER_BYTE) * PER_BYTE, length)
            for r, owned in enumerate(slices)
            for entry, start, shard_start, length in owned
        ]
        self._lion = update
        self._update = SignUpdate(update, segments, exchange.bytes)

    def pack(self, tensors: StepTensors, hypers: list[HyperParameters], grad_scale: Tensor | None, salt: int) -> None:
        prepared = self._lion.prepare(tensors)
        self._update.pack(prepared, hypers, grad_scale, salt, self._exchange.own, self._exchange.own_number)

    def apply(self, tensors: StepTensors, agree: Tensor) -> None:
        self._update.apply(tensors, agree)
