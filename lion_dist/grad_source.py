"""Where the gradients of a step come from: one class for each stage.

`LocalGrads` reads ``p.grad``, which something else has averaged over the ranks. `ReducedGrads` averages gradients
itself, each part on the rank that owns it. `ShardedLion` makes one of them and never asks which it is.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from .clipping import same_gradients
from .dtensors import local_gradients
from .dtypes import dtype_of
from .frozen import takes_part
from .hyper_values import shown, to_float
from .plain_beside_sharded import PlainGradients
from .sharding.all_to_all import AllToAllAverage
from .sharding.averaged import AveragedGradients
from .sharding.bucket_average import BucketAverage, OneRankAverage, ReduceScatterAverage
from .sharding.collectives import Membership
from .sharding.grad_reducer import GradReducer
from .sharding.layout import Run
from .sharding.shard import Shard
from .update.backends import takes_triton
from .update.segments import StepTensors


def check_reduction(stage: int, bucket_mb: float, reduce_dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Checks arguments of `make_grad_source`.

    Returns:
        ``reduce_dtype``, which may be a name ("bfloat16"), as a dtype.

    Raises:
        ValueError, TypeError: no `GradSource` can be made from them.
    """
    if stage not in (1, 2):
        raise ValueError(f"stage must be 1 or 2, got {stage!r}")
    if not 0 < to_float(bucket_mb, "bucket_mb") < math.inf:
        raise ValueError(f"bucket_mb must be > 0 and finite, got {bucket_mb!r}")
    if reduce_dtype is None:
        return None
    dtype = dtype_of(reduce_dtype) if isinstance(reduce_dtype, str) else reduce_dtype
    got = f"reduce_dtype must be None or torch.bfloat16, got {shown(reduce_dtype)}"
    if not isinstance(dtype, torch.dtype):
        raise TypeError(got)
    if dtype != torch.bfloat16:
        raise ValueError(got + _REFUSED_DTYPES.get(dtype, ""))
    if stage == 1:
        raise ValueError(
            "reduce_dtype is for stage=2: with stage=1 DistributedDataParallel reduces the gradients. Use stage=2, or "
            "register torch's bf16_compress_hook with DistributedDataParallel"
        )
    return dtype


_REFUSED_DTYPES = {
    torch.float32: ". float32 gradients are reduced in float32 with None; bfloat16 gradients are sent as they are and "
    "added up in float32 with torch.bfloat16",
    torch.float16: ". Gradients above 65504 would become infinite in float16, and those below 3e-8 zero",
}


class GradSource(Protocol):
    """The gradients of sharded parameters. Shards are counted as in the last `set_shards`.

    A step calls `reduce`, then `grads_of` for every shard, then `ready` for each shard before it is stepped, and then
    `finish`.
    """

    def set_shards(self, shards: Sequence[Shard]) -> None:
        """Takes other shards; a collective call."""

    def start_of(self, run: Run) -> int:
        """Where the gradient of a run that this rank owns begins in what `grads_of` gives for its parameter."""

    def settle(self) -> None:
        """Completes on every rank what a backward has begun, so that other collectives can follow; collective."""

    def reduce(self, frozen: Sequence[Tensor]) -> list[int]:
        """Starts bringing every gradient to the rank that owns it; a collective call.

        Args:
            frozen: parameters that are not sharded because they were frozen.

        Returns:
            Indices of those that take part by now. If there are any, shard them and call this again.
        """

    def grads_of(self, shard: int) -> list[Tensor | None]:
        """One tensor for each parameter of a shard: its gradient, or a flat buffer that holds it."""

    def ready(self, shard: int) -> Tensor | None:
        """Makes the current stream wait for the gradients of a shard.

        Returns:
            uint8, 1-D, with an element for each parameter of the shard, which is 0 where no rank has a gradient. Others
            mean nothing. None: no rank has a gradient where `grads_of` gives None, and only there.
        """

    def finish(self) -> None:
        """Makes the current stream wait for all that is under way."""

    def check(self, tensors: Sequence[StepTensors]) -> None:
        """Raises ValueError, on every rank, where the gradients in ``tensors`` cannot be stepped with."""

    def fingerprint(self) -> int:
        """A number of 32 bits, the same on every rank if `grads_of` last gave gradients of the same parameters."""

    def none_active(self) -> bool:
        """Whether no rank had a gradient of any sharded parameter in the last step."""

    def snapshot(self) -> Callable[[], bool]:
        """Returns a function that says whether this rank's gradients are still what they are now."""

    def hold(self, measured: bool) -> None:
        """Says whether the gradients have been measured, to be clipped or shown, and not been stepped with yet."""

    def zeroing(self, set_to_none: bool, frozen: Sequence[Tensor]) -> AbstractContextManager[None]:
        """Context manager around the zeroing of ``p.grad``."""

    def no_sync(self) -> AbstractContextManager[None]:
        """Context manager in which gradients accumulate without being reduced."""

    def takes_loss_scale(self) -> bool:
        """Whether step() unscales the gradients. Raises RuntimeError where GradScaler cannot do it either."""


