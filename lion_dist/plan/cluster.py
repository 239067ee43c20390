"""GPUs and the links between them, and the time of a collective.

A reduce-scatter or all-gather of n bytes over W ranks is a ring. It takes n * (W - 1) / W / bandwidth, plus the latency
    for W - 1 hops. An all-reduce takes twice the time on the wire, plus the latency for the hops in two rings or in a
    tree, whichever has fewer. Bandwidth is NCCL's "bus bandwidth". The latency of a hop is from NCCL's tuning tables.
    Switches that reduce or copy by themselves (NVLS, SHARP) are left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from .strategies import Shards

# Measured bandwidths of an H200, in bytes a second: copies in its memory, and collectives over NVLink.
H200_MEMORY = 4.26e12
NVLINK = 3.0e11


@dataclass(frozen=True)
class Group:
    """Ranks that communicate, in one ring.

    Attributes:
        ranks: number of ranks.
        node: number of ranks in a node.
        link: bandwidth of the slowest link of the ring, bytes a second.
        hop_us, net_us: latency of a hop within a node and between nodes.
    """

    ranks: int
    node: int
    link: float
    hop_us: float
    net_us: float

    @property
    def nodes(self) -> int:
        return -(-self.ranks // self.node)

    def wire_ms(self, n: float) -> float:
        return n * (self.ranks - 1) / self.ranks / self.link * 1e3

    @property
    def ring_hops_ms(self) -> float:
        return ((self.nodes - 1) * self.net_us + (self.ranks - self.nodes) * self.hop_us) / 1e3

    def ring_ms(self, n: float) -> float:
        """Milliseconds of a reduce-scatter or all-gather of n bytes."""
        return self.wire_ms(n) + self.ring_hops_ms

    def all_reduce_ms(self, n: float) -> float:
        """Milliseconds of an all-reduce of n bytes."""
        tree = (min(self.ranks, self.node) - 1) * self.hop_us + math.ceil(math.log2(self.nodes)) * self.net_us
        return 2 * (self.wire_ms(n) + min(self.ring_hops_ms, tree / 1e3))


class Mesh(NamedTuple):
    """Two groups of each rank: those over which FSDP2 shards the model, and those that hold the same part of it.

    Attributes:
        memory: bandwidth of the memory of a GPU, bytes a second.
    """

    shards: Group
    replicas: Group
    memory: float

    def memory_ms(self, n: float) -> float:
        return n / self.memory * 1e3


@dataclass(frozen=True)
class Cluster:
    """GPUs in nodes.

    Attributes:
        gpus: number of GPUs, each with one rank.
        node: number of GPUs in a node. They are one node if they are no more than that.
        between: bandwidth of each node to the others, bytes a second.
        within: bandwidth of each GPU to the others of its node, bytes a second.
        net_us, hop_us: latency of a hop between nodes and within a node, microseconds.
        memory: bandwidth of a GPU's memory, bytes a second.

    Raises:
        ValueError: the nodes do not have the same number of GPUs.
    """

    gpus: int
    node: int
    between: float
    within: float = NVLINK
    net_us: float = 14.0
    hop_us: float = 3.4
    memory: float = H200_MEMORY

    def __post_init__(self) -> None:
        if self.gpus > self.node and self.gpus % self.node:
            raise ValueError(
                f"{self.gpus} GPUs are not whole nodes of {self.node} GPUs: give a multiple of {self.node}, or another "
                "number of GPUs per node"
            )

    @property
    def nodes(self) -> int:
        return -(-self.gpus // self.node)

    def mesh(self, shards: Shards) -> Mesh:
        """The mesh of a strategy. A ring over all ranks enters and leaves each node once; where nodes are replicas,
        the ranks of a node have a ring each, and share what the node has."""
        inside = min(self.gpus, self.node)
        slowest = min(self.within, self.between) if self.nodes > 1 else self.within
        alone = Group(1, 1, self.within, self.hop_us, self.net_us)
        world = Group(self.gpus, self.node, slowest, self.hop_us, self.net_us)
        if shards is Shards.NONE:
            return Mesh(alone, world, self.memory)
        if shards is Shards.ALL:
            return Mesh(world, alone, self.memory)
        node = Group(inside, inside, self.within, self.hop_us, self.net_us)
        return Mesh(node, Group(self.nodes, 1, self.between / inside, self.hop_us, self.net_us), self.memory)


class Network(NamedTuple):
    """What connects nodes.

    Attributes:
        what: describes it.
        node, gpu: bandwidth of each node to the others, bytes a second: of the node, and more for each of its GPUs.
        net_us: latency of a hop, microseconds.
    """

    what: str
    node: float
    gpu: float
    net_us: float

    def cluster(self, gpus: int, node: int) -> Cluster:
        """The cluster of so many GPUs, in nodes of ``node``.

        Raises:
            ValueError: they are not whole nodes.
        """
        if math.isinf(self.node):
            node = gpus
        return Cluster(gpus, node, self.node + node * self.gpu, net_us=self.net_us)


NETWORKS = {
    "100gbe": Network("100 GbE a node", 12.5e9, 0.0, 40.0),
    "400g-node": Network("400 Gb/s a node", 50e9, 0.0, 14.0),
    "400g-gpu": Network("400 Gb/s a GPU", 0.0, 50e9, 14.0),
    "nvlink": Network("NVLink between all GPUs", math.inf, 0.0, 0.0),
}
