"""Exchange of flags between the ranks at the end of an interval: who had which gradients.

[Note: Which ranks read the flags]
A rank enqueues its flags for an all-reduce, and kernels read on the device which parameters are active. The host need
not wait for that. Only two outcomes concern the host: some rank has late gradients, so that all ranks must make another
round; or some rank has parameters that were unfrozen, so that all must shard them. Where waiting for the device would
cost time, a rank reads the outcome only if it has reason to expect one of these, and otherwise assumes that neither has
happened. It says so in a flag of its own. Where the assumption was wrong, the ranks that did read fail with an error
and abort the group, since the others are already on their way to other collectives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from ..upload import upload_bytes
from .collectives import Membership, start_all_reduce_max

# Types of devices whose collectives the host waits for in any case, so that it costs nothing to read their outcome.
WAITING_DEVICES = {"cpu"}

UNLIKE_PASSES = (
    "gradients arrived after their bucket had been reduced on some ranks, while others made a single backward pass "
    "since the last step(). Every rank must make the same backward passes and the same calls of step(). Did a rank "
    "leave out a step()? Where a pass does not reach every rank, put optimizer.no_sync() around all passes of a step "
    "but the last; where the ranks' models differ, use checkpoint(..., use_reentrant=False)"
)
UNLIKE_ZEROING = (
    "gradients that no step() had used were zeroed, but not those of every rank. Either some ranks did not zero them, "
    "or the backward before did not reach every rank. Zero gradients on every rank or on none, and let a pass whose "
    "gradients may be dropped reach a parameter on every rank, other than those unfrozen since the last step(), or put "
    "optimizer.no_sync() around it"
)
_UNLIKE_UNFREEZING = (
    "parameters were unfrozen, or have a gradient though they were frozen from the start, on some ranks and not on "
    "others: unfreeze the same parameters on every rank before the same step()"
)


def fail(membership: Membership, reason: str) -> NoReturn:
    """Aborts the group, so that the other ranks fail too and see the reason, and raises RuntimeError."""
    membership.fail(reason)
    membership.check()
    raise AssertionError("unreachable")


class RankFlags(NamedTuple):
    """Flags that one rank reports about its interval, beside the list of parameters for which it had a gradient.

    Attributes:
        late: Gradients remain in ``p.grad`` after its round.
        unfrozen: It has parameters that are trainable and not sharded yet.
        expects_late: It expects late gradients in every interval.
        dropped: The gradients of its round were zeroed.
        kept: They were not.
        unread: It does not read the outcome.
    """

    late: bool
    unfrozen: bool
    expects_late: bool
    dropped: bool
    kept: bool
    unread: bool


class FlagExchange:
    """All-reduces flags over the ranks and keeps those of the last exchange.

    A parameter is *active* if some rank had a gradient of it.

    Args:
        membership: the ranks.

    Attributes:
        expects_late: whether any rank is known to make several passes in an interval, or to use reentrant checkpoints.
            The outcome is read in every interval from then on.
    """

    def __init__(self, membership: Membership) -> None:
        self.expects_late = False
        self._membership = membership
        self._own = b""  # one byte per parameter, 1 where this rank had a gradient
        self._flags: Tensor | None = None  # uint8: one per parameter, 1 where any rank had a gradient; then RankFlags
        self._work: Any = None  # the all-reduce of the flags

    def forget(self) -> None:
        """Drops the flags, because the parameters will be others."""
        self.finish()
        self._own = b""
        self._flags = None

    def exchange(
        self,
        had_gradient: Sequence[bool],
        device: torch.device,
        *,
        late: bool,
        unfrozen: bool,
        dropped: bool,
        suspects: bool,
    ) -> tuple[bool, bool]:
        """Exchanges flags; a collective call. See [Note: Which ranks read the flags].

        Args:
            had_gradient: for each parameter, whether this rank had a gradient.
            device: device of the parameters.
            late, unfrozen, dropped: see `RankFlags`.
            suspects: whether this rank has another reason to read the outcome.

        Returns:
            Whether any rank has late gradients, and whether any has unfrozen parameters. Both are False on a rank that
            does not read the outcome.

        Raises:
            RuntimeError: the ranks have done different things.
        """
        reads = device.type in WAITING_DEVICES or late or unfrozen or dropped or suspects or self.expects_late
        own = RankFlags(late, unfrozen, self.expects_late, dropped, not dropped, not reads)
        self._own = bytes(had_gradient)
        self._flags = upload_bytes(self._own + bytes(own), device)
        with self._membership.collective() as group:
            self._work = start_all_reduce_max(self._flags, group)
        if not reads:
            return False, False
        self.finish()
        any_rank = RankFlags(*map(bool, self._flags[-len(own) :].tolist()))
        self.expects_late = any_rank.expects_late
        if any_rank.dropped and any_rank.kept:
            fail(self._membership, UNLIKE_ZEROING)
        if any_rank.late and any_rank.unread:
            fail(self._membership, UNLIKE_PASSES)
        if any_rank.unfrozen and any_rank.unread:
            fail(self._membership, _UNLIKE_UNFREEZING)
        return any_rank.late, any_rank.unfrozen

    def finish(self) -> None:
        """Makes what follows on the current stream see the flags."""
        if self._work is not None:
            with self._membership.collective():
                self._work.wait()
            self._work = None

    def active(self, first: int, count: int) -> Tensor | None:
        """Which of ``count`` parameters, from index ``first``, are active: uint8, shape (at least ``count``,), of which
        only the first ``count`` are meant; or None if all are. Call this before enqueuing the kernel that reads it."""
        if all(self._own[first : first + count]):
            return None  # This rank knows it without the others.
        self.finish()
        return None if self._flags is None else self._flags[first:]

    def none_active(self) -> bool:
        """Whether no parameter is active. The host does not wait if this rank had a gradient."""
        if 1 in self._own:
            return False
        self.finish()
        return self._flags is None or not self._flags[: len(self._own)].any()
