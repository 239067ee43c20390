"""Collectives on tensors, and agreement between ranks.

Tensors travel over the process group's backend; agreements, which carry text and must work when the
ranks no longer fit together, go through the group's key-value store, with no device and no backend.
All ranks of a group must make the same calls in the same order, as with any collective.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from types import TracebackType
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

# Backends that average by themselves, without one more pass over the result.
AVERAGING_BACKENDS = {"nccl", "gloo"}


class _Works:
    """Collectives under way, as one."""

    def __init__(self, works: list[Any]) -> None:
        self._works = works

    def wait(self) -> None:
        for work in self._works:
            work.wait()


def _all_gather(
    group: dist.ProcessGroup, outputs: list[Tensor], inputs: list[Tensor], options: AllgatherOptions
) -> Any:
    # Both of gloo's threads assign the name of what they completed to one std::string, unguarded (runLoop of torch's
    # ProcessGroupGloo.cpp). A name of more than 15 bytes lies on the heap, and may be freed twice: with torch 2.13
    # "ALLGATHER_COALESCED" beside any other collective corrupts memory within seconds. Others' names are short.
    if backend_name(group, outputs[0].device) == "gloo":
        pairs = zip(outputs, inputs, strict=True)
        return _Works([all_gather_single(whole, part, group=group, async_op=True) for whole, part in pairs])
    return all_gather_coalesced(group, outputs, inputs, options)


def start_all_gather(buffers: Sequence[Tensor], group: dist.ProcessGroup) -> Any:
    """Starts completing buffers of which each rank holds one part: one coalesced group of all-gathers, beside the
    current stream.

    Args:
        buffers: 1-D, contiguous, of one dtype and device, lengths divisible by the group's size; rank
            r's part is the r-th of equal parts, where it lies. The same lengths on every rank. At least one.

    Returns:
        What to `wait` for before anything reads them.
    """
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    lengths = [buffer.numel() // world_size for buffer in buffers]
    parts = [buffer.narrow(0, rank * n, n) for buffer, n in zip(buffers, lengths, strict=True)]
    options = AllgatherOptions()
    options.asyncOp = True
    return _all_gather(group, list(buffers), parts, options)


def all_gather_in_place(buffers: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """`start_all_gather`, waited for; of nothing, nothing."""
    if buffers:
        start_all_gather(buffers, group).wait()


class Reduction:
    """A group of reduce-scatters under way. Its tensors must be kept until `wait` has been called."""

    def __init__(self, work: Any, outputs: list[Tensor], divisor: int) -> None:
        self._work = work
        self._outputs = outputs
        self._divisor = divisor

    def wait(self) -> None:
        """Makes what follows on the current stream see the averages (on the CPU: waits for them)."""
        self._work.wait()
        if self._divisor != 1:
            foreach_div_(self._outputs, self._divisor)


def reduce_scatter_mean(outputs: list[Tensor], inputs: Sequence[Tensor], group: dist.ProcessGroup) -> Reduction:
    """Starts averaging tensors over the group, of which each rank gets one part: one coalesced group of
    reduce-scatters, beside the current stream.

    Args:
        outputs: 1-D; rank r's part of the average is the r-th of the input's equal parts. At least one.
        inputs: 1-D, contiguous, each the group's size times as long as its output, of the output's dtype.
    """
    averages = backend_name(group, inputs[0].device) in AVERAGING_BACKENDS
    options = dist.ReduceScatterOptions()
    options.reduceOp = dist.ReduceOp(dist.ReduceOp.AVG if averages else dist.ReduceOp.SUM)
    options.asyncOp = True
    work = reduce_scatter_coalesced(group, outputs, list(inputs), options)
    return Reduction(work, outputs, 1 if averages else dist.get_world_size(group))


def broadcast_from_first(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Overwrites dense tensors with those of the group's first rank."""
    source = dist.get_global_rank(group, 0)
    works = [dist.broadcast(t, src=source, group=group, async_op=True) for t in tensors]
    for work in works:
        work.wait()


def all_reduce_sum(tensor: Tensor, group: dist.ProcessGroup) -> None:
    """Sums a tensor over the group, in place."""
    dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=group)


def start_all_reduce_max(tensor: Tensor, group: dist.ProcessGroup) -> Any:
    """Starts taking the maximum of a tensor over the group, in place, beside the current stream.

    Returns:
        What to `wait` for before anything reads it.
    """
    return dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group, async_op=True)


