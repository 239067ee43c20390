"""Accelerate's recipes, with the real Accelerate."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.examples.runs import DATA, ROOT, environment
from tests.harness import DEADLINE_S, spawn_only

SIZES = {"data": DATA, "steps": 5, "layers": 2, "width": 32, "seq-len": 32}


@spawn_only
@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="needs two CUDA devices, or none: two ranks on CPUs")
@pytest.mark.parametrize("flavour", ["fsdp1", "fsdp2"])
def test_trains_saves_and_loads(flavour: str, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    launch = ["-m", "accelerate.commands.launch", "--config_file", f"launch/accelerate/{flavour}.yaml"]
    launch += ["--num_processes", "2", "--main_process_port", "0"]  # port 0: one that is free
    sizes = [f"--{name}={value}" for name, value in SIZES.items()]
    command = [sys.executable, *launch, "tests/examples/accelerate_job.py", *sizes, "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stderr
    found = re.search(r"last_loss=(\S+)\n", done.stdout)
    assert found, done.stdout
    assert float(found[1]) < 5.2  # ln 256 is 5.55
    assert f"loaded {flavour}\n" in done.stdout


def test_the_launcher_names_its_configurations() -> None:
    done = subprocess.run(["launch/accelerate.sh", "fsdp9"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "fsdp1 or fsdp2" in done.stderr