def make_grad_source(
    stage: int, membership: Membership, bucket_mb: float, reduce_dtype: torch.dtype | None, use_triton: bool | None
) -> GradSource:
    """The source of gradients of a stage of ZeRO; see `ShardedLion` for the arguments, and `check_reduction`."""
    if stage == 1:
        return LocalGrads(membership)
    bucket_bytes = math.ceil(bucket_mb * 2**20)
    average: BucketAverage = ReduceScatterAverage(membership)
    if reduce_dtype is not None:
        average = AllToAllAverage(membership, partial(takes_triton, use_triton))
    elif membership.group.size() == 1:
        average = OneRankAverage()
    return ReducedGrads(membership, average, bucket_bytes)


class LocalGrads:
    """Stage 1: ``p.grad`` as DistributedDataParallel leaves it, averaged, and None on all ranks or on none."""

    def __init__(self, membership: Membership) -> None:
        self._membership = membership
        self._several = dist.get_world_size(membership.group) > 1
        # Nothing else would notice that gradients are not averaged.
        self._averaged = AveragedGradients(membership.group)
        self._plain = PlainGradients(membership)
        self._shards: list[Shard] = []
        self._present: list[bytes] = []  # for each shard, 1 where a parameter had a gradient when `grads_of` was called

    def set_shards(self, shards: Sequence[Shard]) -> None:
        self._shards = list(shards)
        self._present = [b""] * len(shards)
        self._averaged.again()
        self._plain.set_shards(shards)

    def start_of(self, run: Run) -> int:
        return run.start

    def settle(self) -> None:
        pass

    def reduce(self, frozen: Sequence[Tensor]) -> list[int]:
        return [i for i, p in enumerate(frozen) if takes_part(p)]

    def grads_of(self, shard: int) -> list[Tensor | None]:
        params = self._shards[shard].params
        grads = [p.grad for p in params]
        if self._shards[shard].placing.mesh is not None:
            grads = local_gradients(params, grads)
        self._present[shard] = bytes(g is not None for g in grads)
        return grads

    def ready(self, shard: int) -> None:
        return None

    def finish(self) -> None:
        pass

    def check(self, tensors: Sequence[StepTensors]) -> None:
        self._plain.check(tensors)
        if not (self._several and self._averaged.left):
            return
        params = [p for own in tensors for p in own.params]
        grads = [g for own in tensors for g in own.grads]
        with self._membership.collective():
            self._averaged.check(params, grads, [n for shard in self._shards for n in shard.numbers])

    def fingerprint(self) -> int:
        return zlib.crc32(b"".join(self._present))

    def none_active(self) -> bool:
        return not any(1 in present for present in self._present)

    def snapshot(self) -> Callable[[], bool]:
        shards = self._shards  # another list once there are other parameters
        same = same_gradients([p for shard in shards for p in shard.params])
        return lambda: self._shards is shards and same()

    def hold(self, measured: bool) -> None:
        pass

    def zeroing(self, set_to_none: bool, frozen: Sequence[Tensor]) -> AbstractContextManager[None]:
        return nullcontext()

    def no_sync(self) -> AbstractContextManager[None]:
        raise RuntimeError(
            "no_sync() of ShardedLion is for stage=2. With stage=1 use the no_sync() of DistributedDataParallel, which "
            "reduces the gradients"
        )

    def takes_loss_scale(self) -> bool:
        return False  # GradScaler unscales p.grad itself


