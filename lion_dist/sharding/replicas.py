"""Replicas of tensors: whether their bits are the same on every rank, and how they are made so."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..dtensors import local
from ..frozen import is_plain, takes_part
from ..memory_order import flat_bytes
from .collectives import all_gather_in_place, broadcast_from_first, check_device, device_types, explaining

_CHUNK = 1 << 22  # elements
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def comparable(params: Sequence[Tensor], group: dist.ProcessGroup) -> list[int]:
    """Indices of the parameters whose replicas can be compared and sent: all that take part, and the frozen ones that
    are plain tensors on the same device. Of a DTensor it is what this rank holds that has replicas."""
    types = device_types(group)
    plain = [i for i, p in enumerate(params) if takes_part(p) or (is_plain(local(p)) and local(p).device.type in types)]
    ordered = sorted(plain, key=lambda i: not takes_part(params[i]))
    return [i for i in plain if local(params[i]).device == local(params[ordered[0]]).device]


def bits_checksum(t: Tensor) -> Tensor:
    """A checksum of the bits of a dense tensor of any dtype, in memory order: int64, shape ().

    It changes with every single bit, and where two elements change places.
    """
    bits = flat_bytes(t).view(_BITS[min(t.element_size(), 8)])
    weights = 2 * torch.arange(min(_CHUNK, bits.numel()), device=t.device) + 1
    total = torch.zeros((), dtype=torch.int64, device=t.device)
    for chunk in bits.split(_CHUNK):
        total = total * 0x5851F42D4C957F2D + (chunk * weights[: chunk.numel()]).sum()
    return total


def gathered(own: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Every rank's tensor, stacked: shape (world_size, *own.shape), on the same device. A collective call."""
    every = own.new_empty(dist.get_world_size(group), *own.shape)
    every[dist.get_rank(group)] = own
    all_gather_in_place([every.flatten()], group)
    return every


def _checksums(params: Sequence[Tensor], group: dist.ProcessGroup, state: Iterable[Tensor] = ()) -> Tensor:
    """Checksums of at least one parameter, and of state on any device, on every rank: int64, shape (world_size,
    tensors). A collective call."""
    own = [bits_checksum(local(p).detach()) for p in params]
    own += [bits_checksum(t).to(own[0].device) for t in state]
    with explaining(group):
        return gathered(torch.stack(own), group)


def differing(
    params: Sequence[Tensor], group: dist.ProcessGroup, state: Iterable[Tensor] = ()
) -> list[tuple[int, list[int]]]:
    """Compares the parameters that are `comparable` over the ranks; a collective call, for which the host waits.

    Args:
        state: dense tensors, on any device, that are compared too where there are such parameters. Their indices follow
            those of all parameters.

    Returns:
        For each tensor that differs, its index, and the ranks where it differs from the group's first rank.
    """
    numbers = comparable(params, group)
    if not numbers:
        return []
    sums = _checksums([params[i] for i in numbers], group, state)
    numbers += range(len(params), len(params) + sums.shape[1] - len(numbers))
    unlike = zip(numbers, (sums != sums[0]).t().tolist(), strict=True)
    return [(i, [r for r, other in enumerate(ranks) if other]) for i, ranks in unlike if any(ranks)]


def refuse_differing(
    params: Sequence[Tensor], group: dist.ProcessGroup, state: Sequence[tuple[str, Tensor]] = ()
) -> None:
    """Raises RuntimeError, on every rank, where a parameter or a tensor of state is not the same on all ranks; see
    `differing`.

    Args:
        state: the tensors of state, each with its name.
    """
    unlike = differing(params, group, (t for _, t in state))
    if unlike:
        names = [*(f"parameter {i}" for i in range(len(params))), *(name for name, _ in state)]
        some = "; ".join(f"{names[i]} on ranks {ranks}" for i, ranks in unlike[:5])
        of_params = sum(i < len(params) for i, _ in unlike)
        counts = [(of_params, "parameters"), (len(unlike) - of_params, "tensors of the parameters' state")]
        raise RuntimeError(
            f"{' and '.join(f'{n} {kind}' for n, kind in counts if n)} differ in their bits from those of the group's "
            f"first rank: {some}. Call resync() on every rank to give all ranks those of the first"
        )


