"""Runs of examples/train.py for tests: tiny, on some of Python's sources, as torchrun starts them or nearly so."""

from __future__ import annotations

import asyncio
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import TCPStore

from lion_dist import checkpoint
from lion_dist.checkpoint import Reader
from tests.asserts import assert_same_bits
from tests.harness import DEADLINE_S, processes

ROOT = Path(__file__).parents[2]
# Runs that are compared must read the same bytes. Nobody edits these while a test runs, unlike the project's sources.
DATA = str(Path(asyncio.__file__).parent)
TINY = {
    "preset": "tiny", "device": "cpu", "data": DATA, "steps": 24, "warmup": 4, "layers": 2, "width": 48,
    "heads": 2, "seq-len": 32, "batch-size": 4, "accumulation": 2, "eval-every": 12, "eval-windows": 8,
    "checkpoint-every": 6, "log-every": 3, "sample": 40,
}  # fmt: skip
LAST_LINE = re.compile(r"val_loss=(\S+) unigram=(\S+) bigram=(\S+) tokens_per_s=(\d+) peak_mib=(\d+)")
GRACE_S = 60.0  # for the other ranks, once one has failed

on_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="kills processes by way of /proc")


def arguments(out: Path, *options: str) -> list[str]:
    return [*(f"--{name}={value}" for name, value in TINY.items()), "--out", str(out), *options]


def begin(ranks: int, out: Path, *options: str, restarts: Sequence[int] = ()) -> tuple[list[Any], TCPStore]:
    """Starts a run: its ranks, and the store that they meet in, which must live as long as they do.

    The ranks get the environment that torchrun gives them, but come from the tests' fork server, which has imported
    torch already. ``ranks`` is 0 for a process of its own, without torchrun. ``restarts``: how many each rank's agent
    has counted; () is none.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun's agent keeps one
    counts = restarts or [0] * max(ranks, 1)
    given = (ranks, store.port, arguments(out, *options), out)
    return processes(_main, [(rank, *given, count) for rank, count in enumerate(counts)]), store


def run(ranks: int, out: Path, *options: str, restarts: Sequence[int] = ()) -> tuple[int, str, str]:
    """Exit code of the ranks (one of those that are not 0, if there are), what the first wrote to stdout, and what all
    wrote to stderr. Arguments as of `begin`."""
    started, _store = begin(ranks, out, *options, restarts=restarts)
    end, failed = time.monotonic() + DEADLINE_S, False
    while any(process.exitcode is None for process in started):
        if not failed and any(process.exitcode for process in started):
            end, failed = time.monotonic() + GRACE_S, True
        if time.monotonic() > end:
            for process in started:
                process.kill()
        next(process for process in started if process.exitcode is None or process is started[-1]).join(0.05)
    code = max((process.exitcode for process in started if process.exitcode), default=0)  # its own before a signal's
    errors = "".join(output_of(out, rank, "stderr").read_text() for rank in range(len(started)))
    return code, output_of(out, 0, "stdout").read_text(), errors


def kill_after_checkpoint(ranks: int, out: Path, *options: str) -> int:
    """Starts a run and kills every process of it, with no warning, once there is a checkpoint; its step."""
    started, _store = begin(ranks, out, *options)
    try:
        await_checkpoint(lambda: all(process.exitcode is None for process in started), out)
    finally:
        for process in started:
            process.kill()
        for process in started:
            process.join()
    return step_of(out)


def await_checkpoint(runs: Callable[[], bool], out: Path, after: int = 0) -> None:
    """Waits for one of a later step, as long as the run ``runs``."""
    end = time.monotonic() + DEADLINE_S
    while not checkpoint.checkpoints(out) or step_of(out) <= after:
        assert runs(), "the run ended before it could be killed"
        assert time.monotonic() < end, f"no checkpoint after {DEADLINE_S} seconds"
        time.sleep(0.002)


@contextmanager
def on_two_cores() -> Iterator[None]:
    """Processes that this thread starts have two cores. The example takes as many threads as a rank has cores, and
    with more of them a model of this size only takes those from the tests beside it."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, random.sample(sorted(cores), min(2, len(cores))))
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def output_of(out: Path, rank: int, name: str) -> Path:
    return out.parent / f"{out.name}.{name}{rank}"


def _main(rank: int, ranks: int, port: int, arguments: list[str], out: Path, restarts: int) -> None:
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(output_of(out, rank, name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    if ranks:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
            TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0",
        )  # fmt: skip
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT / "examples"))
    import train

    start = train.start_process_group

    def start_and_count(world: Any) -> None:
        start(world)  # with an agent's store ranks of other counts do not meet; torchrun gives such ranks none
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(restarts)

    train.start_process_group = start_and_count
    with on_two_cores():
        train.main(arguments)


def run_well(ranks: int, out: Path, *options: str) -> tuple[float, ...]:
    code, said, errors = run(ranks, out, *options)
    assert code == 0, errors
    found = LAST_LINE.fullmatch(said.splitlines()[-1])
    assert found, said
    assert "sample" in said
    return tuple(float(x) for x in found.groups())


def last(out: Path) -> Reader:
    return Reader(checkpoint.latest(out))


def step_of(out: Path) -> int:
    return int(checkpoint.read_extra(checkpoint.latest(out))["step"])


# Under torchrun itself -----------------------------------------------------------------------------


def environment() -> dict[str, str]:
    # A store of its own for every restart; see examples/train.py.
    own_store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **own_store}


def start(ranks: int, out: Path, *options: str, torchrun: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """Its stderr goes to a file beside ``out``."""
    launcher = ["-m", "torch.distributed.run", *torchrun, "--standalone", "--nproc_per_node", str(ranks)]
    with errors_of(out).open("w") as errors, on_two_cores():
        return subprocess.Popen(
            [sys.executable, *launcher, "examples/train.py", *arguments(out, *options)],
            cwd=ROOT,
            env=environment(),
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )


def errors_of(out: Path) -> Path:
    return out.with_suffix(".stderr")


def workers(pid: int) -> list[int]:
    """The processes that a process has started."""
    found = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        found += [int(child) for child in children.read_text().split()]
    return found


def assert_same_checkpoint(a: Path, b: Path) -> None:
    """Weights, momenta, groups, schedule and step of the last checkpoints of two runs on the same data."""
    got, expected = last(a), last(b)
    runs = [checkpoint.read_extra(checkpoint.latest(out))["run"] for out in (a, b)]
    assert runs[0] == runs[1], "the runs differ in data or options, so their weights must differ too"
    tensors = {n for n in expected.manifest.tensors if not n.startswith("rng.")}
    assert {n for n in got.manifest.tensors if not n.startswith("rng.")} == tensors
    assert any(n.startswith("optim.state.") for n in tensors)
    for name in tensors:
        assert_same_bits(got.fetch(name), expected.fetch(name), name)
    for name, value in expected.manifest.objects.items():
        if name.startswith(("optim.", "scheduler.")):
            assert got.manifest.objects[name] == value, name
    assert step_of(a) == step_of(b)
