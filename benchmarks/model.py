"""A model of the time of an iteration on 8 to 1024 GPUs, from the bandwidths of memory and links.

    python -m benchmarks.model            the model beside the measurements of benchmarks.iteration, then predictions

Nothing was measured on more than two GPUs. The predictions are arithmetic that agrees with measurements on two, of ways
over one group of ranks. Those over a mesh of replicas and shards are arithmetic alone.

A reduce-scatter or all-gather of n bytes over W ranks is a ring. It takes n * (W - 1) / W / bandwidth, plus the latency
    for W - 1 hops. An all-reduce takes twice the time on the wire, plus the latency for the hops in two rings or in a
    tree, whichever has fewer. Bandwidth is NCCL's "bus bandwidth". The latency of a hop is from NCCL's tuning tables.
Reductions run during the backward, which is two thirds of compute, except for the last bucket, whose gradient comes at
    the end of the backward. During a reduction compute runs at 1 - INTERFERENCE of its speed, since both share the
    GPU's memory and multiprocessors.
Over a mesh each node holds a replica, sharded over its GPUs, and reshard_after_forward=False: parameters are gathered
    within the node once, during the forward, except for the embedding's, which come first. Gradients are reduced within
    the node and then between nodes, both during the backward and at the same time, since they use different links; the
    slower of them counts. The embedding's come last, and wait for both. The ranks of a node share its adapters between
    nodes. What goes there: with HSDP an all-reduce for each block, before Lion steps the shard. With ShardedLion a
    reduce-scatter for each 256 MiB of the model (bucket_mb=32 of the shards), and after the step a gather, which
    nothing hides. A reduction in 16 bits is taken to have the latency of a ring. FSDP2 over all ranks gathers and
    reduces each block over one ring.
A step moves bytes of memory. An unsharded Lion moves 20 for each parameter in fp32 (p and m read and written, g read).
    With signs the owner moves 12.25 (g, m, m, signs), and then every rank 8.25 (p, p, signs).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import ceil, log2
from typing import NamedTuple

PARAMS = 1_038_682_112  # number of parameters of benchmarks/llama.py
LAST_BUCKET = 65_536_000  # elements of its embedding, whose gradient is complete last
BLOCKS = 16  # FSDP2 communicates for each
BUCKET, DDP_BUCKET = 256 << 20, 25 << 20  # bytes of gradients
INTERFERENCE = 0.73  # fitted to one measurement, ShardedLion with signs over NVLink; the others check it
BACKWARD = 2 / 3  # the backward's part of forward and backward


@dataclass(frozen=True)
class Machine:
    """A cluster.

    Attributes:
        ranks: number of ranks.
        node: number of GPUs in a node.
        compute_ms: time of forward and backward alone.
        link, memory: bandwidths of links and of memory, bytes a second.
        hop_us, net_us: latency of a hop within a node and between nodes.
        sharing: number of ranks that share a GPU.
    """

    name: str
    ranks: int
    node: int
    compute_ms: float
    link: float
    net_us: float = 14.0
    hop_us: float = 3.4
    memory: float = 4.26e12
    sharing: int = 1

    @property
    def nodes(self) -> int:
        return -(-self.ranks // self.node)

    def wire_ms(self, n: float) -> float:
        return n * (self.ranks - 1) / self.ranks / self.link * 1e3

    @property
    def ring_hops_ms(self) -> float:
        return ((self.nodes - 1) * self.net_us + (self.ranks - self.nodes) * self.hop_us) / 1e3

    def ring_ms(self, n: float) -> float:
        return self.wire_ms(n) + self.ring_hops_ms

    def all_reduce_ms(self, n: float) -> float:
        tree = (min(self.ranks, self.node) - 1) * self.hop_us + ceil(log2(self.nodes)) * self.net_us
        return 2 * (self.wire_ms(n) + min(self.ring_hops_ms, tree / 1e3))

    def memory_ms(self, n: float) -> float:
        return n * self.sharing / self.memory * 1e3


def covered(compute: float, on_the_wire: float, rest: float) -> float:
    """Milliseconds of compute and of collectives behind it.

    Args:
        compute: milliseconds of compute alone.
        on_the_wire: milliseconds of the collectives without most of their latency, during which compute is slower.
        rest: milliseconds of the collectives. What does not fit behind the slower compute comes after it.
    """
    hidden = min(on_the_wire, compute / (1 - INTERFERENCE))
    return max(compute + INTERFERENCE * hidden, rest)


def behind_backward(m: Machine, collective: Callable[[float], float], bucket: int) -> float:
    """Milliseconds of compute and of the gradients' reduction behind it.

    Args:
        collective: milliseconds of the reduction of a number of bytes.
        bucket: size of a bucket in bytes.
    """
    n = 4 * (PARAMS - LAST_BUCKET)
    last, rest = collective(4 * LAST_BUCKET), collective(bucket) * n / bucket
    backward = BACKWARD * m.compute_ms
    return m.compute_ms - backward + covered(backward, collective(n), rest) + last


def zero2_signs(m: Machine) -> float:
    pack = m.memory_ms(12.25 * PARAMS / m.ranks)
    apply = m.memory_ms(8.25 * PARAMS)
    return behind_backward(m, m.ring_ms, BUCKET) + pack + m.ring_ms(PARAMS / 4) + apply


def zero2_params(m: Machine) -> float:
    return behind_backward(m, m.ring_ms, BUCKET) + m.memory_ms(20 * PARAMS / m.ranks) + m.ring_ms(4 * PARAMS)


def ddp(m: Machine) -> float:
    return behind_backward(m, m.all_reduce_ms, DDP_BUCKET) + m.memory_ms(20 * PARAMS)


def zero1_params(m: Machine) -> float:
    return behind_backward(m, m.all_reduce_ms, DDP_BUCKET) + m.memory_ms(20 * PARAMS / m.ranks) + m.ring_ms(4 * PARAMS)


class Mesh(NamedTuple):
    """Groups of ranks: those of a node, those with the same shard on all nodes, and all."""

    shards: Machine
    replicas: Machine
    world: Machine


def mesh_of(nodes: int, net: float, net_us: float) -> Mesh:
    """Nodes of 8 GPUs; ``net``: bytes a second between nodes, for each node."""
    gpus, node = 8, NVLINK.link
    return Mesh(
        replace(NVLINK, ranks=gpus, node=gpus),
        replace(NVLINK, ranks=nodes, node=1, link=net / gpus, net_us=net_us),
        replace(NVLINK, ranks=nodes * gpus, node=gpus, link=min(node, net), net_us=net_us),
    )


def gathered_forward(m: Machine) -> float:
    """Milliseconds of a forward with the parameters' gathers behind it."""
    n = 4 * (PARAMS - LAST_BUCKET)
    forward = (1 - BACKWARD) * m.compute_ms
    return m.ring_ms(4 * LAST_BUCKET) + covered(forward, m.ring_ms(n), BLOCKS * m.ring_ms(n / BLOCKS))


