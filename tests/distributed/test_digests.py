"""Weights and momenta after 20 steps have the committed digests (tests/digests.py), whatever has been refactored."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import digest_strategies, digests

ROOT = Path(__file__).parents[2]
EXPECTED: dict[str, list[str]] = json.loads(digests.EXPECTED.read_text())


def test_every_scenario_has_a_digest() -> None:
    names = [scenario.name for scenario in digests.scenarios()]
    assert len(set(names)) == len(names)
    assert set(names) == set(EXPECTED)


def test_the_interpreter_gives_the_digests_of_plain_torch() -> None:
    """In float32 and float16; it truncates where it stores bfloat16, for which a GPU gives plain torch's digests."""
    compared = 0
    for scenario in digests.scenarios():
        if scenario.triton:
            assert scenario.plain_name in EXPECTED
            if not scenario.dtypes.startswith("bf16"):
                assert EXPECTED[scenario.name] == EXPECTED[scenario.plain_name], scenario.name
                compared += 1
    assert compared >= 4


def test_strategies_that_have_the_same_gradients_have_the_same_digests() -> None:
    """FSDP1 and DeepSpeed have gradients of zeros where others have None, and "lion" and "tp" those of two ranks."""
    found: dict[tuple[object, ...], set[str]] = {}
    for s in digests.scenarios():
        same = s.strategy in ("ddp", "sharded", "fsdp2", "hsdp") and s.variant != "accumulate"
        if same and not (s.triton and s.dtypes == "bf16"):
            key = (s.world_size, s.dtypes, s.shapes, s.variant)
            found.setdefault(key, set()).add("/".join(EXPECTED[s.name]))
    assert {len(of_one) for of_one in found.values()} == {1}
    assert EXPECTED["tp/fp32/2 ranks/plain/small"] == EXPECTED["lion/fp32/1 ranks/plain/small"]


def test_differences_are_described() -> None:
    expected = {"a": ["1", "2"], "b": ["3", "4"]}
    assert digests.differences({"a": ["1", "2"]}, expected) == []
    assert digests.differences({"a": ["1", "9"], "b": ["9", "4"], "c": ["5", "6"]}, expected) == [
        "a: the momenta have digest 9, expected 2",
        "b: the weights have digest 9, expected 3",
        "c: no digest is expected for it; --write makes a new file",
    ]


def test_numbers_from_integers() -> None:
    """These must not change with a version of torch, or every digest would."""
    assert digest_strategies.integers("matrix", 6, 0, 8).tolist() == NUMBERS
    assert digest_strategies.integers("matrix", 10_000, 0, 8).unique().tolist() == list(range(-8, 9))


NUMBERS = [8, -8, 7, 1, 1, -8]


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
def test_digests_are_the_committed_ones() -> None:
    done = subprocess.run([sys.executable, "-m", "tests.digests"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stdout
