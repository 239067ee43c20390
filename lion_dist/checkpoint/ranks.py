"""The ranks that save or load together, or this process alone; and errors that all of them raise alike."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.utils import _DistWrapper

from ..sharded_lion import ShardedLion
from ..sharding.collectives import Agreement

T = TypeVar("T")
_gloo_groups: dict[tuple[int, ...], dist.ProcessGroup] = {}


class Ranks:
    """``group``: their process group; None: this process alone.

    ``steps``: runs a function on every rank; where it raises on any, every rank raises.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.steps = _DistWrapper(group, group is not None, 0)
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

    def on_gloo(self) -> Ranks:
        """The same ranks in a group of their own, for a thread beside the training, whose collectives must not mix
        with those of the training. Made once; a collective call then."""
        if self.group is None:
            return self
        ranks = tuple(dist.get_process_group_ranks(self.group))
        if ranks not in _gloo_groups or _gloo_groups[ranks] not in dist.distributed_c10d._world.pg_map:
            _gloo_groups[ranks] = dist.new_group(list(ranks), backend="gloo", use_local_synchronization=True)
        return Ranks(_gloo_groups[ranks])

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
    return kind(f"{what}: " + "; ".join(f"{cause} (on ranks {ranks})" for cause, ranks in told.items()))