def reduced_backward(
    shards: Machine, between: Callable[[float], float], pieces: float, width: float = 4, width_between: float = 4
) -> float:
    """Milliseconds of a backward with the gradients' reductions behind it.

    Args:
        between: milliseconds of the reduction of a number of bytes of a shard between nodes.
        pieces: number of such reductions, without the embedding's.
        width, width_between: bytes of an element within and between nodes.
    """
    n = PARAMS - LAST_BUCKET
    inside, outside = width * n, width_between * n / shards.ranks
    return covered(
        BACKWARD * shards.compute_ms,
        max(shards.ring_ms(inside), between(outside)),
        max(BLOCKS * shards.ring_ms(inside / BLOCKS), pieces * between(outside / pieces)),
    ) + (shards.ring_ms(width * LAST_BUCKET) + between(width_between * LAST_BUCKET / shards.ranks))


def fsdp2(mesh: Mesh) -> float:
    m = mesh.world
    backward = reduced_backward(m, lambda n: 0.0, BLOCKS)
    return gathered_forward(m) + backward + m.memory_ms(20 * PARAMS / m.ranks)


def hsdp(mesh: Mesh, width: float = 4) -> float:
    """``width``: bytes of an element of a gradient while it is reduced."""
    m = mesh.shards
    backward = reduced_backward(m, mesh.replicas.all_reduce_ms, BLOCKS, width, width)
    return gathered_forward(m) + backward + m.memory_ms(20 * PARAMS / m.ranks)


def hybrid(mesh: Mesh, signs: bool, width: float = 4) -> float:
    """``width``: bytes of an element of a gradient while it is reduced between nodes."""
    m, between = mesh.shards, mesh.replicas
    pieces = 4 * (PARAMS - LAST_BUCKET) / BUCKET
    ms = gathered_forward(m) + reduced_backward(m, between.ring_ms, pieces, width_between=width)
    shard, own = PARAMS / m.ranks, PARAMS / mesh.world.ranks
    if signs:
        return ms + m.memory_ms(12.25 * own) + between.ring_ms(shard / 4) + m.memory_ms(8.25 * shard)
    return ms + m.memory_ms(20 * own) + between.ring_ms(4 * shard)