class ReducedGrads:
    """Stage 2: gradients that a `GradReducer` averages as they arrive in the backward, each on its owner."""

    def __init__(self, membership: Membership, average: BucketAverage, bucket_bytes: int) -> None:
        self._membership = membership
        self._reducer = GradReducer(membership, average, bucket_bytes)
        self._plain = PlainGradients(membership)
        self._shards: list[Shard] = []
        self._are_held: Callable[[], bool] | None = None  # whether these gradients were reduced and measured

    def set_shards(self, shards: Sequence[Shard]) -> None:
        self._reducer.set_shards(shards)
        self._shards = list(shards)
        self._plain.set_shards(shards)

    def start_of(self, run: Run) -> int:
        return run.offset

    def settle(self) -> None:
        self._reducer.settle()

    def reduce(self, frozen: Sequence[Tensor]) -> list[int]:
        held = self._are_held
        if held is not None and not any(self._membership.any_rank(not held() or any(map(takes_part, frozen)))):
            return []  # the owners have them, and no rank has others
        if not self._reducer.reduce(unfrozen=any(map(takes_part, frozen))):
            return []
        # A pass may have reached a parameter on some ranks only, and it may be frozen again.
        anywhere = self._membership.any_rank(*map(takes_part, frozen))
        return [i for i, on_any in enumerate(anywhere) if on_any]

    def grads_of(self, shard: int) -> list[Tensor | None]:
        return [self._reducer.grads[shard]] * len(self._shards[shard].params)

    def ready(self, shard: int) -> Tensor | None:
        self._reducer.finish(shard)
        return self._reducer.active(shard)

    def finish(self) -> None:
        self._reducer.finish()

    def check(self, tensors: Sequence[StepTensors]) -> None:
        self._plain.check(tensors, self._reducer.finish)

    def fingerprint(self) -> int:
        return 0  # the ranks have exchanged which parameters have gradients

    def none_active(self) -> bool:
        return self._reducer.none_active()

    def snapshot(self) -> Callable[[], bool]:
        reducer, generation = self._reducer, self._reducer.generation
        return lambda: not reducer.has_local() and reducer.generation == generation

    def hold(self, measured: bool) -> None:
        # Gradients that arrive after that stay in p.grad: ranks that their pass misses could not know of a collective,
        # and make the step.
        self._reducer.holds = measured
        self._are_held = self.snapshot() if measured else None

    def zeroing(self, set_to_none: bool, frozen: Sequence[Tensor]) -> AbstractContextManager[None]:
        # A pass may have reached ranks by unfrozen parameters alone, of which the reducer does not know yet. Where it
        # holds gradients, no rank has begun a round that all must complete.
        unfrozen = not self._reducer.holds and any(p.requires_grad for p in frozen)
        if unfrozen and (any(p.grad is not None for p in frozen) or self._reducer.is_open or self._reducer.has_local()):
            self._reducer.settle()
        return self._reducer.zeroing(set_to_none)

    def no_sync(self) -> AbstractContextManager[None]:
        return self._reducer.no_sync()

    def takes_loss_scale(self) -> bool:
        raise RuntimeError(
            "ShardedLion with stage=2 does not support GradScaler, nor clipping by Lightning's DDPStrategy, which work "
            "on p.grad: train in bfloat16 without a GradScaler and clip by ShardedLion's own clip_grad_norm_(), in "
            "Lightning by lion_dist.lightning.ShardedLionStrategy; or use stage=1 with DistributedDataParallel"
        )
