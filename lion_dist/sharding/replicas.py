"""Whether replicas are what they should be: the same bits on every rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..frozen import is_plain, takes_part
from ..memory_order import flat_bytes
from .collectives import all_gather_in_place, broadcast_from_first, device_types, explaining

_CHUNK = 1 << 22  # elements
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def comparable(params: Sequence[Tensor], group: dist.ProcessGroup) -> list[int]:
    """Indices of the parameters whose replicas can be compared and made alike over the group: all that take part, and
    of the frozen ones those that are plain and on the same device."""
    types = device_types(group)
    plain = [i for i, p in enumerate(params) if takes_part(p) or (is_plain(p) and p.device.type in types)]
    ordered = sorted(plain, key=lambda i: not takes_part(params[i]))
    return [i for i in plain if params[i].device == params[ordered[0]].device]


def checksum(t: Tensor) -> Tensor:
    """Of the bits of a dense tensor of any dtype, in memory order: int64, shape (). One changed bit changes it, as do
    elements that change places."""
    bits = flat_bytes(t).view(_BITS[min(t.element_size(), 8)])
    weights = 2 * torch.arange(min(_CHUNK, bits.numel()), device=t.device) + 1
    total = torch.zeros((), dtype=torch.int64, device=t.device)
    for chunk in bits.split(_CHUNK):
        total = total * 0x5851F42D4C957F2D + (chunk * weights[: chunk.numel()]).sum()
    return total


def differing(params: Sequence[Tensor], group: dist.ProcessGroup) -> list[tuple[int, list[int]]]:
    """Parameters, by number, that are not the same on all ranks, and the ranks where they are not as on the first;
    of those that are `comparable`. A collective call; the host waits."""
    numbers = comparable(params, group)
    if not numbers:
        return []
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    sums = torch.empty(world_size, len(numbers), dtype=torch.int64, device=params[numbers[0]].device)
    sums[rank] = torch.stack([checksum(params[i].detach()) for i in numbers])
    with explaining(group):
        all_gather_in_place([sums.flatten()], group)
    unlike = zip(numbers, (sums != sums[0]).t().tolist(), strict=True)
    return [(i, [r for r, other in enumerate(ranks) if other]) for i, ranks in unlike if any(ranks)]


def broadcast(params: Sequence[Tensor], group: dist.ProcessGroup) -> list[int]:
    """Overwrites parameters that are `comparable` with those of the group's first rank, and tells autograd.

    Returns:
        Indices of those parameters.
    """
    numbers = comparable(params, group)
    sent = [params[i] for i in numbers]
    broadcast_from_first([flat_bytes(p) for p in sent if p.numel()], group)
    torch.autograd.graph.increment_version(sent)
    return numbers


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
