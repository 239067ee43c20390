"""What a run holds in each precision and strategy, counted: the bytes that docs/precision.md gives by arithmetic."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from benchmarks.precision_memory import PRECISIONS, SIGNS, STRATEGIES, arithmetic, count
from tests.harness import run_ranks

ROOT = Path(__file__).parents[2]


def body_counted(rank: int, world_size: int) -> None:
    warnings.simplefilter("ignore")  # lr is too small for bfloat16 weights
    for name, strategy in STRATEGIES.items():
        for precision in PRECISIONS:
            counted, expected = count(strategy, precision), strategy.bytes(precision)
            signs = SIGNS if "signs" in name else 0
            held = counted.weights + counted.gradients + counted.state
            assert held == pytest.approx(expected.on(world_size) - signs, rel=1e-9), (name, precision.name, counted)
            assert signs <= counted.rest < signs + 0.01, (name, precision.name, counted)


def test_what_is_held_is_what_the_document_says(tmp_path: Path) -> None:
    run_ranks(body_counted, 2, tmp_path)


def test_the_tables_of_the_document_are_the_arithmetic() -> None:
    page = (ROOT / "docs/precision.md").read_text().splitlines()
    for line in arithmetic(8):
        assert line in page, line
