"""How the gradients of a bucket become averages on the ranks that own them: one class for each way to communicate.

`ReduceScatterAverage` sends gradients in their own dtype, and the backend adds them up. `AllToAllAverage`
(all_to_all.py) sends them in 16 bits and adds them up in 32. `OneRankAverage` has nobody to send them to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .._torch_compat import foreach_add_, foreach_copy_
from ..upload import current_stream_number
from .collectives import Membership, Reduction, reduce_scatter_mean


class UnderWay(Protocol):
    """A bucket whose averages are being made.

    Attributes:
        kept: tensors whose memory must not be used again before the stream that calls `wait` has done so; see [Note:
            Tensors under way].
    """

    @property
    def kept(self) -> Sequence[Tensor]: ...

    def wait(self) -> None:
        """Makes the current stream, or on the CPU the host, wait for the averages."""


class BucketAverage(Protocol):
    """Averages gradients over the ranks, bucket by bucket. Buckets are counted as in the last `set_buckets`."""

    def dtype_of(self, gradient: torch.dtype) -> torch.dtype:
        """The dtype of averages of gradients of this dtype."""

    def set_buckets(self, outputs: Sequence[Sequence[Tensor]]) -> None:
        """Takes other buckets, while none is under way.

        Args:
            outputs: for each bucket, where this rank's parts of the averages go: 1-D, contiguous, on one device, of
                lengths that are multiples of ALIGN (layout.py).
        """

    def start(self, bucket: int, inputs: Sequence[Tensor | None], adds: bool) -> UnderWay:
        """Starts to average a bucket beside the current stream; a collective call.

        Args:
            bucket: its index. It has at least one output.
            inputs: for each output this rank's gradient, 1-D, contiguous, as long as the parts of all ranks together;
                None: zeros. Rank r's output is the average of the r-th of its equal parts.
            adds: whether averages are added to the outputs, which they replace otherwise.
        """


@dataclass
class _Scattering:
    """A bucket of which reduce-scatters are under way. The addends, their outputs, are added to the sums when they are
    done."""

    membership: Membership
    reduction: Reduction
    kept: list[Tensor]
    sums: list[Tensor]
    addends: list[Tensor]

    def wait(self) -> None:
        with self.membership.collective():
            self.reduction.wait()
        if self.sums:
            foreach_add_(self.sums, self.addends)


class ReduceScatterAverage:
    """One coalesced group of reduce-scatters a bucket, in the dtype of the gradients. The backend chooses the order in
    which contributions are added.

    Args:
        membership: the ranks.
    """

    def __init__(self, membership: Membership) -> None:
        self._membership = membership
        self._outputs: Sequence[Sequence[Tensor]] = ()

    def dtype_of(self, gradient: torch.dtype) -> torch.dtype:
        return gradient

    def set_buckets(self, outputs: Sequence[Sequence[Tensor]]) -> None:
        self._outputs = outputs

    def start(self, bucket: int, inputs: Sequence[Tensor | None], adds: bool) -> _Scattering:
        outputs = list(self._outputs[bucket])
        given = _with_zeros(inputs, outputs, self._membership.group.size())
        addends = [torch.empty_like(output) for output in outputs] if adds else []
        with self._membership.collective() as group:
            reduction = reduce_scatter_mean(addends or outputs, given, group)
        return _Scattering(self._membership, reduction, [*given, *addends], outputs if adds else [], addends)


def _with_zeros(inputs: Sequence[Tensor | None], outputs: Sequence[Tensor], world_size: int) -> list[Tensor]:
    return [
        output.new_zeros(output.numel() * world_size) if t is None else t
        for t, output in zip(inputs, outputs, strict=True)
    ]


@dataclass
class _Copied:
    """A bucket whose averages have been written on the stream that launched it (None: on the CPU), from the tensors
    that it keeps."""

    kept: list[Tensor]
    stream: torch.cuda.Stream | None

    def wait(self) -> None:
        if self.stream is not None and self.stream.cuda_stream != current_stream_number(self.stream.device):
            torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)


class OneRankAverage:
    """For a group of one rank, whose averages are its gradients: copies on the current stream. A backend would launch
    a kernel for each tensor."""

    def __init__(self) -> None:
        self._outputs: Sequence[Sequence[Tensor]] = ()

    def dtype_of(self, gradient: torch.dtype) -> torch.dtype:
        return gradient

    def set_buckets(self, outputs: Sequence[Sequence[Tensor]]) -> None:
        self._outputs = outputs

    def start(self, bucket: int, inputs: Sequence[Tensor | None], adds: bool) -> _Copied:
        outputs = self._outputs[bucket]
        given = _with_zeros(inputs, outputs, 1)
        (foreach_add_ if adds else foreach_copy_)(outputs, given)
        return _Copied(given, torch.cuda.current_stream(given[0].device) if given[0].is_cuda else None)