_UNKNOWN_CAUSE = "the ranks must make the same calls in the same order, and one may have ended, raised or left one out"


@contextlib.contextmanager
def explaining(group: dist.ProcessGroup, cause: Callable[[], str] = lambda: _UNKNOWN_CAUSE) -> Iterator[None]:
    """Around collectives on the group: an error says what may have caused it.

    Args:
        cause: called where a collective fails.
    """
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(f"a collective of ShardedLion failed: {cause()}. ({error})") from error


class Membership:
    """One optimizer's part in a process group: whether this rank can still take part in its collectives, and what the
    ranks tell each other where they fail.

    To be made by all ranks of the group, in the same order if there are several.

    Attributes:
        failure: why this rank can take part no more, or "".
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.failure = ""
        self._rank, self._world_size = dist.get_rank(group), dist.get_world_size(group)
        # Notes of this optimizer alone: another one's failure is not the cause of this one's. All ranks count alike.
        store = _notes(group)
        number = store.add(f"optimizers/{self._rank}", 1)
        self._notes = c10d.PrefixStore(f"optimizer{number}", store)
        self._questions = 0

    def check(self) -> None:
        """Raises if it cannot."""
        if self.failure:
            raise RuntimeError(f"this ShardedLion can go on no more: {self.failure}")

    @contextlib.contextmanager
    def collective(self) -> Iterator[dist.ProcessGroup]:
        """Around collectives on the group: one that fails is the last, and says why."""
        try:
            with explaining(self.group, self._cause):
                yield self.group
        except RuntimeError as error:
            self.leave(str(error))
            raise

    def _cause(self) -> str:
        with contextlib.suppress(Exception):  # the store may be gone
            if self._notes.check(["failed"]):
                return self._notes.get("failed").decode()
        return _UNKNOWN_CAUSE

    def any_rank(self, *facts: bool) -> list[bool]:
        """For each fact, whether it is true on any rank. A collective call, in which the host waits for the other
        ranks' hosts and for no device: nothing is put on the process group."""
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
        """Takes part no more; the others are not told."""
        self.failure = self.failure or reason

    def fail(self, reason: str) -> None:
        """Leaves word for the others, who read it when their own collectives fail, and aborts the group here:
        collectives under way end, later ones raise."""
        if self.failure:
            return
        self.leave(f"{reason}. Its process group has been aborted; restart from a checkpoint")
        with contextlib.suppress(Exception):  # a store that is gone has no readers either
            self._notes.compare_set("failed", "", f"rank {self._rank} of the group: {reason}")
        with contextlib.suppress(Exception):  # not every backend can
            self.group.abort()


def _notes(group: dist.ProcessGroup) -> c10d.PrefixStore:
    return c10d.PrefixStore(f"lion_dist/{group.group_name}", process_group_store(group))


