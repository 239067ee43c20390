"""What each strategy holds on a rank, and what a rank sends, in bytes per parameter of the model.

All of them are one thing: FSDP2 shards the model over S ranks (one: it is not sharded), and each rank's part has R
replicas, over which gradients are averaged, by an all-reduce (`Lion`, and stage 1) or by a reduce-scatter to the owner
(stage 2).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from .precision import AVERAGE, SIGNS, Precision


class Bytes(NamedTuple):
    """Bytes per parameter on a rank: ``whole``, and ``sharded``, which is divided by the number of ranks."""

    whole: float
    sharded: float

    def on(self, ranks: int) -> float:
        return self.whole + self.sharded / ranks

    def plus(self, other: Bytes) -> Bytes:
        return Bytes(self.whole + other.whole, self.sharded + other.sharded)

    def __str__(self) -> str:
        whole, sharded = (f"{x:.2f}".rstrip("0").rstrip(".") for x in self)
        return " + ".join([whole] * (self.whole > 0) + [f"{sharded}/W"] * (self.sharded > 0))


class Memory(NamedTuple):
    """Bytes per parameter that a rank holds between two steps; ``sharded`` over the replicas."""

    weights: Bytes
    gradients: Bytes
    state: Bytes
    signs: Bytes

    @property
    def total(self) -> Bytes:
        return self.weights.plus(self.gradients).plus(self.state).plus(self.signs)


class Wire(NamedTuple):
    """Bytes per parameter of the part of the model that it holds, or gathers, that a rank sends in a step.

    Attributes:
        gather: weights gathered among the ranks over which FSDP2 shards the model; (S - 1) / S of it is sent.
        reduce: gradients reduced among them; (S - 1) / S.
        average: gradients averaged among replicas, an all-reduce counting twice; (R - 1) / R.
        sync: signs or parameters gathered among replicas after the step; (R - 1) / R.
    """

    gather: float
    reduce: float
    average: float
    sync: float

    @property
    def within(self) -> float:
        """Among the ranks over which FSDP2 shards the model."""
        return self.gather + self.reduce

    @property
    def between(self) -> float:
        """Among replicas."""
        return self.average + self.sync


class Policy(NamedTuple):
    """What FSDP2 is told about the weights that it gathers.

    Attributes:
        reshard_after_forward: True frees them after the forward and gathers them again in the backward, as
            ``fully_shard`` does by default for all but the root; False keeps them.
        bf16: whether weights are gathered, and gradients reduced, in bfloat16:
            ``MixedPrecisionPolicy(param_dtype=torch.bfloat16)``.
    """

    reshard_after_forward: bool = True
    bf16: bool = False

    def gathered_bytes(self, precision: Precision) -> float:
        """Bytes of an element of a gathered weight, and of its gradient."""
        return 2 if self.bf16 else precision.weight_bytes


class Shards(Enum):
    """The ranks over which FSDP2 shards the model."""

    NONE = "it does not"
    NODE = "those of a node; nodes are replicas"
    ALL = "all"


class Sync(Enum):
    """What a step sends to the replicas."""

    NONE = "nothing: every rank steps all that it holds"
    PARAMS = "the parameters that their owners have stepped"
    SIGNS = "signs, which every rank applies"


@dataclass(frozen=True)
class Strategy:
    """One way to train.

    Attributes:
        shards: the ranks over which FSDP2 shards the model.
        stage: 0: `Lion`. 1: `ShardedLion` over averaged gradients, with the momentum sharded over the replicas. 2: the
            gradients too.
        sync: what a step sends to the replicas; `Sync.NONE` with `Lion`.
        reduce_16: whether the slowest reduction of gradients sends bfloat16: between replicas in stage 2
            (``reduce_dtype``), else all reductions (``MixedPrecisionPolicy(reduce_dtype=torch.bfloat16)``).
    """

    shards: Shards = Shards.NONE
    stage: int = 0
    sync: Sync = Sync.NONE
    reduce_16: bool = False

    def averaged_bytes(self, precision: Precision, policy: Policy) -> float:
        """Bytes of an element of the gradients while they are averaged among replicas."""
        if self.reduce_16:
            return 2
        by_fsdp2 = self.shards is not Shards.NONE and self.stage == 0
        return policy.gathered_bytes(precision) if by_fsdp2 else precision.weight_bytes

    def gradient_bytes(self, precision: Precision) -> float:
        """Bytes of an element of the gradients that a step reads."""
        return AVERAGE if self.reduce_16 and self.stage == 2 else precision.weight_bytes

    def memory(self, precision: Precision) -> Memory:
        """Bytes per parameter of the part of the model that FSDP2 leaves to a rank, an S-th."""
        gradient = self.gradient_bytes(precision)
        momentum, remainder = precision.momentum_bytes, precision.remainder_bytes
        sharded = self.stage > 0
        # Signs apply to whole weights, so that every rank needs whole remainders.
        shares_remainder = self.sync is Sync.PARAMS
        return Memory(
            weights=Bytes(precision.weight_bytes, 0),
            gradients=Bytes(0, gradient) if self.stage == 2 else Bytes(gradient, 0),
            state=Bytes(
                momentum * (not sharded) + remainder * (not shares_remainder),
                momentum * sharded + remainder * shares_remainder,
            ),
            signs=Bytes(SIGNS if self.sync is Sync.SIGNS else 0, 0),
        )

    def wire(self, precision: Precision, policy: Policy) -> Wire:
        """Bytes per parameter on the wire, in a step of one micro-batch."""
        gathered, average = policy.gathered_bytes(precision), self.averaged_bytes(precision, policy)
        inside = self.shards is not Shards.NONE
        return Wire(
            gather=gathered * inside * (2 if policy.reshard_after_forward else 1),
            reduce=(2 if self.reduce_16 and self.stage == 0 else gathered) * inside,
            average=average if self.stage == 2 else 2 * average,
            sync={Sync.NONE: 0.0, Sync.PARAMS: precision.weight_bytes, Sync.SIGNS: SIGNS}[self.sync],
        )


STRATEGIES = {
    "DDP": Strategy(),
    'stage 1, "params"': Strategy(stage=1, sync=Sync.PARAMS),
    'stage 1, "signs"': Strategy(stage=1, sync=Sync.SIGNS),
    'stage 2, "params"': Strategy(stage=2, sync=Sync.PARAMS),
    'stage 2, "signs"': Strategy(stage=2, sync=Sync.SIGNS),
    'stage 2, "params", 16 bits': Strategy(stage=2, sync=Sync.PARAMS, reduce_16=True),
    'stage 2, "signs", 16 bits': Strategy(stage=2, sync=Sync.SIGNS, reduce_16=True),
    "FSDP2": Strategy(Shards.ALL),
    "HSDP": Strategy(Shards.NODE),
    "HSDP, 16 bits": Strategy(Shards.NODE, reduce_16=True),
    'hybrid, "params"': Strategy(Shards.NODE, 2, Sync.PARAMS),
    'hybrid, "signs"': Strategy(Shards.NODE, 2, Sync.SIGNS),
    'hybrid, "params", 16 bits': Strategy(Shards.NODE, 2, Sync.PARAMS, reduce_16=True),
    'hybrid, "signs", 16 bits': Strategy(Shards.NODE, 2, Sync.SIGNS, reduce_16=True),
}
