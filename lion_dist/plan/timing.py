"""The time of an iteration, from the bandwidths of memory and links.

Reductions run during the backward, which is two thirds of compute, except for the last bucket, whose gradient comes at
    the end of the backward. During a reduction compute runs at 1 - INTERFERENCE of its speed, since both share the
    GPU's memory and multiprocessors.
FSDP2 gathers and reduces block by block. Parameters are gathered during the forward, except for the embedding's, which
    come first, and with reshard_after_forward=True all of them again during the backward. (By default fully_shard keeps
    those of the root, so that somewhat fewer bytes travel.) Gradients are reduced among the ranks that shard the model
    and then among replicas, both during the backward and at the same time, since they use different links; the slower
    of them counts. The embedding's come last, and wait for both.
What goes between replicas: with `Lion` an all-reduce, for each bucket of DDP or for each block of HSDP. With
    ShardedLion a reduce-scatter for each BUCKET of the model (over FSDP2 with S ranks bucket_mb is an S-th of it), and
    after the step a gather, which nothing hides. A reduction in 16 bits is taken to have the latency of a ring.
A step takes the time in which the memory moves its bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .cluster import Mesh
from .precision import SIGNS, Precision
from .strategies import Policy, Shards, Strategy, Sync

BUCKET, DDP_BUCKET = 256 << 20, 25 << 20  # bytes of gradients
# Fitted to one measurement, ShardedLion with signs over NVLink; the others in benchmarks/RESULTS.md check it.
INTERFERENCE = 0.76
BACKWARD = 2 / 3  # the backward's part of forward and backward


@dataclass(frozen=True)
class Model:
    """A model and the work of an iteration.

    Attributes:
        params: number of parameters.
        last: elements of the parameters whose gradient is complete last, and that a forward needs first: an embedding.
        blocks: number of equal blocks of the others.
        compute_ms: time of forward and backward alone.
    """

    params: int
    last: int
    blocks: int
    compute_ms: float

    @property
    def in_blocks(self) -> int:
        """Elements of all blocks."""
        return self.params - self.last


def iteration_ms(model: Model, mesh: Mesh, strategy: Strategy, precision: Precision, policy: Policy) -> float:
    """Milliseconds of an iteration: forward, backward, step, and what no computation hides of the communication.

    Args:
        model: the model and its work.
        mesh: the mesh of the strategy, by `Cluster.mesh`.
        strategy: what is sharded, and what is sent.
        precision: dtypes of weights and state.
        policy: how FSDP2 gathers weights.
    """
    return (
        _forward(model, mesh, policy.gathered_bytes(precision))
        + _backward(model, mesh, strategy, precision, policy)
        + _step(model, mesh, strategy, precision)
    )


def _covered(compute: float, on_the_wire: float, rest: float) -> float:
    """Milliseconds of compute and of collectives behind it.

    Args:
        compute: milliseconds of compute alone.
        on_the_wire: milliseconds of the collectives without most of their latency, during which compute is slower.
        rest: milliseconds of the collectives. What does not fit behind the slower compute comes after it.
    """
    hidden = min(on_the_wire, compute / (1 - INTERFERENCE))
    return max(compute + INTERFERENCE * hidden, rest)


def _in_pieces(collective: Callable[[float], float], n: float, pieces: float) -> float:
    return pieces * collective(n / pieces)


def _forward(model: Model, mesh: Mesh, width: float) -> float:
    """``width``: bytes of an element of a gathered weight."""
    gather = mesh.shards.ring_ms
    n = width * model.in_blocks
    compute = (1 - BACKWARD) * model.compute_ms
    return gather(width * model.last) + _covered(compute, gather(n), _in_pieces(gather, n, model.blocks))


def _backward(model: Model, mesh: Mesh, strategy: Strategy, precision: Precision, policy: Policy) -> float:
    ring, weight = mesh.shards.ring_ms, precision.weight_bytes
    wire, width = strategy.wire(precision, policy), strategy.averaged_bytes(precision, policy)
    average = mesh.replicas.ring_ms if strategy.stage == 2 else mesh.replicas.all_reduce_ms
    n, ranks = model.in_blocks, mesh.shards.ranks
    inside = [wire.reduce * n] + [policy.gathered_bytes(precision) * model.params] * policy.reshard_after_forward
    outside = width * n / ranks
    if strategy.stage == 2:
        pieces = weight * n / BUCKET
    else:
        pieces = weight * n / DDP_BUCKET if strategy.shards is Shards.NONE else model.blocks
    pieces = max(1.0, pieces)
    return _covered(
        BACKWARD * model.compute_ms,
        max(sum(map(ring, inside)), average(outside)),
        max(sum(_in_pieces(ring, m, model.blocks) for m in inside), _in_pieces(average, outside, pieces)),
    ) + (ring(wire.reduce * model.last) + average(width * model.last / ranks))


def _step(model: Model, mesh: Mesh, strategy: Strategy, precision: Precision) -> float:
    part = model.params / mesh.shards.ranks
    own = part / mesh.replicas.ranks
    gradient, gather = strategy.gradient_bytes(precision), mesh.replicas.ring_ms
    if strategy.sync is Sync.SIGNS:
        pack, apply = precision.pack_bytes(gradient) * own, precision.apply_bytes * part
        return mesh.memory_ms(pack) + gather(SIGNS * part) + mesh.memory_ms(apply)
    if strategy.sync is Sync.PARAMS:
        return mesh.memory_ms(precision.step_bytes(gradient) * own) + gather(precision.weight_bytes * part)
    return mesh.memory_ms(precision.step_bytes(gradient) * part)
