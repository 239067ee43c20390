"""What a run holds in each precision and strategy, counted: the bytes that docs/precision.md gives by arithmetic."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks.precision_memory import WAYS, arithmetic, count
from lion_dist.plan.precision import PRECISIONS, SIGNS, Precision
from tests.harness import run_ranks

ROOT = Path(__file__).parents[2]


def body_counted(rank: int, world_size: int, precisions: Sequence[Precision]) -> None:
    warnings.simplefilter("ignore")  # lr is too small for bfloat16 weights
    for name, way in WAYS.items():
        for precision in precisions:
            counted, expected = count(way, precision), way.bytes(precision)
            signs = SIGNS if "signs" in name else 0
            held = counted.weights + counted.gradients + counted.state
            assert held == pytest.approx(expected.on(world_size) - signs, rel=1e-9), (name, precision.name, counted)
            assert signs <= counted.rest < signs + 0.01, (name, precision.name, counted)


def test_what_is_held_is_what_the_document_says(tmp_path: Path) -> None:
    """In the precision that has every kind of state. What is counted are tensors on the CPU."""
    run_ranks(body_counted, 2, tmp_path, (PRECISIONS[-1:],), on_cpu=True)


@pytest.mark.exhaustive
def test_what_is_held_in_every_precision(tmp_path: Path) -> None:
    run_ranks(body_counted, 2, tmp_path, (PRECISIONS,), on_cpu=True)


def test_the_tables_of_the_document_are_the_arithmetic() -> None:
    page = (ROOT / "docs/precision.md").read_text().splitlines()
    for line in arithmetic(8):
        assert line in page, line
