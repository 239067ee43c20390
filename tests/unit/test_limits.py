"""The comparison behind `python -m benchmarks.step --check`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import cpu_step, limits, step_check
from benchmarks.limits import Limit

ROOT = Path(__file__).resolve().parents[2]
HOST = Limit("host", 0.2, True, 0.15)
FLOOR = Limit("floor", 0.98, False, 1.0)


def test_limits_that_hold() -> None:
    lines, broken = limits.compare({"host": 0.2, "floor": 0.98}, [HOST, FLOOR])
    assert [line[:2] for line in lines] == ["ok", "ok"]
    assert broken == []


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({"host": 0.21, "floor": 1.0}, "host: 0.21, limit at most 0.2 (it was 0.15 when the limit was set)"),
        ({"host": 0.1, "floor": 0.97}, "floor: 0.97, limit at least 0.98 (it was 1 when the limit was set)"),
        ({"host": 0.1}, "floor: not measured; expected at least 0.98"),
        ({"host": 0.1, "floor": 1.0, "new": 3.0}, "new: 3, but limits.json has no limit for it: add one"),
        ({"host": float("nan"), "floor": 1.0}, "host: nan, limit at most 0.2 (it was 0.15 when the limit was set)"),
    ],
)
def test_limits_that_are_broken(found: dict[str, float], expected: str) -> None:
    lines, broken = limits.compare(found, [HOST, FLOOR])
    assert broken == [expected]
    assert f"WORSE {expected}" in lines


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{"name": "a", "measured": 1}], "expected name, measured, and one of at_most and at_least"),
        ([{"name": "a", "measured": 1, "at_most": 2, "at_least": 1}], "one of at_most and at_least"),
        ([{"name": "a", "at_most": 2}], "expected name, measured"),
        ([{"name": "a", "measured": 3, "at_most": 2}], "measured 3 when the limit was set, at most 2"),
        ([{"name": "a", "measured": 1, "at_most": 2}] * 2, r"two limits have the same name: \['a'\]"),
    ],
)
def test_a_file_that_makes_no_sense_is_refused(tmp_path: Path, entries: list[Any], message: str) -> None:
    path = tmp_path / "limits.json"
    path.write_text(json.dumps(entries))
    with pytest.raises(ValueError, match=message):
        limits.read(path)


def test_the_committed_file_has_a_limit_for_everything_that_is_measured() -> None:
    names = {limit.name for limit in limits.read()}
    measured = {
        f"{mode}, gradients {case}: {what}"
        for mode in ("fp32", "bf16")
        for case in ("kept", "moved")
        for what in ("host time / foreach's", "kernels", "copies", "fraction of the floor")
    } | {
        f"CPU, {case} elements, {threads} threads: time / lion-pytorch's"
        for case in cpu_step.CASES
        for threads in step_check.CPU_THREADS
    }
    assert names == measured


def test_the_check_of_the_cpu_needs_no_triton() -> None:
    program = """
import sys

sys.modules["triton"] = None
from benchmarks import step, step_check

step_check.check = lambda device: {"all": 3}[device]
step.main(["--check"])
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 3, done.stderr


@pytest.mark.parametrize(("factor", "code"), [(1.0, 0), (1.5, 1)])
def test_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], factor: float, code: int
) -> None:
    monkeypatch.setattr(limits, "read", lambda: [Limit("CPU, 3x5 elements", 1.1, True, 1.0), FLOOR])
    measured = {"CPU, 3x5 elements": factor}
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(step_check, "missing", lambda distribution: "")
    monkeypatch.setattr(step_check, "on_cpu", lambda: measured)
    assert step_check.check() == code
    shown = capsys.readouterr().out
    assert "not checked: kernels" in shown
    assert ("are worse than limits.json allows" in shown) == bool(code)
    assert step_check.check("cpu") == code
    assert "not checked" not in capsys.readouterr().out
    assert step_check.check("gpu") == 2


def test_a_machine_that_can_measure_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(step_check, "missing", lambda distribution: f"not installed (pip install {distribution})")
    assert step_check.check() == 2
    assert "pip install lion-pytorch" in capsys.readouterr().out


@pytest.mark.parametrize("case", ["300", "300x", "x512", "0x512", "-1x512", "3x5x7"])
def test_a_case_that_is_none(case: str) -> None:
    with pytest.raises(ValueError, match="such as 300x512"):
        cpu_step.numbers_of(case)


def test_readings_of_a_small_case() -> None:
    found = cpu_step.readings("3x5", [cpu_step.OURS, "AdamW foreach"], repeats=4)
    assert set(found["first"]) == {cpu_step.OURS, "AdamW foreach"}
    assert {len(times) for times in found["ms"].values()} == {4}
    assert cpu_step.ratio(found["ms"], "AdamW foreach") > 0
