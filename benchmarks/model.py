"""The time of an iteration on 8 to 1024 GPUs, by the arithmetic of lion_dist/plan, beside what was measured on two.

    python -m benchmarks.model          the arithmetic beside the measurements of benchmarks.iteration, then predictions
    python -m lion_dist.plan --help     the same arithmetic for other models and clusters

Nothing was measured on more than two GPUs. The predictions are arithmetic that agrees with measurements on two, of ways
over one group of ranks. Those over a mesh of replicas and shards are arithmetic alone. FSDP2 has
reshard_after_forward=False here. lion_dist/plan/timing.py and cluster.py say what is assumed.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from lion_dist.plan.cluster import H200_MEMORY, NETWORKS, Cluster
from lion_dist.plan.precision import PRECISIONS
from lion_dist.plan.strategies import STRATEGIES, Policy
from lion_dist.plan.timing import Model, iteration_ms

RESULTS = Path(__file__).parent / "results"
FP32, POLICY = PRECISIONS[0], Policy(reshard_after_forward=False)
# benchmarks/llama.py. Its embedding's gradient is complete last. compute_ms is that of an H200.
LLAMA = Model(params=1_038_682_112, last=65_536_000, blocks=16, compute_ms=64.6)


class Machine(NamedTuple):
    """Where iterations were measured, and the file of the figures in benchmarks/results."""

    what: str
    model: Model
    cluster: Cluster
    results: str


class Way(NamedTuple):
    """A strategy of lion_dist/plan, and the mode of benchmarks.iteration that measures it."""

    what: str
    strategy: str
    mode: str = ""

    def ms(self, model: Model, cluster: Cluster) -> float:
        strategy = STRATEGIES[self.strategy]
        return iteration_ms(model, cluster.mesh(strategy.shards), strategy, FP32, POLICY)


WAYS = (
    Way("ShardedLion stage 2, signs", 'stage 2, "signs"', "zero2_signs"),
    Way("ShardedLion stage 2, parameters", 'stage 2, "params"', "zero2"),
    # With lion-pytorch's Triton kernel, which is near the memory limit too.
    Way("DDP + Lion", "DDP", "ddp_lion_pytorch"),
    Way("DDP + sharded optimizer, parameters gathered", 'stage 1, "params"', "zero_redundancy"),
)
WAYS_OVER_A_MESH = (
    Way("FSDP2 over all ranks", "FSDP2"),
    Way("HSDP", "HSDP"),
    Way("HSDP, bf16 reduction", "HSDP, 16 bits"),
    Way("ShardedLion between nodes, parameters", 'hybrid, "params"'),
    Way("signs, 4.25 B", 'hybrid, "signs"'),
    Way("signs, 16 bits on the wire, 2.25 B", 'hybrid, "signs", 16 bits'),
)
# The rate of sockets is from benchmarks.sync: half of 4 GiB, which an all-gather carries, took 1156 ms.
MACHINES = (
    Machine("2 H200s, NVLink", LLAMA, NETWORKS["nvlink"].cluster(2, 2), "iteration_nvlink.json"),
    Machine(
        "2 ranks of one H200, sockets",
        replace(LLAMA, compute_ms=142.2),
        Cluster(gpus=2, node=1, between=1.857e9, memory=H200_MEMORY / 2),
        "iteration_sockets.json",
    ),
)
# A 400 Gb/s adapter for each GPU carries as much as NVLink.
LINKS = {
    "8 GPUs a node, NVLink, and 400 Gb/s InfiniBand a GPU": "400g-gpu",
    "8 GPUs a node, and 100 GbE a node": "100gbe",
}


def measured(machine: Machine) -> dict[str, float]:
    """Milliseconds of an iteration by mode, the median of the turns."""
    rows = json.loads((RESULTS / machine.results).read_text())
    return {row["mode"]: statistics.median(t["ms"] for t in row["turns"]) for row in rows if row["turns"]}


def head(first: str, ways: tuple[Way, ...]) -> str:
    return f"| {first} | {' | '.join(way.what for way in ways)} |\n{'|---' * (1 + len(ways))}|"


def main() -> None:
    print("The model beside the measurements, ms an iteration\n")
    print(head("machine", WAYS))
    for machine in MACHINES:
        cells, found = [], measured(machine)
        for way in WAYS:
            predicted, ms = way.ms(machine.model, machine.cluster), found[way.mode]
            cells.append(f"{predicted:.1f}, measured {ms:.1f} ({100 * (predicted / ms - 1):+.0f} %)")
        print(f"| {machine.what} | {' | '.join(cells)} |")
    for name, network in LINKS.items():
        print(f"\n{name}: ms an iteration by the model (scaling efficiency, compute alone / ms)\n")
        print(head("GPUs", WAYS))
        for gpus in (8, 64, 256, 1024):
            times = [way.ms(LLAMA, NETWORKS[network].cluster(gpus, 8)) for way in WAYS]
            print(f"| {gpus} | {' | '.join(f'{t:.1f} ({LLAMA.compute_ms / t:.2f})' for t in times)} |")
    for name in ("100gbe", "400g-node", "400g-gpu"):
        print(f"\nNodes of 8 GPUs, {NETWORKS[name].what}: ms an iteration by the model\n")
        print(head("nodes", WAYS_OVER_A_MESH))
        for nodes in (2, 8, 32, 128):
            times = [way.ms(LLAMA, NETWORKS[name].cluster(8 * nodes, 8)) for way in WAYS_OVER_A_MESH]
            print(f"| {nodes} | {' | '.join(f'{t:.1f}' for t in times)} |")


if __name__ == "__main__":
    main()
