"""Access to a ShardedLion for other files of lion_dist, where its public methods are not enough."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor

from .frameworks import check_saves
from .hyper_values import to_max_norm
from .intake import describe_new
from .meshes import mesh_groups
from .param_groups import Group
from .sharding.agreement import Agreement, agree
from .state_entries import check_state
from .stepper import clip_together
from .update.state import StateColumn
from .upload import refuse_capture

if TYPE_CHECKING:
    from .sharded_lion import ShardedLion

# Errors of methods that ShardedLion has only to refuse them.
REFUSED_JOIN = (
    "ShardedLion does not work under torch.distributed.algorithms.join.Join: every rank must make the same number of "
    "steps. Give all ranks the same number of batches (DistributedSampler(drop_last=True))"
)
REFUSED_PICKLE = (
    "ShardedLion cannot be pickled or deep-copied: it holds a process group and a shard. Use full_state_dict()"
)


def agreeing(
    optimizer: ShardedLion, call: str, params: Iterable[Tensor] | None = None
) -> AbstractContextManager[Agreement]:
    """The agreement on a call, of which the ranks of the parameters' meshes learn too if it fails.

    Args:
        call: what follows the name of the class.
        params: the parameters; None: those of the optimizer.
    """
    params = params_of(optimizer) if params is None else params
    group = optimizer.process_group
    place = f"rank {dist.get_rank(group)} of {dist.get_world_size(group)} in process_group"
    return agree(group, mesh_groups(params, group), f"ShardedLion{call}", [place])


def params_of(optimizer: ShardedLion) -> list[Tensor]:
    """All parameters of the optimizer, in the order of its groups."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def add_group(optimizer: ShardedLion, param_group: Group) -> None:
    """See `ShardedLion.add_param_group`."""
    groups = optimizer.param_groups
    before = len(groups)
    try:
        with agreeing(optimizer, ".add_param_group()") as agreement:
            optimizer._append_group(param_group)
            agreement.says(describe_new(groups, before, optimizer.process_group))
        optimizer._take_in(groups[-1]["params"])
    except Exception:
        del groups[before:]
        raise


def check_last_steps(optimizer: ShardedLion) -> None:
    """Raises ValueError where hyper-parameters differed in one of the last steps, or param_groups or the state were
    replaced."""
    check_state(optimizer.state, optimizer._shards)
    optimizer._deferred.check(all=True)
    optimizer._stepper.check_groups(optimizer.param_groups)


def shard_with_columns(optimizer: ShardedLion, new: Mapping[Tensor, tuple[StateColumn, ...]], undo: ExitStack) -> None:
    """For the checkpoints: shards more parameters, with zeros in these columns; a collective call, as ``undo`` is."""
    undo.callback(optimizer._set_shards, optimizer._shards)  # first, as it is collective: this may fail on one rank
    optimizer._shard(list(new), {id(p): columns for p, columns in new.items()})


def refuse_offloaded(optimizer: ShardedLion, call: str) -> None:
    """Raises RuntimeError where `ShardedLion.offload_state` has moved the state to the CPU, as on every rank."""
    if any(shard.offloaded for shard in optimizer._shards):
        raise RuntimeError(
            f"{call} of a ShardedLion whose state is on the CPU after offload_state(): call reload_state() on every "
            "rank first. Until then the state can only be read, assigned to and saved"
        )


def clip_optimizers(
    optimizers: Sequence[ShardedLion], max_norm: float, process_groups: Iterable[dist.ProcessGroup]
) -> Tensor:
    """Clips the gradients of one or several optimizers together; see `clip_together`."""
    refuse_capture("clip_grad_norm_() of ShardedLion")
    max_norm = to_max_norm(max_norm)
    for optimizer in optimizers:
        refuse_offloaded(optimizer, "clip_grad_norm_()")
    clipped = [(optimizer._stepper, optimizer.param_groups, optimizer._adopt) for optimizer in optimizers]
    return clip_together(clipped, max_norm, process_groups)


def takes_loss_scale(optimizer: ShardedLion) -> bool:
    """Whether step() unscales the gradients. torch's GradScaler asks, and Lightning before it clips.

    Raises:
        RuntimeError: in stage 2, where neither can be done to ``p.grad``.
    """
    return optimizer._grads.takes_loss_scale()


def begin_step(optimizer: ShardedLion) -> None:
    """Drops the consolidated state, which is no longer that of this step.

    Raises:
        RuntimeError: step() was called in the capture of a CUDA graph, the state is offloaded, or a framework could not
            save it.
        ValueError: ``optimizer.state`` was replaced.
    """
    check_state(optimizer.state, optimizer._shards)
    refuse_capture("ShardedLion.step()")
    refuse_offloaded(optimizer, "step()")
    check_saves(optimizer)
    optimizer._consolidated = None
