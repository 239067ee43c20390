"""The arithmetic of time in lion_dist/plan: its limits, and what benchmarks/RESULTS.md predicts and measured."""

from __future__ import annotations

import contextlib
import io
import math
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from benchmarks import model as benchmark
from benchmarks.model import LLAMA, MACHINES, WAYS, measured
from lion_dist.plan.__main__ import TFLOPS
from lion_dist.plan.cluster import NETWORKS, Cluster
from lion_dist.plan.precision import PRECISIONS, Precision
from lion_dist.plan.strategies import STRATEGIES, Policy, Shards
from lion_dist.plan.timing import iteration_ms
from tests.scenarios.documents import numbers_in, table_with

RESULTS = Path(__file__).parents[2] / "benchmarks/RESULTS.md"
NET = 1e6  # bytes a second, so slow that nothing else counts
KEPT = Policy(reshard_after_forward=False)
FP32, BF16 = PRECISIONS[0], PRECISIONS[2]


def ms(name: str, cluster: Cluster, policy: Policy = KEPT, precision: Precision = FP32) -> float:
    strategy = STRATEGIES[name]
    return iteration_ms(LLAMA, cluster.mesh(strategy.shards), strategy, precision, policy)


def slow(nodes: int) -> Cluster:
    return Cluster(8 * nodes, 8, NET, net_us=0.0)


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_slow_link_between_nodes_takes_the_time_of_its_bytes(name: str) -> None:
    """Those of `Strategy.wire`, which the documents state."""
    strategy = STRATEGIES[name]
    policies = (KEPT, Policy(), Policy(bf16=True))
    for policy, precision, nodes in product(policies, (FP32, BF16), (2, 5)):
        wire = strategy.wire(precision, policy)
        across = wire.within if strategy.shards is Shards.ALL else wire.between
        ranks = nodes if strategy.shards is Shards.NODE else 8 * nodes
        expected = across * LLAMA.params * (ranks - 1) / ranks / NET * 1e3
        assert ms(name, slow(nodes), policy, precision) == pytest.approx(expected, rel=1e-3), (policy, precision, nodes)


@pytest.mark.parametrize("policy", [KEPT, Policy()])
def test_without_bytes_an_iteration_takes_compute_alone(policy: Policy) -> None:
    cluster = Cluster(32, 8, math.inf, within=math.inf, net_us=0.0, hop_us=0.0, memory=math.inf)
    for name in STRATEGIES:
        assert ms(name, cluster, policy) == pytest.approx(LLAMA.compute_ms), name


def test_of_two_links_at_work_at_once_the_slower_one_counts() -> None:
    """Between nodes as fast as within them, all but the embedding's bytes there cost nothing more."""
    cluster = Cluster(16, 8, 8 * 3.0e11, net_us=0.0)
    for name in ("HSDP", 'hybrid, "signs"'):
        apart = ms(name, cluster) - ms(name, replace(cluster, between=math.inf))
        assert 0 < apart < 0.6


def test_one_node_does_not_feel_the_network() -> None:
    for name in STRATEGIES:
        times = {ms(name, network.cluster(8, 8)) for network in NETWORKS.values()}
        assert len(times) == 1, name


def test_gathering_again_costs_time_and_nothing_where_nothing_is_gathered() -> None:
    cluster = NETWORKS["100gbe"].cluster(16, 8)
    for name in STRATEGIES:
        again, once = ms(name, cluster, Policy()), ms(name, cluster)
        if name.startswith(("DDP", "stage")):
            assert again == once
        else:  # links within a node carry more, while those between nodes may be what is waited for
            assert again > once if name == "FSDP2" else again >= once


def test_predictions_stay_near_what_was_measured() -> None:
    for machine in MACHINES:
        found = measured(machine)
        for way in WAYS:
            assert way.ms(machine.model, machine.cluster) == pytest.approx(found[way.mode], rel=0.08), way.what


def test_the_predictions_of_the_results_are_those_of_the_arithmetic() -> None:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        benchmark.main()
    page = RESULTS.read_text().splitlines()
    flat, *meshes = printed.getvalue().split("\nNodes of 8 GPUs, ")
    rows = [line for line in flat.splitlines() if line.startswith("|")]
    assert len(rows) == 3 * 2 + 2 + 2 * 4
    for row in rows:
        assert row in page, row
    for mesh in meshes:
        network, *lines = mesh.splitlines()
        rows = [line for line in lines if line.startswith("|") and line[2].isdigit()]
        assert len(rows) == 4
        for row in rows:
            assert f"| {network.split(':')[0]} {row}" in page, row


def test_the_speed_of_compute_is_that_of_the_results() -> None:
    rows = table_with(RESULTS, "Whole iterations, two GPUs", "mode")
    (alone,) = (numbers_in(ms)[0] for mode, ms in ((r["mode"], r["ms an iteration, median [min, max]"]) for r in rows)
                if mode == "forward and backward alone")  # fmt: skip
    tokens = 4 * 1024
    assert 6 * LLAMA.params * tokens / (TFLOPS * 1e12) * 1e3 == pytest.approx(alone, rel=0.01)
    assert LLAMA.compute_ms == alone
