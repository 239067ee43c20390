"""Collectives on tensors, and what an optimizer does when one of them fails.

All ranks of a group must make the same calls in the same order. In a group of one rank those that would leave every
tensor as it is do nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from .._torch_compat import foreach_div_
from .._torch_compat_distributed import (
    AllgatherOptions,
    all_gather_coalesced,
    all_gather_single,
    backend_name,
    backend_timeouts,
    group_devices,
    process_group_store,
    reduce_scatter_coalesced,
)

# Backends that can average. For the others, the sum is divided in one more pass over the result.
AVERAGING_BACKENDS = {"nccl", "gloo"}


class _Nothing:
    """A collective that had nothing to do."""

    def wait(self) -> None:
        pass


class _Works:
    """Several collectives that are under way, to be waited for as one."""

    def __init__(self, works: list[Any]) -> None:
        self._works = works

    def wait(self) -> None:
        for work in self._works:
            work.wait()


def _all_gather(
    group: dist.ProcessGroup, outputs: list[Tensor], inputs: list[Tensor], options: AllgatherOptions
) -> Any:
    # Both of gloo's threads assign the name of the collective they completed to one std::string without a lock (runLoop
    # of torch's ProcessGroupGloo.cpp). A name of more than 15 bytes lies on the heap and may be freed twice: with torch
    # 2.13 "ALLGATHER_COALESCED" beside any other collective corrupts memory within seconds. Other names are short.
    if backend_name(group, outputs[0].device) == "gloo":
        pairs = zip(outputs, inputs, strict=True)
        return _Works([all_gather_single(whole, part, group=group, async_op=True) for whole, part in pairs])
    return all_gather_coalesced(group, outputs, inputs, options)


def start_all_gather(buffers: Sequence[Tensor], group: dist.ProcessGroup) -> Any:
    """Starts to complete buffers of which each rank holds one part: one coalesced group of all-gathers, beside the
    current stream.

    Args:
        buffers: at least one, 1-D, contiguous, of one dtype and device, with lengths that are divisible by the group's
            size and the same on every rank. Rank r holds the r-th of equal parts, where it lies.

    Returns:
        The work to `wait` for before anything reads the buffers.
    """
    rank, world_size = group.rank(), group.size()
    if world_size == 1:
        return _Nothing()
    lengths = [buffer.numel() // world_size for buffer in buffers]
    parts = [buffer.narrow(0, rank * n, n) for buffer, n in zip(buffers, lengths, strict=True)]
    options = AllgatherOptions()
    options.asyncOp = True
    return _all_gather(group, list(buffers), parts, options)


def all_gather_in_place(buffers: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Completes buffers as `start_all_gather` does, and waits. There may be no buffers."""
    if buffers:
        start_all_gather(buffers, group).wait()


class Reduction:
    """A group of reduce-scatters that is under way. The caller keeps its tensors until `wait` has been called."""

    def __init__(self, work: Any, outputs: list[Tensor], divisor: int) -> None:
        self._work = work
        self._outputs = outputs
        self._divisor = divisor

    def wait(self) -> None:
        """Makes the current stream, or on the CPU the host, wait for the averages."""
        self._work.wait()
        if self._divisor != 1:
            foreach_div_(self._outputs, self._divisor)


def reduce_scatter_mean(outputs: list[Tensor], inputs: Sequence[Tensor], group: dist.ProcessGroup) -> Reduction:
    """Starts to average tensors over the group, each part on one rank: one coalesced group of reduce-scatters, beside
    the current stream.

    Args:
        outputs: at least one, 1-D. Rank r gets the average of the r-th of the input's equal parts.
        inputs: 1-D, contiguous, each as long as its output times the group's size, in the output's dtype.
    """
    averages = backend_name(group, inputs[0].device) in AVERAGING_BACKENDS
    options = dist.ReduceScatterOptions()
    options.reduceOp = dist.ReduceOp(dist.ReduceOp.AVG if averages else dist.ReduceOp.SUM)
    options.asyncOp = True
    work = reduce_scatter_coalesced(group, outputs, list(inputs), options)
    return Reduction(work, outputs, 1 if averages else dist.get_world_size(group))


def start_all_to_all(output: Tensor, source: Tensor, group: dist.ProcessGroup) -> Any:
    """Starts to send row r of ``source`` to rank r, beside the current stream. Row r of ``output`` comes from rank r.

    Args:
        output, source: contiguous, of one shape whose first dimension is the group's size, and one dtype.

    Returns:
        The work to `wait` for before anything reads the output or writes the source.
    """
    # As bytes: backends do not know every dtype.
    as_bytes = [t.view(torch.uint8).view(-1) for t in (output, source)]
    return dist.all_to_all_single(as_bytes[0], as_bytes[1], group=group, async_op=True)


def broadcast_from_first(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Overwrites dense tensors with those of the group's first rank."""
    if group.size() == 1:
        return
    source = dist.get_global_rank(group, 0)
    works = [dist.broadcast(t, src=source, group=group, async_op=True) for t in tensors]
    for work in works:
        work.wait()


def all_reduce_sum(tensor: Tensor, group: dist.ProcessGroup) -> None:
    """Sums a tensor over the group, in place."""
    if group.size() == 1:
        return
    dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=group)


