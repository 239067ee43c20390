"""The ranks that save or load together, or this process alone; and errors that all of them raise alike."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.distributed_c10d import default_pg_timeout

from .._torch_compat_distributed import is_known_group, rank_steps
from ..sharded_lion import ShardedLion
from ..sharding.collectives import Agreement, group_timeout

T = TypeVar("T")
_gloo_groups: dict[tuple[tuple[int, ...], timedelta], dist.ProcessGroup] = {}  # by ranks and time-out


class Ranks:
    """``group``: their process group; None: this process alone.

    ``steps``: runs a function on every rank; where it raises on any, every rank raises.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.steps = rank_steps(group)
        self.rank, self.size = self.steps.get_rank(), self.steps.get_world_size()

    @staticmethod
    def of(optimizer: object, group: dist.ProcessGroup | None) -> Ranks:
        """Those of ``group``; where it is None, of a ShardedLion's group, else all there are."""
        if group is None and isinstance(optimizer, ShardedLion):
            group = optimizer.process_group
        if group is None and dist.is_available() and dist.is_initialized():
            group = dist.group.WORLD
        if group is not None and dist.get_rank(group) < 0:
            raise ValueError("this rank is not in process_group; call it on the group's ranks only")
        return Ranks(group)

    @property
    def timeout(self) -> timedelta:
        """How long their collectives wait for a rank."""
        return default_pg_timeout if self.group is None else group_timeout(self.group)

    def on_gloo(self) -> Ranks:
        """The same ranks in a group of their own with the same time-out, for a thread beside the training, whose
        collectives must not mix with those of the training. A collective call; the group is made once."""
        if self.group is None:
            return self
        key = (tuple(dist.get_process_group_ranks(self.group)), self.timeout)

        def lacks() -> bool:
            known = _gloo_groups.get(key)
            if known is not None and is_known_group(known):
                return False
            # What can fail on one rank alone fails here, before others wait for it in new_group().
            dist.ProcessGroupGloo.create_default_device()
            return True

        what = "lion_dist.checkpoint.async_save(), making a gloo group"
        try:
            lacking = any(self.steps.all_gather("group", lacks))
        except CheckpointException as error:
            raise as_error(error, what) from None
        if lacking:
            with Agreement(self.group, what):
                made = dist.new_group(list(key[0]), timeout=key[1], backend="gloo", use_local_synchronization=True)
            _gloo_groups[key] = made
        return Ranks(_gloo_groups[key])

    def forget_gloo(self) -> None:
        """After a failed collective: the next `on_gloo` makes another group."""
        for key in [key for key, group in _gloo_groups.items() if group is self.group]:
            del _gloo_groups[key]

    def agreeing(self, what: str) -> AbstractContextManager[Agreement | None]:
        """Around what every rank does by itself before anything is changed: see `Agreement`."""
        return nullcontext() if self.group is None else Agreement(self.group, what)


def as_error(error: CheckpointException, what: str) -> Exception:
    """torch's exception, which is no Exception, as one of the type that the first rank to fail raised."""
    told: dict[str, list[int]] = {}
    for rank, (cause, _) in sorted(error.failures.items()):
        told.setdefault(f"{type(cause).__name__}: {cause}", []).append(rank)
    _, (first, _) = min(error.failures.items())
    kinds = (FileExistsError, FileNotFoundError, ValueError, TypeError, OSError)
    kind = next((kind for kind in kinds if isinstance(first, kind)), RuntimeError)
    return kind(shown(f"{what}: " + "; ".join(f"{cause} (on ranks {ranks})" for cause, ranks in told.items())))


def shown(text: str) -> str:
    """The text without characters that a terminal would act upon, which a checkpoint may have put into an error's
    message by way of users' code: they are escaped as in Python's strings."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode("ascii") for c in text)