def refuse_permuted(params: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Finds ranks that hold the parameters of the group's first rank in another order; a collective call, for which the
    host waits.

    Different values alone are no fault, since those of the first rank will overwrite them. A position is evidence of
    another order if its tensors on the two ranks differ, and each of them is found on the other rank at a position of
    the same shape and dtype where the tensors differ too. Tensors with equal values, such as biases of zeros, are no
    evidence, so it is not found if only they have changed places.

    Raises:
        ValueError: on every rank, where a rank has another order.
    """
    numbers = comparable(params, group)
    if not numbers or dist.get_world_size(group) == 1:
        return
    params = [params[i] for i in numbers]
    first, *others = _checksums(params, group).tolist()
    for rank, sums in enumerate(others, 1):
        unlike = [i for i, (a, b) in enumerate(zip(first, sums, strict=True)) if a != b]
        kinds = {i: (local(params[i]).shape, params[i].dtype) for i in unlike}
        here = {(kinds[i], sums[i]) for i in unlike}
        there = {(kinds[i], first[i]): i for i in unlike}
        moved = [
            (i, there[kinds[i], sums[i]])
            for i in unlike
            if (kinds[i], sums[i]) in there and (kinds[i], first[i]) in here
        ]
        if moved:
            some = ", ".join(
                f"its parameter {numbers[i]} is parameter {numbers[j]} of the first rank" for i, j in moved[:3]
            )
            raise ValueError(
                f"rank {rank} of the group has the parameters of the first rank in another order: {some}"
                f"{', ...' if len(moved) > 3 else ''} ({len(moved)} in all). They would have overwritten one another; "
                "nothing was changed. Give named parameters (model.named_parameters()), whose names are compared, and "
                "build groups from lists: the order of a Python set differs from process to process"
            )


def broadcast(params: Sequence[Tensor], group: dist.ProcessGroup) -> list[int]:
    """Overwrites the parameters that are `comparable` with those of the group's first rank; a collective call.

    Returns:
        Indices of those parameters.
    """
    numbers = comparable(params, group)
    sent = [params[i] for i in numbers]
    broadcast_from_first([flat_bytes(t) for t in map(local, sent) if t.numel()], group)
    torch.autograd.graph.increment_version(sent)  # autograd does not notice writes to their bytes
    return numbers


def describe_dense(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> list[str]:
    """Lines that must be the same on all ranks before `broadcast_dense`. Raises ValueError where the group cannot send
    a tensor."""
    for t in tensors:
        check_device(t.device, group)
    return [f"buffer {i}: shape {tuple(t.shape)}, {t.dtype}" for i, t in enumerate(tensors)]


def broadcast_dense(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Overwrites tensors, which may have gaps, with those of the group's first rank; a collective call."""
    for t in tensors:
        if not t.numel():
            continue
        # The tensor itself, or a copy if it has gaps, or bits that a view conjugates or negates.
        sent = t.resolve_conj().resolve_neg().contiguous()
        broadcast_from_first([flat_bytes(sent)], group)  # no backend carries every dtype
        if sent is not t:
            t.copy_(sent)
    torch.autograd.graph.increment_version(list(tensors))  # autograd does not notice writes to their bytes


class DeferredCheck:
    """Compares numbers that should be the same on all ranks: on the device at once, and on the host later.

    The host compares LAG calls later, when the copy from a GPU has normally finished, so that it does not wait. All
    ranks raise in the same call.
    """

    LAG = 2

    def __init__(self) -> None:
        self._pending: list[tuple[torch.cuda.Event | None, Tensor, Callable[[], str]]] = []

    def compare(self, numbers: Tensor, message: Callable[[], str]) -> Tensor:
        """Compares numbers on their device, and keeps them for `check`.

        Args:
            numbers: shape (world_size,), one for each rank.
            message: returns what `check` says of ranks whose number differs from the first rank's.

        Returns:
            bool, shape (): whether all are equal.
        """
        copy, event = numbers, None
        if numbers.is_cuda:
            copy = torch.empty(numbers.shape, dtype=numbers.dtype, device="cpu", pin_memory=True)
            copy.copy_(numbers, non_blocking=True)
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(numbers.device))
        self._pending.append((event, copy, message))
        return (numbers == numbers[0]).all()

    def clear(self) -> None:
        """Forgets the numbers that have not been compared by the host."""
        self._pending.clear()

    @property
    def under_way(self) -> bool:
        """Whether the host would have to wait for the numbers that were given last."""
        return bool(self._pending) and self._pending[-1][0] is not None

    def check(self, all: bool = False) -> None:
        """Compares on the host: all numbers that lie on the CPU, and on a GPU those of LAG calls ago.

        Call it after each `compare`.

        Args:
            all: compare the numbers of all calls, for which the host waits.

        Raises:
            ValueError: numbers differed.
        """
        while self._pending and (all or self._pending[0][0] is None or len(self._pending) > self.LAG):
            event, numbers, message = self._pending.pop(0)
            if event is not None:
                event.synchronize()
            first, *others = numbers.tolist()
            unlike = [r for r, other in enumerate(others, 1) if other != first]
            if unlike:
                self._pending.clear()
                raise ValueError(f"ranks {unlike} of the group {message()}")
