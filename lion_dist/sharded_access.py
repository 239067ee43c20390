"""What other files of lion_dist do to a ShardedLion beyond its public methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor

from .stepper import clip_together
from .update.state import StateColumn

if TYPE_CHECKING:
    from .sharded_lion import ShardedLion


def check_last_steps(optimizer: ShardedLion) -> None:
    """Raises ValueError where hyper-parameters differed in one of the last steps, or param_groups were changed."""
    optimizer._deferred.check(all=True)
    optimizer._stepper.check_groups(optimizer.param_groups)


def shard_with_columns(optimizer: ShardedLion, new: Mapping[Tensor, tuple[StateColumn, ...]], undo: ExitStack) -> None:
    """For the checkpoints: shards more parameters, with zeros in these columns; a collective call, as ``undo`` is."""
    undo.callback(optimizer._set_shards, optimizer._shards)  # first, as it is collective: this may fail on one rank
    optimizer._shard(list(new), {id(p): columns for p, columns in new.items()})


def clip_optimizers(
    optimizers: Sequence[ShardedLion], max_norm: float, process_groups: Sequence[dist.ProcessGroup]
) -> Tensor:
    """Clips the gradients of one or several optimizers together; see `clip_together`."""
    if not max_norm > 0:
        raise ValueError(f"max_norm must be > 0, got {max_norm}")
    clipped = [(optimizer._stepper, optimizer.param_groups, optimizer._adopt) for optimizer in optimizers]
    return clip_together(clipped, max_norm, process_groups)
