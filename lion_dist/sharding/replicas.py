"""Whether replicas are what they should be: the same bits on every rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..memory_order import flat
from .collectives import all_gather_in_place, broadcast_from_first, explaining

_CHUNK = 1 << 22  # elements
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(t: Tensor) -> Tensor:
    """Of the bits of a dense tensor, in memory order: int64, shape (). One changed bit changes it, as do elements
    that change places."""
    bits = flat(t).view(_BITS[t.element_size()])
    weights = 2 * torch.arange(min(_CHUNK, bits.numel()), device=t.device) + 1
    total = torch.zeros((), dtype=torch.int64, device=t.device)
    for chunk in bits.split(_CHUNK):
        total = total * 0x5851F42D4C957F2D + (chunk * weights[: chunk.numel()]).sum()
    return total


def differing(params: Sequence[Tensor], group: dist.ProcessGroup) -> list[tuple[int, list[int]]]:
    """Parameters, by number, that are not the same on all ranks, and the ranks where they are not as on the first.
    A collective call; the host waits."""
    if not params:
        return []
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    sums = torch.empty(world_size, len(params), dtype=torch.int64, device=params[0].device)
    sums[rank] = torch.stack([checksum(p.detach()) for p in params])
    with explaining(group):
        all_gather_in_place([sums.flatten()], group)
    unlike = (sums != sums[0]).t().tolist()
    return [(i, [r for r, other in enumerate(ranks) if other]) for i, ranks in enumerate(unlike) if any(ranks)]


def broadcast(params: Iterable[Tensor], group: dist.ProcessGroup) -> None:
    """Overwrites dense parameters with those of the group's first rank, and tells autograd."""
    given = list(params)
    broadcast_from_first([flat(p) for p in given if p.numel()], group)
    torch.autograd.graph.increment_version(given)


class Comparison:
    """Numbers that all ranks should have alike, compared on the device at once, and on the host LAG calls later:
    by then they have got there as a rule, so that the host does not wait; and all ranks raise in the same call."""

    LAG = 2

    def __init__(self) -> None:
        self._pending: list[tuple[torch.cuda.Event | None, Tensor, Callable[[], str]]] = []

    def compare(self, numbers: Tensor, message: Callable[[], str]) -> Tensor:
        """Whether all are equal; bool, shape (), on their device.

        Args:
            numbers: shape (world_size,).
            message: what `check` is to say of ranks whose number is not the first one's.
        """
        copy, event = numbers, None
        if numbers.is_cuda:
            copy = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            copy.copy_(numbers, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._pending.append((event, copy, message))
        return (numbers == numbers[0]).all()

    def check(self, all: bool = False) -> None:
        """After each `compare`: raises ValueError if numbers were not alike, those given last if they lie on the
        CPU, those of LAG calls ago on a GPU; or of ``all`` calls, for which the host waits."""
        while self._pending and (all or self._pending[0][0] is None or len(self._pending) > self.LAG):
            event, numbers, message = self._pending.pop(0)
            if event is not None:
                event.synchronize()
            first, *others = numbers.tolist()
            unlike = [r for r, other in enumerate(others, 1) if other != first]
            if unlike:
                self._pending.clear()
                raise ValueError(f"ranks {unlike} of the group {message()}")
