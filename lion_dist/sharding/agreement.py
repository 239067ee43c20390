"""Agreement between ranks: collective calls that succeed on every rank or fail on every rank.

Agreements carry text and must work when the ranks' tensors do not fit together, so they go through the process group's
key-value store, and use no device and no backend.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from datetime import timedelta
from types import TracebackType

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from .collectives import group_timeout, notes_of


class Agreement:
    """Context manager for a collective call, which ends in the same way on every rank of a group.

        with Agreement(group, "ShardedLion()") as agreement:
            agreement.says(["parameter 0: shape (3, 4)", ...])

    Args:
        group: the ranks.
        what: name of the call, for messages. Ranks that make different calls disagree.

    Raises:
        Exception: on leaving, what the body raised on this rank.
        RuntimeError: the body raised on other ranks only, or ranks are absent when the group's time-out ends.
        ValueError: the ranks said different things; the message names the first difference.
    """

    def __init__(self, group: dist.ProcessGroup, what: str) -> None:
        self._group = group
        self._what = what
        self._lines: list[str] = []
        self._rank = dist.get_rank(group)
        self._world_size = dist.get_world_size(group)
        self._timeout = group_timeout(group)
        # The store counts the calls, so that those on other process groups, which have other stores, do not count.
        store = notes_of(group)
        call = store.add(f"calls/{self._rank}", 1)
        self._store = c10d.PrefixStore(str(call), store)

    def says(self, lines: Sequence[str]) -> None:
        """Adds statements that must be the same on all ranks. They are compared line by line."""
        self._lines += lines

    def __enter__(self) -> Agreement:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not isinstance(error, Exception):
            return  # an interrupt: this process ends, and the other ranks will find it absent
        lines = [self._what, *self._lines]
        digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
        case = f"same {digest}" if error is None else f"error {type(error).__name__}: {error}"
        if self._world_size == 1:
            return
        try:
            self._store.set(f"case/{self._rank}", case)
            verdict = self._judge() if self._rank == 0 else self._await_verdict()
        except Exception:
            if error is not None:  # this rank's own error says more
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
        """On the first rank: reads every rank's case and publishes one verdict for all."""
        # The first rank waits for less time than the others, so that its verdict reaches them within the time-out.
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
        """Where ranks differ: finds the first line in which some rank differs from the first rank."""
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
                    f"different on the ranks. Only rank {extra} has: {more[min(len(first), len(other))]}. "
                    "They must be the same"
                )
        return "different on the ranks"

    def _part(self) -> None:
        """Lets the other ranks read the reason of a failure before the first rank ends, which may serve the store."""
        self._store.set(f"left/{self._rank}", "")
        if self._rank == 0:
            present = [r for r in range(self._world_size) if self._store.check([f"case/{r}"])]
            self._wait_for([f"left/{r}" for r in present], min(self._timeout, timedelta(seconds=10)))

    def _wait_for(self, keys: list[str], timeout: timedelta) -> list[int]:
        """Waits for keys of the store; returns the indices of those that are missing when the time-out ends."""
        try:
            self._store.wait(keys, timeout)
        except Exception:  # every kind of store has its own type of error for a time-out
            return [i for i, key in enumerate(keys) if not self._store.check([key])]
        return []

    def _absent(self, ranks: list[int]) -> str:
        if not ranks:
            return (
                f"the first rank of the group did not answer within the time-out of {self._timeout.total_seconds():g} s"
            )
        return (
            f"ranks {ranks} of the group did not make this collective call within the time-out of "
            f"{self._timeout.total_seconds():g} s. Call it on every rank. To continue, make a new process group"
        )


@contextlib.contextmanager
def agree(
    group: dist.ProcessGroup, others: Sequence[dist.ProcessGroup], what: str, of_others: Sequence[str]
) -> Iterator[Agreement]:
    """An `Agreement` of a group, whose failure the ranks of other groups learn of too.

    Args:
        group, what: as for `Agreement`.
        others: process groups whose ranks make the same call, each within a group of its own. Such a rank raises
            RuntimeError where the call has failed on a rank of these groups.
        of_others: lines that must be the same on all ranks of each of ``others``.
    """
    with contextlib.ExitStack() as outer:
        for other in reversed(others):
            outer.enter_context(Agreement(other, what)).says(of_others)
        with Agreement(group, what) as agreement:
            yield agreement


def meet(group: dist.ProcessGroup, call: str) -> None:
    """Waits until every rank of the group has made the same collective call; raises as `Agreement` does."""
    with Agreement(group, call):
        pass
