"""The main job as a user starts it: every strategy, a killed run resumed, and what it says to bad options.

The data is the project's own sources and the model is tiny: these runs are about the machinery. Under
torchrun they are skipped, since they start torchrun themselves.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lion_dist import checkpoint
from lion_dist.checkpoint import Reader
from tests.bits import assert_same_bits
from tests.harness import spawn_only

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
    # A store of its own for every restart; see examples/train.py.
    own_store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **own_store}


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


def last(out: Path) -> Reader:
    return Reader(checkpoint.latest(out))


def step_of(out: Path) -> int:
    return int(checkpoint.read_extra(checkpoint.latest(out))["step"])


def assert_same_checkpoint(a: Path, b: Path) -> None:
    """Weights, momenta, groups, schedule and step of the last checkpoints of two runs."""
    got, expected = last(a), last(b)
    tensors = {n for n in expected.manifest.tensors if not n.startswith("rng.")}
    assert {n for n in got.manifest.tensors if not n.startswith("rng.")} == tensors
    assert any(n.startswith("optim.state.") for n in tensors)
    for name in tensors:
        assert_same_bits(got.fetch(name), expected.fetch(name), name)
    for name, value in expected.manifest.objects.items():
        if name.startswith(("optim.", "scheduler.")):
            assert got.manifest.objects[name] == value, name
    assert step_of(a) == step_of(b)


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


def start(ranks: int, out: Path, *options: str, torchrun: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """Its stderr goes to a file beside ``out``."""
    given = command(ranks, out, *options)
    at = given.index("--standalone")
    with errors_of(out).open("w") as errors:
        return subprocess.Popen(
            [*given[:at], *torchrun, *given[at:]],
            cwd=ROOT,
            env=environment(),
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )


def errors_of(out: Path) -> Path:
    return out.with_suffix(".stderr")


def await_checkpoint(process: subprocess.Popen[str], out: Path) -> None:
    end = time.monotonic() + 120
    while not checkpoint.checkpoints(out):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < end, "no checkpoint after two minutes"
        time.sleep(0.002)


def kill_after_checkpoint(ranks: int, out: Path, *options: str) -> int:
    """Starts a run and kills every process of it, with no warning, once there is a checkpoint; its step."""
    process = start(ranks, out, *options)
    try:
        await_checkpoint(process, out)
    finally:
        kill_tree(process.pid)
        process.wait()
    return step_of(out)


def workers(pid: int) -> list[int]:
    """The processes that a process has started."""
    found = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        found += [int(child) for child in children.read_text().split()]
    return found


def kill_tree(pid: int) -> None:
    """SIGKILL for a process and all that descend from it."""
    os.kill(pid, signal.SIGSTOP)  # it starts nobody while its children are counted
    for child in workers(pid):
        kill_tree(child)
    os.kill(pid, signal.SIGKILL)


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
    assert_same_checkpoint(killed, whole)


@spawn_only
@on_proc
def test_killed_run_resumes(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_well(2, whole)
    assert kill_after_checkpoint(2, killed) < 24  # else there was nothing left to resume
    for ranks, strategy in ((1, "single"), (3, "ddp")):
        copy = tmp_path / strategy
        shutil.copytree(killed, copy)
        run_well(ranks if strategy != "single" else 0, copy, "--resume", "--strategy", strategy)
        assert step_of(copy) == 24
    run_well(2, killed, "--resume")
    assert_same_checkpoint(killed, whole)
    assert len(checkpoint.checkpoints(killed)) == 2  # the last two are kept, and nothing unfinished
    assert not list(killed.glob(".*"))


@spawn_only
def test_fsdp_trains_alike_and_resumes_across_strategies(tmp_path: Path) -> None:
    """A run under FSDP ends as one under DDP; and so does one that goes on, from a step before its end, under another
    strategy than wrote its checkpoint."""
    expected = run_well(2, tmp_path / "ddp", "--strategy", "ddp")[0]
    written = {"ddp": tmp_path / "ddp"}
    for strategy in ("fsdp1", "fsdp2"):
        written[strategy] = tmp_path / strategy
        assert run_well(2, written[strategy], "--strategy", strategy)[0] == pytest.approx(expected, abs=2e-3), strategy
    for writer, reader in (("ddp", "fsdp1"), ("fsdp1", "fsdp2"), ("fsdp2", "hsdp"), ("hsdp", "zero2")):
        out = written[reader] = tmp_path / f"{writer}-{reader}"
        shutil.copytree(written[writer], out)
        shutil.rmtree(checkpoint.latest(out))
        assert step_of(out) == 18
        resumed = run_well(2, out, "--resume", "--strategy", reader)[0]
        assert resumed == pytest.approx(expected, abs=2e-3), f"{writer}, then {reader}"
        assert step_of(out) == 24


@spawn_only
@on_proc
def test_sigterm_saves_and_a_crash_restarts(tmp_path: Path) -> None:
    """SIGTERM to one rank: all save in one step and end well; then one is killed, and torchrun's restart goes on."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run_well(2, whole, "--steps", "100")
    process = start(2, stopped, "--steps", "100")
    try:
        await_checkpoint(process, stopped)
        os.kill(workers(process.pid)[1], signal.SIGTERM)
        said, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0
    assert "stopped by SIGTERM after step" in said
    assert step_of(stopped) < 100
    before = step_of(stopped)
    process = start(2, stopped, "--steps", "100", "--resume", torchrun=("--max_restarts", "2"))
    try:
        while step_of(stopped) == before:
            assert process.poll() is None
        os.kill(workers(process.pid)[0], signal.SIGKILL)
        said, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, errors_of(stopped).read_text()
    assert LAST_LINE.fullmatch(said.splitlines()[-1])
    assert_same_checkpoint(stopped, whole)


@spawn_only
def test_bad_options_say_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.chdir(ROOT)
    from train import main

    out = tmp_path / "out"

    def refused(*options: str) -> str:
        given = [f"--{name}={value}" for name, value in TINY.items()]
        with pytest.raises(SystemExit) as error:
            main([*given, "--out", str(out), "--strategy", "single", *options])
        assert error.value.code == 2
        return capsys.readouterr().err

    for options, message in (
        (["--resume"], "nothing to resume"),
        (["--strategy", "zero9"], "--strategy must be one of"),
        (["--param-sync", "sings"], "--param-sync must be one of"),
        (["--data", str(tmp_path / "absent")], "absent"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--lr", "-1"], "--lr must be at least 0"),
        (["--beta2", "1"], "--beta2 must be less than 1"),
    ):
        assert message in refused(*options)
        assert not checkpoint.checkpoints(out)
    run_well(0, out, "--strategy", "single", "--steps", "1")
    assert "has checkpoints of an earlier run" in refused("--steps", "1")
    assert "steps is 1 in the checkpoint, 2 now" in refused("--steps", "2", "--resume")
