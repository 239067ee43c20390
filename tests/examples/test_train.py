"""The main job as a user starts it: every strategy, a killed run resumed, and what it says to bad options.

The data is the project's own sources and the model is tiny: these runs are about the machinery. Under
torchrun they are skipped, since they start torchrun themselves.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.bits import assert_same_bits
from tests.harness import run_ranks, spawn_only

ROOT = Path(__file__).parents[2]
TINY = {
    "preset": "tiny", "device": "cpu", "data": "lion_dist", "steps": 24, "warmup": 4, "layers": 2, "width": 48,
    "heads": 2, "seq-len": 32, "batch-size": 4, "accumulation": 2, "eval-every": 12, "eval-windows": 8,
    "checkpoint-every": 6, "log-every": 3, "sample": 40,
}  # fmt: skip
LAST_LINE = re.compile(r"val_loss=(\S+) unigram=(\S+) bigram=(\S+) tokens_per_s=(\d+) peak_mib=(\d+)")


def command(ranks: int, out: Path, *options: str) -> list[str]:
    train = ["examples/train.py", *(f"--{name}={value}" for name, value in TINY.items()), "--out", str(out), *options]
    if ranks == 0:  # without torchrun
        return [sys.executable, *train]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    return [sys.executable, *torchrun, *train]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def run(ranks: int, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(ranks, out, *options), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240
    )


def run_well(ranks: int, out: Path, *options: str) -> tuple[float, ...]:
    done = run(ranks, out, *options)
    assert done.returncode == 0, done.stderr
    found = LAST_LINE.fullmatch(done.stdout.splitlines()[-1])
    assert found, done.stdout
    assert "sample" in done.stdout
    return tuple(float(x) for x in found.groups())


def checkpoint(out: Path) -> dict[str, Any]:
    return torch.load(out / "checkpoint.pt", weights_only=True)


def assert_same_checkpoint(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a["step"] == b["step"]
    assert a["model"].keys() == b["model"].keys()
    for name in a["model"]:
        assert_same_bits(a["model"][name], b["model"][name], name)
    assert a["optimizer"]["param_groups"] == b["optimizer"]["param_groups"]
    assert a["optimizer"]["state"].keys() == b["optimizer"]["state"].keys()
    for i, entry in a["optimizer"]["state"].items():
        assert_same_bits(entry["exp_avg"], b["optimizer"]["state"][i]["exp_avg"], f"exp_avg {i}")
    assert a["scheduler"] == b["scheduler"]


@spawn_only
def test_strategies_train_alike(tmp_path: Path) -> None:
    """Two ranks average the same gradients whatever the strategy; their norm for clipping is not the same
    to the last bit (torch's is float32), so the losses agree and the bits need not."""
    losses = {}
    for strategy, ranks in (("single", 0), ("ddp", 2), ("zero1", 2), ("zero2", 2)):
        out = tmp_path / strategy
        val_loss, unigram, bigram, tokens_per_s, peak_mib = run_well(ranks, out, "--strategy", strategy)
        assert 0 < bigram < unigram < 5.55  # ln 256
        assert val_loss < 5.55
        assert tokens_per_s > 0
        assert peak_mib > 0
        assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")
        losses[strategy] = val_loss
    assert losses["ddp"] == pytest.approx(losses["zero1"], abs=2e-3)
    # The slices, and so the norm that the coefficient comes from, are those of stage 1: the same bits.
    assert losses["zero2"] == losses["zero1"]
    assert losses["single"] == pytest.approx(losses["ddp"], abs=0.5)  # half the data a step


def kill_after_checkpoint(ranks: int, out: Path, *options: str) -> int:
    """Starts a run and kills every process of it, with no warning, once there is a checkpoint; its step."""
    process = subprocess.Popen(
        command(ranks, out, *options),
        cwd=ROOT,
        env=environment(),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        end = time.monotonic() + 120
        while not (out / "checkpoint.pt").exists():
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < end, "no checkpoint after two minutes"
            time.sleep(0.002)
    finally:
        kill_tree(process.pid)
        process.wait()
    return int(checkpoint(out)["step"])


def kill_tree(pid: int) -> None:
    """SIGKILL for a process and all that descend from it."""
    os.kill(pid, signal.SIGSTOP)  # it starts nobody while its children are counted
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in children.read_text().split():
            kill_tree(int(child))
    os.kill(pid, signal.SIGKILL)


def body_loaded(rank: int, world_size: int, out: Path) -> None:
    """What a resumed run starts from, on this many ranks, is what the checkpoint holds."""
    sys.path.insert(0, str(ROOT / "examples"))
    from model import GPT, GPTConfig
    from strategies import STRATEGIES
    from train import parameter_groups

    saved = checkpoint(out)
    run = saved["run"]
    torch.manual_seed(rank)
    model = GPT(GPTConfig(run["layers"], run["width"], run["heads"], run["seq_len"]))
    model.load_state_dict(saved["model"])
    groups = parameter_groups(model, run["weight_decay"])
    strategy = STRATEGIES["zero2"](model, groups, run["lr"], (run["beta1"], run["beta2"]))
    strategy.load_optimizer_state(saved["optimizer"])
    full = strategy.optimizer.full_state_dict()  # type: ignore[attr-defined]
    assert_same_checkpoint({**saved, "model": model.state_dict(), "optimizer": full}, saved)


on_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="kills processes by way of /proc")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@spawn_only
@on_proc
@on_gpu
def test_killed_run_resumes_on_gpus(tmp_path: Path) -> None:
    """With --deterministic, which a GPU needs for it; autocast to bfloat16, NCCL."""
    ranks = min(2, torch.cuda.device_count())
    options = ("--device", "cuda", "--deterministic", "--steps", "200")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_well(ranks, whole, *options)
    assert kill_after_checkpoint(ranks, killed, *options) < 200
    run_well(ranks, killed, "--resume", *options)
    assert_same_checkpoint(checkpoint(killed), checkpoint(whole))


@spawn_only
@on_proc
def test_killed_run_resumes(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_well(2, whole)
    assert kill_after_checkpoint(2, killed) < 24  # else there was nothing left to resume
    for ranks in (1, 3):
        run_ranks(body_loaded, ranks, tmp_path, (killed,))
        copy = tmp_path / f"on{ranks}"
        copy.mkdir()
        (copy / "checkpoint.pt").write_bytes((killed / "checkpoint.pt").read_bytes())
        run_well(ranks, copy, "--resume")
        assert checkpoint(copy)["step"] == 24
    run_well(2, killed, "--resume")
    assert_same_checkpoint(checkpoint(killed), checkpoint(whole))


@spawn_only
def test_bad_options_say_what_to_do(tmp_path: Path) -> None:
    for options, message in (
        (["--resume"], "nothing to resume"),
        (["--strategy", "zero9"], "--strategy must be one of"),
        (["--data", str(tmp_path / "absent")], "absent"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--lr", "-1"], "--lr must be at least 0"),
        (["--beta2", "1"], "--beta2 must be less than 1"),
    ):
        done = run(0, tmp_path / "out", "--strategy", "single", *options)
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "out" / "checkpoint.pt").exists()
