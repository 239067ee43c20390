"""A model of the time of an iteration on 8 to 1024 GPUs, from the bandwidths of memory and links.

    python -m benchmarks.model            the model beside the measurements of benchmarks.iteration, then predictions

Nothing was measured on more than two GPUs. The predictions are arithmetic that agrees with measurements on two.

A reduce-scatter or all-gather of n bytes over W ranks is a ring. It takes n * (W - 1) / W / bandwidth, plus the latency
    for W - 1 hops. An all-reduce takes twice the time on the wire, plus the latency for the hops in two rings or in a
    tree, whichever has fewer. Bandwidth is NCCL's "bus bandwidth". The latency of a hop is from NCCL's tuning tables.
Reductions run during the backward, which is two thirds of compute, except for the last bucket, whose gradient comes at
    the end of the backward. During a reduction compute runs at 1 - INTERFERENCE of its speed, since both share the
    GPU's memory and multiprocessors.
A step moves bytes of memory. An unsharded Lion moves 20 for each parameter in fp32 (p and m read and written, g read).
    With signs the owner moves 12.25 (g, m, m, signs), and then every rank 8.25 (p, p, signs).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil, log2
from typing import NamedTuple

PARAMS = 1_038_682_112  # number of parameters of benchmarks/llama.py
LAST_BUCKET = 65_536_000  # elements of its embedding, whose gradient is complete last
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


def behind_backward(m: Machine, collective: Callable[[float], float], bucket: int) -> float:
    """Milliseconds of compute and of the gradients' reduction behind it.

    Args:
        collective: milliseconds of the reduction of a number of bytes.
        bucket: size of a bucket in bytes.
    """
    n = 4 * (PARAMS - LAST_BUCKET)
    last, rest = collective(4 * LAST_BUCKET), collective(bucket) * n / bucket
    on_the_wire = collective(n)  # the rest is latency, during which compute runs at full speed
    backward = BACKWARD * m.compute_ms
    # Compute is slower during the reduction. What does not fit behind the slower backward comes after it.
    hidden = min(on_the_wire, backward / (1 - INTERFERENCE))
    slowed = backward + INTERFERENCE * hidden
    return m.compute_ms - backward + max(slowed, rest) + last


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


class Way(NamedTuple):
    what: str
    ms: Callable[[Machine], float]


WAYS = {
    "zero2_signs": Way("ShardedLion stage 2, signs", zero2_signs),
    "zero2": Way("ShardedLion stage 2, parameters", zero2_params),
    "ddp": Way("DDP + Lion", ddp),
    "zero1": Way("DDP + sharded optimizer, parameters gathered", zero1_params),
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


if __name__ == "__main__":
    main()
