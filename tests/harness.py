"""Runs one function on several ranks, for tests.

    def body(rank: int, world_size: int, ...) -> result: ...      # module level, so that it can be pickled
    results = run_ranks(body, world_size=3, tmp_path=tmp_path, args=(...))

Each rank is a process of its own (from a fork server that has torch imported already, so a rank starts
in a fraction of a second), with one CPU thread and a rendezvous through a file in tmp_path. If any rank fails, the
test fails with every rank's traceback. A deadline dumps every rank's stack and kills what is left. It finds hangs and
nothing else, so it is many times what a loaded machine needs, and shorter than pytest's own (pyproject.toml), which
shows no rank's stack.

Backend: NCCL alone, as in most training programs, where there is a GPU for each rank, else gloo. On gloo ranks see no
GPU at all. Only tests of what a GPU alone can show (``share_gpus``) have several ranks on one: NCCL takes each for a
host of its own, and they talk over sockets. A GPU serves the processes on it in turn, so that one collective then takes
tens of milliseconds, and more where other tests use the same GPU. NCCL averages by multiplying with 1 / world_size
first, which is exact for powers of two alone: as these tests compare bits, other numbers of ranks meet on gloo. Under
``torchrun -m pytest`` the function runs on the ranks that torchrun made, if they are as many as the test wants; else
the test is skipped.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import gc
import multiprocessing
import os
import pickle
import signal
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests import interpreter

if os.environ.get("TRITON_INTERPRET") == "1":
    interpreter.speed_up()  # in the fork server too

DEADLINE_S = 400.0
GRACE_S = 60.0  # until the other ranks are ended, when one has raised: on NCCL they wait until a collective times out
COLLECTIVE_TIMEOUT = timedelta(seconds=180)

_context = multiprocessing.get_context("forkserver")
# Dynamo takes a second and a half to import, and every optimizer of torch does; the example draws a curve.
_context.set_forkserver_preload(
    ["torch", "torch._dynamo", "lion_dist", "lion_dist.checkpoint", "matplotlib.pyplot", "tests.harness"]
)


def device_of(rank: int, world_size: int) -> torch.device:
    """Where a rank's tensors live: on a GPU if it sees one, else on the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", rank % torch.cuda.device_count())
    return torch.device("cpu")


def _init(rank: int, world_size: int, rendezvous: str, timeout: timedelta) -> None:
    device = device_of(rank, world_size)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        if torch.cuda.device_count() < world_size:
            os.environ.update(NCCL_HOSTID=f"rank {rank}", NCCL_SOCKET_IFNAME="lo")
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=rendezvous, rank=rank, world_size=world_size, timeout=timeout)


def _rank_main(
    work: bytes, rank: int, world_size: int, folder: Path, timeout: timedelta, deadline: float, grace: float,
    on_cpu: bool,
) -> None:  # fmt: skip
    if on_cpu:
        # Nothing has asked for devices in this process yet. The import of a test's module may, and what CUDA has once
        # answered it answers for good: so the body, whose unpickling imports that, comes pickled by itself.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)
    gc.freeze()  # what the fork server has imported; collections need not walk through it
    with open(folder / f"stack{rank}", "w") as stack:
        faulthandler.enable(stack)  # a rank that dies of a signal tells where
        faulthandler.register(signal.SIGTERM, stack, chain=True)  # and one that run_ranks terminates
        faulthandler.dump_traceback_later(deadline, exit=True, file=stack)
        try:
            body, args = pickle.loads(work)
            _init(rank, world_size, f"file://{folder / 'rendezvous'}", timeout)
            outcome = ("returned", body(rank, world_size, *args))
        except BaseException:
            outcome = ("raised", traceback.format_exc())
        (folder / f"outcome{rank}.tmp").write_bytes(pickle.dumps(outcome))
        (folder / f"outcome{rank}.tmp").rename(folder / f"outcome{rank}")
        if dist.is_initialized():
            # gloo fails a rank whose peer leaves while it still talks to it, so all leave together.
            store = torch.distributed.distributed_c10d._get_default_store()
            store.set(f"finished/{rank}", "")
            with contextlib.suppress(RuntimeError):  # one of them was killed: its exit code tells
                patience = deadline if outcome[0] == "returned" else grace
                store.wait([f"finished/{r}" for r in range(world_size)], timedelta(seconds=patience))
        faulthandler.cancel_dump_traceback_later()
    # Not by way of interpreter exit: a failed rank may hold threads that wait for its peers.
    os._exit(0 if outcome[0] == "returned" else 1)