class Agreement:
    """A collective call that every rank of a group enters, states its case in, and leaves alike.

        with Agreement(group, "ShardedLion()") as agreement:
            agreement.says(["parameter 0: shape (3, 4)", ...])

    Leaving it: if the body raised on any rank, it raises on all of them (the local error where there
    is one); if the ranks said different things, ValueError names the first difference; if ranks are
    absent when the time-out ends, RuntimeError names them. Otherwise every rank said the same.

    Args:
        what: the call, for messages; ranks in different calls disagree.
    """

    def __init__(self, group: dist.ProcessGroup, what: str) -> None:
        self._group = group
        self._what = what
        self._lines: list[str] = []
        self._rank = dist.get_rank(group)
        self._world_size = dist.get_world_size(group)
        self._timeout = group_timeout(group)
        # Counted in the store, so that calls of another process group, with another store, do not count.
        store = _notes(group)
        call = store.add(f"calls/{self._rank}", 1)
        self._store = c10d.PrefixStore(str(call), store)

    def says(self, lines: Sequence[str]) -> None:
        """What this rank holds to be true on all ranks, compared line by line."""
        self._lines += lines

    def __enter__(self) -> Agreement:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not isinstance(error, Exception):
            return  # an interrupt: this process is going away, the others will miss it
        lines = [self._what, *self._lines]
        digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
        case = f"same {digest}" if error is None else f"error {type(error).__name__}: {error}"
        if self._world_size == 1:
            return
        try:
            self._store.set(f"case/{self._rank}", case)
            verdict = self._judge() if self._rank == 0 else self._await_verdict()
        except Exception:
            if error is not None:  # whatever became of the others, this rank's own error says more
                return
            raise
        if verdict == "agreed":
            return
        if error is not None:
            self._part()
            return
        if verdict == "differ":
            verdict = self._explain(lines)
        self._part()
        raise (ValueError if verdict.startswith("differ") else RuntimeError)(f"{self._what}: {verdict}")

    def _judge(self) -> str:
        """The first rank reads every case and publishes one verdict for all."""
        # Less than the others wait, so that they hear from it within the time-out.
        absent = self._wait_for([f"case/{r}" for r in range(self._world_size)], self._timeout * 0.8)
        if absent:
            verdict = self._absent(absent)
        else:
            cases = [self._store.get(f"case/{r}").decode() for r in range(self._world_size)]
            errors = [f"rank {r} failed with {c[6:]}" for r, c in enumerate(cases) if c.startswith("error ")]
            verdict = "; ".join(errors) or ("agreed" if len(set(cases)) == 1 else "differ")
        self._store.set("verdict", verdict)
        return verdict

    def _await_verdict(self) -> str:
        if self._wait_for(["verdict"], self._timeout):
            return self._absent([r for r in range(self._world_size) if not self._store.check([f"case/{r}"])])
        return self._store.get("verdict").decode()

    def _explain(self, lines: list[str]) -> str:
        """Only where ranks differ: finds the first line in which some rank differs from the first rank."""
        self._store.set(f"lines/{self._rank}", "\n".join(lines))
        keys = [f"lines/{r}" for r in range(self._world_size)]
        absent = self._wait_for(keys, self._timeout)
        if absent:
            return self._absent(absent)
        first = self._store.get(keys[0]).decode().split("\n")
        for r in range(1, self._world_size):
            other = self._store.get(keys[r]).decode().split("\n")
            for a, b in zip(first, other, strict=False):
                if a != b:
                    return f"different on the ranks. Rank 0: {a}. Rank {r}: {b}. They must be the same"
            if len(first) != len(other):
                extra, more = (0, first) if len(first) > len(other) else (r, other)
                return (
                    f"different on the ranks. Rank {extra} alone has: {more[min(len(first), len(other))]}. "
                    "They must be the same"
                )
        return "different on the ranks"

    def _part(self) -> None:
        """Where the call fails, the first rank may be the store's server and about to exit: it lets the
        others read why first."""
        self._store.set(f"left/{self._rank}", "")
        if self._rank == 0:
            present = [r for r in range(self._world_size) if self._store.check([f"case/{r}"])]
            self._wait_for([f"left/{r}" for r in present], min(self._timeout, timedelta(seconds=10)))

    def _wait_for(self, keys: list[str], timeout: timedelta) -> list[int]:
        """The indices of the keys that are not there when the time-out ends."""
        try:
            self._store.wait(keys, timeout)
        except Exception:  # each store has an error type of its own for a time-out
            return [i for i, key in enumerate(keys) if not self._store.check([key])]
        return []

    def _absent(self, ranks: list[int]) -> str:
        if not ranks:
            return f"the first rank of the group was too late: nothing within {self._timeout.total_seconds():g} s"
        return (
            f"a collective call, but ranks {ranks} of the group did not make it within the time-out of "
            f"{self._timeout.total_seconds():g} s. Call it on every rank; to go on, make a new process group"
        )


def meet(group: dist.ProcessGroup, call: str) -> None:
    """Waits until every rank of the group has made the same collective call.

    Raises:
        RuntimeError, ValueError: as an `Agreement` that is left; ranks are absent, or in another call.
    """
    with Agreement(group, call):
        pass


def group_timeout(group: dist.ProcessGroup) -> timedelta:
    """How long the group's collectives wait for a rank."""
    return max(backend_timeouts(group), default=c10d.default_pg_timeout)


def device_types(group: dist.ProcessGroup) -> set[str]:
    """The types of devices whose tensors the group's backends carry."""
    return {torch.device(d).type for d in group_devices(group)}


def check_device(device: torch.device, group: dist.ProcessGroup) -> None:
    """Raises where the group's backend cannot carry tensors of this device."""
    types = device_types(group)
    if device.type not in types:
        raise ValueError(
            f"parameters are on {device}, but the process group ({dist.get_backend(group)}) carries tensors on "
            f"{sorted(types)}: move the model to its device before making the optimizer, or use another group"
        )
