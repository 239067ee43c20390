"""What benchmarks/overlap.py makes of a profile's kernels."""

from __future__ import annotations

from benchmarks.overlap import MARK, TRACED, Kernel, first_collective, hidden_of, last_iteration, merged

OWN, SHARDS, REPLICAS = 7, 20, 24  # streams
SCATTER, GATHER = "ncclDevKernel_ReduceScatter_Sum_f32_RING_LL", "ncclDevKernel_AllGather_RING_LL"
ALL_REDUCE = "ncclDevKernel_AllReduce_Sum_f32_RING_LL"


def profile(*last: Kernel) -> list[Kernel]:
    """TRACED iterations of 100 us: a forward and a backward of 40 us each, then ``last`` in the last one."""
    kernels = [Kernel(-10, -9, ALL_REDUCE, REPLICAS)]
    for i in range(TRACED):
        start = 100.0 * i
        kernels += [
            Kernel(start, start + 38, "gemm", OWN),
            Kernel(start + 38, start + 40, MARK, OWN),
            Kernel(start + 40, start + 78, "gemm", OWN),
            Kernel(start + 78, start + 80, MARK, OWN),
            Kernel(start + 80, start + 90, "lion_step", OWN),
            Kernel(start + 50, start + 60, SCATTER, SHARDS),
        ]
    return sorted([*kernels, *last])


def test_collectives_of_both_dimensions_are_told_apart() -> None:
    start = 100.0 * (TRACED - 1)
    kernels = profile(
        Kernel(start + 60, start + 84, SCATTER, REPLICAS),  # 18 us under the backward, 4 under the step, 2 under a mark
        Kernel(start + 90, start + 95, GATHER, REPLICAS),
        Kernel(start + 2, start + 6, GATHER, SHARDS),
        Kernel(start + 70, start + 74, ALL_REDUCE, SHARDS),
    )
    assert first_collective(kernels).stream == REPLICAS
    spans, marks = last_iteration(kernels, first_collective(kernels).stream)
    # Times are in ms, from the end of the backward before: the step there, and 20 us later the last iteration.
    assert marks == [-0.002, 0.058, 0.098]
    assert spans["Lion"] == [(0.0, 0.01), (0.1, 0.11)]
    assert spans["reduce"] == [(0.07, 0.08)]
    assert spans["all-gather"] == [(0.022, 0.026)]
    assert spans["reduce between nodes"] == [(0.08, 0.104), (0.09, 0.094)]
    assert spans["all-gather between nodes"] == [(0.11, 0.115)]
    hidden = {name: tuple(round(ms, 6) for ms in pair) for name, pair in hidden_of(spans).items()}
    assert hidden == {
        "reduce": (0.01, 0.01),
        "all-gather": (0.004, 0.004),
        "reduce between nodes": (0.024, 0.022),
        "all-gather between nodes": (0.005, 0.0),
    }


def test_without_a_mesh_all_reductions_are_of_one_lane() -> None:
    start = 100.0 * (TRACED - 1)
    spans, _ = last_iteration(profile(Kernel(start + 60, start + 70, ALL_REDUCE, REPLICAS)), None)
    assert spans["reduce"] == [(0.07, 0.08), (0.08, 0.09)]
    assert merged(spans["reduce"]) == [(0.07, 0.09)]
    assert "reduce between nodes" not in spans
