"""The message that every rank of a group sends in a step: bytes, and a number on which the ranks must agree."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from .collectives import start_all_gather

# Bytes behind the payload of a row. They hold the number, and keep every row aligned for the vectorised copies of NCCL.
FOOTER = 128

REFUSED = -1  # the number of a rank that does not make the step


class ExchangeBuffer:
    """A row of bytes for each rank, which an all-gather completes: a payload, and an int64 number behind it.

    Args:
        payload: bytes of a rank's payload, a multiple of 8.
        rank: this rank in the group.
        world_size: number of ranks.
        device: where the buffer lies.

    Attributes:
        bytes: uint8, 1-D: all rows, one after another.
        own: uint8, shape (payload,): this rank's payload, which the caller writes.
        own_number: int64, shape (): this rank's number, which the caller writes.
        numbers: int64, shape (world_size,): the numbers of all ranks.
    """

    def __init__(self, payload: int, rank: int, world_size: int, device: torch.device) -> None:
        self._row = payload + FOOTER
        rows = torch.zeros(world_size, self._row, dtype=torch.uint8, device=device)
        self.bytes = rows.flatten()
        self.own = rows[rank, :payload]
        self.numbers = rows.view(torch.int64)[:, payload // 8]
        self.own_number = self.numbers[rank]

    def position(self, rank: int, offset: int) -> int:
        """Index into ``bytes`` of a byte of a rank's payload."""
        return rank * self._row + offset

    def refuse(self) -> None:
        """Sets this rank's number to the one of a rank that does not make the step."""
        self.own_number.fill_(REFUSED)

    def start_gather(self, group: dist.ProcessGroup) -> Any:
        """Starts bringing every rank's row to every rank; returns the work to `wait` for."""
        return start_all_gather([self.bytes], group)