class Way(NamedTuple):
    what: str
    ms: Callable[..., float]


WAYS = {
    "zero2_signs": Way("ShardedLion stage 2, signs", zero2_signs),
    "zero2": Way("ShardedLion stage 2, parameters", zero2_params),
    "ddp": Way("DDP + Lion", ddp),
    "zero1": Way("DDP + sharded optimizer, parameters gathered", zero1_params),
}

WAYS_OVER_A_MESH = {
    "fsdp2_grad_op": Way("FSDP2 over all ranks", fsdp2),
    "hsdp": Way("HSDP", hsdp),
    "hsdp_bf16": Way("HSDP, bf16 reduction", partial(hsdp, width=2)),
    "hybrid": Way("ShardedLion between nodes, parameters", partial(hybrid, signs=False)),
    "hybrid_signs": Way("signs, 4.25 B", partial(hybrid, signs=True)),
    "hybrid_signs_16": Way("signs, 16 bits on the wire, 2.25 B", partial(hybrid, signs=True, width=2)),
}

# From benchmarks.sync: 4 GiB, half of which an all-gather carries, took 7.1 ms over NVLink and 1156 over sockets.
NVLINK = Machine("2 H200s, NVLink", 2, 2, 65.9, 3.0e11)
SOCKETS = Machine("2 ranks of one H200, sockets", 2, 1, 142.2, 1.857e9, sharing=2)
# Milliseconds of an iteration, from RESULTS.md; DDP with lion-pytorch's Triton kernel, which is near the memory limit.
MEASURED = {
    NVLINK: {"zero2_signs": 75.7, "zero2": 83.4, "ddp": 81.4, "zero1": 90.0},
    SOCKETS: {"zero2_signs": 1329.9, "zero2": 2450.5, "ddp": 2452.2, "zero1": 3415.3},
}
# (bandwidth between nodes in bytes a second, latency in us): a 400 Gb/s adapter for each GPU carries as much as NVLink.
LINKS = {
    "8 GPUs a node, NVLink, and 400 Gb/s InfiniBand a GPU": (3.0e11, 14.0),
    "8 GPUs a node, and 100 GbE a node": (12.5e9, 40.0),
}
NETS = {"100 GbE a node": (12.5e9, 40.0), "400 Gb/s a node": (50e9, 14.0), "400 Gb/s a GPU": (400e9, 14.0)}


def main() -> None:
    print("The model beside the measurements, ms an iteration\n")
    print("| machine | " + " | ".join(way.what for way in WAYS.values()) + " |\n" + "|---" * (1 + len(WAYS)) + "|")
    for machine, measured in MEASURED.items():
        cells = []
        for name, way in WAYS.items():
            predicted = way.ms(machine)
            cells.append(
                f"{predicted:.1f}, measured {measured[name]:.1f} ({100 * (predicted / measured[name] - 1):+.0f} %)"
            )
        print(f"| {machine.name} | {' | '.join(cells)} |")
    for name, (link, net_us) in LINKS.items():
        print(f"\n{name}: ms an iteration by the model (scaling efficiency, compute alone / ms)\n")
        print("| GPUs | " + " | ".join(way.what for way in WAYS.values()) + " |\n" + "|---" * (1 + len(WAYS)) + "|")
        for ranks in (8, 64, 256, 1024):
            machine = replace(NVLINK, name=name, ranks=ranks, node=8, link=link, net_us=net_us)
            times = [way.ms(machine) for way in WAYS.values()]
            print(f"| {ranks} | {' | '.join(f'{t:.1f} ({machine.compute_ms / t:.2f})' for t in times)} |")
    for name, (net, net_us) in NETS.items():
        print(f"\nNodes of 8 GPUs, {name}: ms an iteration by the model\n")
        print("| nodes | " + " | ".join(way.what for way in WAYS_OVER_A_MESH.values()) + " |")
        print("|---" * (1 + len(WAYS_OVER_A_MESH)) + "|")
        for nodes in (2, 8, 32, 128):
            mesh = mesh_of(nodes, net, net_us)
            print(f"| {nodes} | {' | '.join(f'{way.ms(mesh):.1f}' for way in WAYS_OVER_A_MESH.values())} |")


if __name__ == "__main__":
    main()
