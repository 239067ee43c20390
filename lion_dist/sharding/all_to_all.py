"""Averages of gradients that travel in 16 bits and are added up in 32.

[Note: Average in 16 bits]
With g_r the gradient of rank r, of W ranks, and n_r the same rounded to bfloat16 (to nearest, halves to even)::

    average = (n_0 + n_1 + ... + n_(W-1)) / W

The sum is taken in float32, from left to right, each addition rounded, and divided once, rounded too. So a contribution
is rounded once, however many ranks there are, and the bits depend on no algorithm of the backend. Gradients that are
bfloat16 are not rounded at all. NaN and infinities pass, and numbers beyond the range of bfloat16 become infinite. With
one rank the average is the rounded gradient.

An all-to-all brings all contributions to a part to the rank that owns it, which adds them up. Each rank sends as many
bytes as in a reduce-scatter of bfloat16.

Rows: a rank sends a buffer of one row for each rank, and receives such a buffer; bfloat16, shape (world_size, elements
    of the bucket's outputs). Row r of the buffer that is sent holds the parts of the bucket's gradients that rank r
    owns, one after another. Row r of the buffer that is received holds rank r's contributions to this rank's outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .collectives import Membership, start_all_to_all


def round_rows(rows: Tensor, inputs: Sequence[Tensor | None], lengths: Sequence[int]) -> None:
    """Rounds gradients into the rows to send. See [Note: Average in 16 bits].

    Args:
        rows: bfloat16, shape (world_size, sum of ``lengths``), written.
        inputs: 1-D, of any floating dtype, each world_size times as long as its length; None: zeros.
        lengths: elements that each rank owns of each input.
    """
    for columns, t in zip(rows.split(list(lengths), dim=1), inputs, strict=True):
        if t is None:
            columns.zero_()
        else:
            columns.copy_(t.view(columns.shape))


def average_rows(outputs: Sequence[Tensor], rows: Tensor, adds: bool) -> None:
    """Averages received rows. See [Note: Average in 16 bits].

    Args:
        outputs: float32, 1-D, written.
        rows: bfloat16, shape (world_size, elements of all outputs).
        adds: whether averages are added to the outputs.
    """
    # On GPUs torch multiplies by the reciprocal of a Python number, which rounds twice; by a tensor it divides.
    world_size = torch.full((), float(len(rows)), dtype=torch.float32, device=rows.device)
    for columns, output in zip(rows.split([t.numel() for t in outputs], dim=1), outputs, strict=True):
        total = torch.empty_like(output) if adds else output
        total.copy_(columns[0])
        for contribution in columns[1:]:
            total.add_(contribution)  # in float32
        total.div_(world_size)
        if adds:
            output.add_(total)


class TorchRows:
    """The two halves of a bucket's average in plain torch."""

    def __init__(self, outputs: Sequence[Tensor]) -> None:
        self._outputs = outputs
        self._lengths = [t.numel() for t in outputs]

    def round(self, rows: Tensor, inputs: Sequence[Tensor | None]) -> None:
        """`round_rows`."""
        round_rows(rows, inputs, self._lengths)

    def average(self, rows: Tensor, adds: bool) -> None:
        """`average_rows`."""
        average_rows(self._outputs, rows, adds)


@dataclass
class _Exchange:
    """A bucket whose all-to-all is under way."""

    membership: Membership
    work: Any
    sent: Tensor
    received: Tensor
    average: Callable[[], None]

    @property
    def kept(self) -> Sequence[Tensor]:
        return self.sent, self.received

    def wait(self) -> None:
        with self.membership.collective():
            self.work.wait()
        self.average()


class AllToAllAverage:
    """One all-to-all a bucket, in bfloat16, and sums in float32. See [Note: Average in 16 bits].

    While a bucket is under way it takes 4 bytes an element, for what is sent and what is received. Its gradients are
    read before `start` has returned (on a GPU: before anything that the current stream does later).

    Args:
        membership: the ranks.
        takes_triton: says for a device whether Triton kernels run there; otherwise plain torch does.
    """

    def __init__(self, membership: Membership, takes_triton: Callable[[torch.device], bool]) -> None:
        self._membership = membership
        self._takes_triton = takes_triton
        self._halves: list[Any] = []  # for each bucket; None if it has no outputs
        self._row_numels: list[int] = []
        self._device: torch.device | None = None

    def dtype_of(self, gradient: torch.dtype) -> torch.dtype:
        return torch.float32

    def set_buckets(self, outputs: Sequence[Sequence[Tensor]]) -> None:
        self._device = next((t.device for of_bucket in outputs for t in of_bucket), None)
        make: Callable[[Sequence[Tensor]], Any] = TorchRows
        if self._device is not None and self._takes_triton(self._device):
            from .triton_rows import TritonRows  # needs triton

            make = TritonRows
        self._halves = [make(of_bucket) if of_bucket else None for of_bucket in outputs]
        self._row_numels = [sum(t.numel() for t in of_bucket) for of_bucket in outputs]

    def start(self, bucket: int, inputs: Sequence[Tensor | None], adds: bool) -> _Exchange:
        halves, shape = self._halves[bucket], (self._membership.group.size(), self._row_numels[bucket])
        sent, received = (torch.empty(shape, dtype=torch.bfloat16, device=self._device) for _ in range(2))
        halves.round(sent, inputs)
        with self._membership.collective() as group:
            work = start_all_to_all(received, sent, group)
        return _Exchange(self._membership, work, sent, received, lambda: halves.average(received, adds))
