"""What a strategy costs a model on a cluster."""

from __future__ import annotations

from typing import NamedTuple

from .cluster import Cluster
from .precision import Precision
from .strategies import Policy, Shards, Strategy
from .timing import Model, iteration_ms


class Costs(NamedTuple):
    """Costs of one strategy.

    Attributes:
        held: bytes that a rank holds between steps: weights, gradients, state and signs. Activations, the model's
            buffers and gradients on their way (at most three buckets) come on top.
        gathered: bytes of other ranks' weights that FSDP2 has gathered when the backward begins.
        rank_sends: bytes that a rank sends in a step, to its own node too.
        node_sends: bytes that a node sends to the others in a step.
        ms: predicted milliseconds of an iteration.
    """

    held: float
    gathered: float
    rank_sends: float
    node_sends: float
    ms: float


def costs_of(model: Model, cluster: Cluster, strategy: Strategy, precision: Precision, policy: Policy) -> Costs:
    """Computes the costs of one strategy.

    Args:
        model: the model and the work of an iteration.
        cluster: the GPUs and the links between them.
        strategy: what is sharded, and what is sent.
        precision: dtypes of weights and state.
        policy: how FSDP2 gathers weights.

    Returns:
        The costs, of a step of one micro-batch.
    """
    mesh = cluster.mesh(strategy.shards)
    shards, replicas = mesh.shards.ranks, mesh.replicas.ranks
    wire = strategy.wire(precision, policy)
    within = model.params * wire.within * (shards - 1) / shards
    between = model.params * wire.between * (replicas - 1) / replicas  # of the ranks together that shard a replica
    across = within if strategy.shards is Shards.ALL else between
    # The backward begins with the embedding and the last block if weights are freed after the forward.
    gathered = model.last + model.in_blocks / model.blocks if policy.reshard_after_forward else model.params
    return Costs(
        held=model.params * strategy.memory(precision).total.on(replicas) / shards,
        gathered=policy.gathered_bytes(precision) * gathered if strategy.shards is not Shards.NONE else 0.0,
        rank_sends=within + between / shards,
        node_sends=across if cluster.nodes > 1 else 0.0,
        ms=iteration_ms(model, mesh, strategy, precision, policy),
    )