def all_reduced(tensor: Tensor, group: dist.ProcessGroup, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """Reduces a copy of a tensor over the group.

    The copy is on a device for which the group has a backend. NCCL has none for the CPU, where FSDP2 may keep
    gradients: their sum is reduced on the current GPU.

    Returns:
        The result, on the device of ``tensor``; ``tensor`` itself in a group of one rank.
    """
    if group.size() == 1:
        return tensor
    types = device_types(group)
    device = tensor.device
    if device.type not in types:
        device = torch.device("cpu" if "cpu" in types else min(types))
    sent = tensor.to(device, copy=True)
    dist.all_reduce(sent, op, group=group)
    return sent.to(tensor.device)


def start_all_reduce_max(tensor: Tensor, group: dist.ProcessGroup) -> Any:
    """Starts to replace a tensor by its maximum over the group, beside the current stream.

    Returns:
        The work to `wait` for before anything reads the tensor.
    """
    if group.size() == 1:
        return _Nothing()
    return dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group, async_op=True)


_UNKNOWN_CAUSE = (
    "the ranks must make the same calls in the same order, but one may have ended, raised an error or left out a call"
)


@contextlib.contextmanager
def explaining(group: dist.ProcessGroup, cause: Callable[[], str] = lambda: _UNKNOWN_CAUSE) -> Iterator[None]:
    """Context manager around collectives on the group, which adds a possible cause to their errors.

    Args:
        cause: called when a collective fails; returns the cause.
    """
    try:
        yield
    except RuntimeError as error:
        raise _explained(error, cause) from error


def _explained(error: RuntimeError, cause: Callable[[], str]) -> RuntimeError:
    return RuntimeError(f"a collective of ShardedLion failed: {cause()}. ({error})")


class Membership:
    """One optimizer's part in a process group: whether this rank still takes part in its collectives.

    A rank that fails leaves a note in the group's key-value store, which the other ranks quote in their errors. All
    ranks of the group make their memberships in the same order.

    Attributes:
        group: the process group.
        failure: the reason why this rank no longer takes part, or "".
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.failure = ""
        self._rank, self._world_size = dist.get_rank(group), dist.get_world_size(group)
        # The notes belong to this optimizer alone, because the failure of another one is not the cause of this one's.
        # All ranks count their memberships, so that those with the same number belong together.
        store = notes_of(group)
        number = store.add(f"optimizers/{self._rank}", 1)
        self._notes = c10d.PrefixStore(f"optimizer{number}", store)
        self._questions = 0

    def check(self) -> None:
        """Raises RuntimeError if this rank no longer takes part."""
        if self.failure:
            raise RuntimeError(f"this ShardedLion can no longer be used: {self.failure}")

    @contextlib.contextmanager
    def collective(self) -> Iterator[dist.ProcessGroup]:
        """Context manager around collectives on the group. After one has failed, this rank no longer takes part."""
        try:
            yield self.group
        except RuntimeError as error:
            explained = _explained(error, self._cause)
            self.leave(str(explained))
            raise explained from error

    @contextlib.contextmanager
    def completing(self, what: str) -> Iterator[None]:
        """Context manager around work that cannot be left half done, as other ranks count on its collectives. After an
        exception of any kind this rank no longer takes part; see `fail`.

        Args:
            what: names the work in the messages.
        """
        try:
            yield
        except BaseException as error:
            self.fail(f"{what} raised {type(error).__name__}: {error}")
            raise

    def _cause(self) -> str:
        with contextlib.suppress(Exception):  # the process that serves the store may have ended
            if self._notes.check(["failed"]):
                return self._notes.get("failed").decode()
        return _UNKNOWN_CAUSE

    def any_rank(self, *facts: bool) -> list[bool]:
        """Whether each of the facts is true on any rank; a collective call.

        The host waits for the other ranks' hosts and for no device, since the answer goes through the key-value store.
        """
        if self._world_size == 1:
            return list(facts)
        self._questions += 1
        store = c10d.PrefixStore(f"question{self._questions}", self._notes)
        with self.collective():
            for i, fact in enumerate(facts):
                if fact:
                    store.set(str(i), "")
            if store.add("answers", 1) == self._world_size:
                store.set("all", "")
            store.wait(["all"], group_timeout(self.group))
            return [store.check([str(i)]) for i in range(len(facts))]

    def leave(self, reason: str) -> None:
        """Ends this rank's part. The other ranks do not learn of it."""
        self.failure = self.failure or reason

    def fail(self, reason: str) -> None:
        """Ends this rank's part, leaves the reason for the other ranks, and aborts the group on this rank.

        Collectives that are under way end, and later ones raise. The other ranks' errors quote the reason.
        """
        if self.failure:
            return
        self.leave(f"{reason}. Its process group has been aborted; restart from a checkpoint")
        with contextlib.suppress(Exception):  # without a store there are no readers either
            self._notes.compare_set("failed", "", f"rank {self._rank} of the group: {reason}")
        with contextlib.suppress(Exception):  # not every backend can be aborted
            self.group.abort()


def notes_of(group: dist.ProcessGroup) -> c10d.PrefixStore:
    """lion_dist's part of the group's key-value store."""
    return c10d.PrefixStore(f"lion_dist/{group.group_name}", process_group_store(group))


def group_timeout(group: dist.ProcessGroup) -> timedelta:
    """The time for which the group's collectives wait for a rank."""
    return max(backend_timeouts(group), default=c10d.default_pg_timeout)


def device_types(group: dist.ProcessGroup) -> set[str]:
    """The types of devices for which the group has a backend."""
    return {torch.device(d).type for d in group_devices(group)}


def check_device(device: torch.device, group: dist.ProcessGroup) -> None:
    """Raises ValueError where the group has no backend for tensors on this device."""
    types = device_types(group)
    if device.type not in types:
        raise ValueError(
            f"parameters are on {device}, but the process group ({dist.get_backend(group)}) carries tensors on "
            f"{sorted(types)}: move the model to its device before making the optimizer, or use another group"
        )