def run_ranks(
    body: Callable[..., Any],
    world_size: int,
    tmp_path: Path,
    args: tuple = (),
    *,
    timeout: timedelta = COLLECTIVE_TIMEOUT,
    deadline: float = DEADLINE_S,
    grace: float = GRACE_S,
    on_cpu: bool = False,
    share_gpus: bool = False,
) -> list[Any]:
    """Returns what ``body(rank, world_size, *args)`` returned on each rank (picklable; no GPU tensors).

    Args:
        body: a module-level function.
        timeout: of the process group's collectives.
        deadline: seconds after which ranks are killed and their stacks shown, where DEADLINE_S is not enough.
        grace: seconds after which the other ranks are ended and their stacks shown, when one has raised.
        on_cpu: on gloo even where there are GPUs: for ranks that outlive a failed collective, which NCCL's do not.
        share_gpus: on NCCL wherever there is a GPU, also for numbers of ranks by which NCCL does not divide exactly.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return _run_under_torchrun(body, world_size, args, timeout)
    enough = torch.cuda.device_count() >= (1 if share_gpus else world_size)
    on_cpu = on_cpu or not enough or (world_size.bit_count() > 1 and not share_gpus)
    folder = tmp_path / f"ranks{len(list(tmp_path.glob('ranks*')))}"
    folder.mkdir()
    work = pickle.dumps((body, args))
    ranks = processes(
        _rank_main, [(work, rank, world_size, folder, timeout, deadline, grace, on_cpu) for rank in range(world_size)]
    )
    end = time.monotonic() + deadline + 5
    running = {process.sentinel: process for process in ranks}
    while running and (ended := wait(list(running), max(0.0, end - time.monotonic()))):
        for sentinel in ended:
            process = running.pop(sentinel)
            process.join()
            if process.exitcode == 1:
                end = min(end, time.monotonic() + grace)
    for process in ranks:
        process.terminate()
    for process in ranks:
        process.join(10.0)
        process.kill()
        process.join()
    results, failures = [], []
    for rank, process in enumerate(ranks):
        file = folder / f"outcome{rank}"
        if file.exists():
            kind, value = pickle.loads(file.read_bytes())
            results.append(value)
            if kind == "raised":
                failures.append(f"--- rank {rank} raised\n{value}")
        else:
            stack = (folder / f"stack{rank}").read_text() if (folder / f"stack{rank}").exists() else ""
            failures.append(f"--- rank {rank} ended with exit code {process.exitcode} and no result\n{stack}")
    if failures:
        pytest.fail("\n".join([f"{body.__name__} on {world_size} ranks:", *failures]), pytrace=False)
    return results


def processes(target: Callable[..., Any], args: list[tuple]) -> list[Any]:
    """One, started from the fork server, for each tuple of arguments."""
    started = [_context.Process(target=target, args=of_one) for of_one in args]
    for process in started:
        process.start()
    return started


def _run_under_torchrun(body: Callable[..., Any], world_size: int, args: tuple, timeout: timedelta) -> list[Any]:
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world_size != ranks:
        pytest.skip(f"needs {world_size} ranks, torchrun made {ranks}")
    if not dist.is_initialized():
        _init(rank, ranks, "env://", timeout)
        atexit.register(dist.destroy_process_group)
    results: list[Any] = [None] * ranks
    try:
        mine: tuple[str, Any] = ("returned", body(rank, ranks, *args))
    except Exception:
        mine = ("raised", traceback.format_exc())
    dist.all_gather_object(results, mine)
    failures = [f"--- rank {r} raised\n{value}" for r, (kind, value) in enumerate(results) if kind == "raised"]
    if failures:
        pytest.fail("\n".join([f"{body.__name__} on {world_size} ranks:", *failures]), pytrace=False)
    return [value for _, value in results]


def spawn_only(function: Callable[..., Any]) -> Callable[..., Any]:
    """Marks a test whose ranks may die or leave a collective half done: not for torchrun's own ranks."""
    return pytest.mark.skipif("TORCHELASTIC_RUN_ID" in os.environ, reason="needs processes of its own")(function)
