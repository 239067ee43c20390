"""The arithmetic of benchmarks/model.py over a mesh, against the bytes that docs/hybrid.md states."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from benchmarks.model import NVLINK, PARAMS, WAYS_OVER_A_MESH, Mesh, mesh_of

NET = 1e6  # bytes a second, so slow that nothing else counts


@pytest.mark.parametrize(
    ("way", "bytes_per_element"),
    [("hsdp", 8), ("hsdp_bf16", 4), ("hybrid", 8), ("hybrid_signs", 4.25), ("hybrid_signs_16", 2.25)],
)
@pytest.mark.parametrize("nodes", [2, 5])
def test_a_slow_link_between_nodes_takes_the_time_of_its_bytes(way: str, bytes_per_element: float, nodes: int) -> None:
    ms = WAYS_OVER_A_MESH[way].ms(mesh_of(nodes, NET, net_us=0.0))
    assert ms == pytest.approx(bytes_per_element * PARAMS * (nodes - 1) / nodes / NET * 1e3, rel=1e-3)


def test_over_all_ranks_each_adapter_carries_the_whole_model_twice() -> None:
    ms = WAYS_OVER_A_MESH["fsdp2_grad_op"].ms(mesh_of(4, NET, net_us=0.0))
    assert ms == pytest.approx(8 * PARAMS * 31 / 32 / NET * 1e3, rel=1e-3)


def test_without_bytes_an_iteration_takes_compute_alone() -> None:
    fast = replace(NVLINK, link=math.inf, memory=math.inf, hop_us=0.0, net_us=0.0)
    mesh = Mesh(replace(fast, ranks=8, node=8), replace(fast, ranks=4, node=1), replace(fast, ranks=32, node=8))
    for way in WAYS_OVER_A_MESH.values():
        assert way.ms(mesh) == pytest.approx(NVLINK.compute_ms), way.what


def test_of_two_links_at_work_at_once_the_slower_one_counts() -> None:
    """Between nodes as fast as within them, all but the embedding's bytes there cost nothing more."""
    mesh = mesh_of(2, 8 * NVLINK.link, net_us=0.0)
    alone = mesh._replace(replicas=replace(mesh.replicas, link=math.inf))
    for way in ("hsdp", "hybrid_signs"):
        apart = WAYS_OVER_A_MESH[way].ms(mesh) - WAYS_OVER_A_MESH[way].ms(alone)
        assert 0 < apart < 0.6
