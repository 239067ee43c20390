"""The ranks that save or load together, or this process alone; and errors that all of them raise alike."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.distributed_c10d import default_pg_timeout

from .._torch_compat_distributed import is_known_group, rank_steps
from ..dtensors import is_dtensor
from ..sharded_lion import ShardedLion
from ..sharding.agreement import Agreement
from ..sharding.collectives import group_timeout

T = TypeVar("T")
_gloo_groups: dict[tuple[tuple[int, ...], timedelta], dist.ProcessGroup] = {}  # by ranks and time-out


class Ranks:
    """The ranks that save or load together.

    Args:
        group: their process group; None: this process alone.

    Attributes:
        group: as given.
        rank, size: this rank's number in the group, and the number of ranks.
        steps: runs a function on every rank. If it raises on any rank, every rank raises.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.steps = rank_steps(group)
        self.rank, self.size = self.steps.get_rank(), self.steps.get_world_size()

    @staticmethod
    def of(optimizer: object, group: dist.ProcessGroup | None) -> Ranks:
        """The ranks of ``group``; where it is None, those of a ShardedLion's group, unless its parameters are DTensors;
        else all ranks.

        Raises:
            ValueError: this rank is not in the group.
        """
        if group is None and isinstance(optimizer, ShardedLion):
            params = (p for of_group in optimizer.param_groups for p in of_group["params"])
            group = None if any(map(is_dtensor, params)) else optimizer.process_group
        if group is None and dist.is_available() and dist.is_initialized():
            group = dist.group.WORLD
        if group is not None and dist.get_rank(group) < 0:
            raise ValueError("this rank is not in process_group; call it on the group's ranks only")
        return Ranks(group)

    @property
    def timeout(self) -> timedelta:
        """How long their collectives wait for a rank."""
        return default_pg_timeout if self.group is None else group_timeout(self.group)

    def agree(self, what: str, check: Callable[[], tuple[T, list[str]]]) -> T:
        """Runs a check on every rank before anything is changed.

        Args:
            what: the call, for messages.
            check: raises if this rank cannot take part. Returns a value, and lines that must be equal on all ranks.

        Returns:
            The check's value.

        Raises:
            Exception: on every rank, if the check raised on any, or returned different lines.
        """
        if self.group is None:
            return check()[0]
        with Agreement(self.group, what) as agreement:
            value, lines = check()
            agreement.says(lines)
        return value

    def on_gloo(self) -> Ranks:
        """The same ranks in a gloo group of their own, with the same time-out. A collective call. It is made once.

        A thread that writes beside the training needs it, because collectives of the two must not mix.
        """
        if self.group is None:
            return self
        key = (tuple(dist.get_process_group_ranks(self.group)), self.timeout)

        def is_missing() -> bool:
            known = _gloo_groups.get(key)
            if known is not None and is_known_group(known):
                return False
            # Raise errors of this rank alone here, before other ranks wait for it in new_group().
            dist.ProcessGroupGloo.create_default_device()
            return True

        what = "lion_dist.checkpoint.async_save(), making a gloo group"
        missing = any(together(what, lambda: self.steps.all_gather("group", is_missing)))
        if missing:
            with Agreement(self.group, what):
                made = dist.new_group(list(key[0]), timeout=key[1], backend="gloo", use_local_synchronization=True)
            _gloo_groups[key] = made
        return Ranks(_gloo_groups[key])

    def forget_gloo(self) -> None:
        """Drops the gloo group after a collective has failed: the next `on_gloo` makes another."""
        for key in [key for key, group in _gloo_groups.items() if group is self.group]:
            del _gloo_groups[key]


def together(what: str, step: Callable[[], T]) -> T:
    """Runs a step of `Ranks.steps`, and converts its error.

    Args:
        what: the call, for messages.
        step: calls a method of `Ranks.steps`.

    Raises:
        Exception: from `as_error`, on every rank, if the step failed on any.
    """
    try:
        return step()
    except CheckpointException as error:
        raise as_error(error, what) from None


def as_error(error: CheckpointException, what: str) -> Exception:
    """Converts torch's exception, which is not an `Exception`, into one of the type that the first failing rank raised.

    Args:
        error: the failures of all ranks.
        what: the call, for the message.
    """
    causes: dict[str, list[int]] = {}
    for rank, (cause, _) in sorted(error.failures.items()):
        causes.setdefault(f"{type(cause).__name__}: {cause}", []).append(rank)
    _, (first, _) = min(error.failures.items())
    kinds = (FileExistsError, FileNotFoundError, ValueError, TypeError, OSError)
    kind = next((kind for kind in kinds if isinstance(first, kind)), RuntimeError)
    return kind(_printable(f"{what}: " + "; ".join(f"{cause} (on ranks {ranks})" for cause, ranks in causes.items())))


def _printable(text: str) -> str:
    """The text with control characters escaped as in Python's strings. Terminals act upon such characters, and an error
    raised in the user's code may quote some from a checkpoint."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode("ascii") for c in text)
