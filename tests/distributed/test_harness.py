"""Tests of the harness itself: its report when one rank raises and another does not end."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.harness import run_ranks, spawn_only


def body_one_raises(rank: int, world_size: int) -> None:
    if rank == 0:
        raise ValueError("on purpose")
    time.sleep(3600)


@spawn_only
def test_a_rank_that_does_not_end_shows_its_stack(tmp_path: Path) -> None:
    with pytest.raises(pytest.fail.Exception) as failed:
        run_ranks(body_one_raises, 2, tmp_path, grace=5.0)
    first, second = str(failed.value).split("--- rank ")[1:]
    assert "ValueError: on purpose" in first
    assert second.startswith("1 ended with exit code -15")
    assert "in body_one_raises" in second
