"""launch/setup: which pins reach pip, also where it builds packages. A script stands for Python and notes its calls."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = """#!/usr/bin/env bash
case "$*" in
*"import torch"*) exit {no_torch} ;;
*"-m venv"*) mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
*"-m pip install"*)
    for variable in PIP_CONSTRAINT PIP_BUILD_CONSTRAINT; do
        cat ${{!variable}} | sed "s/^/${{@: -1}} $variable /" >>"$(dirname "$0")/../../pins"
    done ;;
*"print(sys.prefix)"*) echo /nowhere ;;
esac
"""


def pins(folder: Path, *, has_torch: bool) -> dict[tuple[str, str], set[str]]:
    """The pins of launch/setup: by package and by variable, the lines of the files that the variable names."""
    project = folder / "project"
    (project / "launch").mkdir(parents=True)
    for name in ("launch/setup", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, project / name)
    python, own = folder / "python", folder / "own"
    python.write_text(PYTHON.format(no_torch=0 if has_torch else 1))
    python.chmod(0o755)
    own.write_text("demanded==1\n")
    nvidia_smi = folder / "nvidia-smi"  # no GPU, whatever this machine has
    nvidia_smi.write_text("#!/bin/sh\nexit 1\n")
    nvidia_smi.chmod(0o755)
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("PIP_")},
        "PYTHON": str(python), "PIP_CONSTRAINT": str(own), "PATH": f"{folder}:{os.environ['PATH']}",
    }  # fmt: skip
    done = subprocess.run([project / "launch/setup"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[tuple[str, str], set[str]] = {}
    for line in (project / "pins").read_text().splitlines():
        package, variable, pin = line.split(" ", 2)
        found.setdefault((package, variable), set()).add(pin)
    return found


@pytest.mark.parametrize("has_torch", [False, True])
def test_pins_reach_pip_and_what_it_builds(has_torch: bool, tmp_path: Path) -> None:
    constraints = {line for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    setuptools = next(line for line in constraints if line.startswith("setuptools=="))
    torch = next(line for line in constraints if line.startswith("torch=="))
    found = pins(tmp_path, has_torch=has_torch)
    assert {package for package, _ in found} == {".[docs,examples,frameworks,test]"} | (set() if has_torch else {torch})
    for (package, variable), lines in found.items():
        assert {setuptools, "ruff==" + version_of("ruff", constraints)} <= lines, (package, variable)
        # An image's own torch and triton stay, and so do the versions that it demands.
        assert (torch in lines) == (not has_torch)
        assert ("demanded==1" in lines) == (variable == "PIP_CONSTRAINT")


def version_of(package: str, constraints: set[str]) -> str:
    return next(line.removeprefix(f"{package}==") for line in constraints if line.startswith(f"{package}=="))
