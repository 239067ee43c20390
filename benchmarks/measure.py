"""How the benchmarks measure: device time, host time, kernel launches, memory, copy bandwidth; and how ranks start.

Device time: the time between two CUDA events around a call. The device is kept busy beforehand, so that the host has
    enqueued everything before the device gets there, and host time is not part of it.
Host time: the time that a call takes on the host with nothing queued on the device.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessContext, start_processes

DEVICE = torch.device("cuda")
COPY_BYTES = 4 << 30

Step = Callable[[], object]


class Spread(NamedTuple):
    """Median of many readings, with their 10th and 90th percentiles."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, readings: Sequence[float]) -> Spread:
        ordered = sorted(readings)
        last = len(ordered) - 1
        return cls(statistics.median(ordered), ordered[round(0.1 * last)], ordered[round(0.9 * last)])


def start_ranks(run: Callable[..., object], args: tuple[Any, ...], ranks: int) -> ProcessContext:
    """Starts run(rank, *args) in a process for each rank; the result's join() raises what a rank raises.

    The processes come from a fork server that has imported already what takes seconds to import. None of it initializes
    CUDA, which would not survive a fork.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(["torch._dynamo", "lion_dist", "benchmarks.peers"])
    context: ProcessContext = start_processes(run, args, ranks, join=False, start_method="forkserver")
    return context


def run_ranks(run: Callable[..., object], args: tuple[Any, ...], ranks: int) -> None:
    """Runs run(rank, *args) in a process for each rank, and raises what a rank raises."""
    context = start_ranks(run, args, ranks)
    while not context.join():
        pass


def join_group(rank: int, ranks: int, rendezvous: str, node: int | None = None) -> torch.device:
    """Selects this rank's GPU and makes the default process group, on NCCL.

    Rank r has GPU r modulo the number of GPUs. NCCL refuses two ranks of a communicator that have one GPU of one host,
    and connects ranks of different hosts over the network alone. NCCL_HOSTID makes
    hosts out of the ranks of one machine: ranks of one host are connected by NVLink or shared memory, and ranks of two
    by sockets on the loopback device.

    Args:
        node: number of consecutive ranks that NCCL takes for a host, at most the number of GPUs. None: 1 where there
            are more ranks than GPUs; else all ranks are on one host, as they are.
    """
    gpus = torch.cuda.device_count()
    device = torch.device("cuda", rank % gpus)
    torch.cuda.set_device(device)
    if node is None and gpus < ranks:
        node = 1
    if node is not None:
        os.environ.update(NCCL_HOSTID=f"node {rank // node}", NCCL_NET="Socket", NCCL_SOCKET_IFNAME="lo")
    dist.init_process_group("nccl", init_method=f"file://{rendezvous}", rank=rank, world_size=ranks, device_id=device)
    return device


def machine(ranks: int, node: int | None = None) -> str:
    """Describes what this number of ranks runs on, for the head of a table; ``node`` as in join_group."""
    gpus = min(ranks, torch.cuda.device_count())
    where = f"{gpus} x {torch.cuda.get_device_name()}"
    if gpus < ranks:
        where += f", shared by {ranks} ranks"
        node = node or 1
    if node is None:
        return where
    return where + (" over NCCL's sockets" if node == 1 else f", NCCL's sockets between nodes of {node} ranks")


def events_ms(run: Step) -> float:
    """Milliseconds of device time that a call takes."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end))


def cycles_a_ms() -> float:
    """Cycles of torch.cuda._sleep in a millisecond: of the fastest of several calls, since an idle GPU clocks down."""
    trial = 20_000_000
    return trial / min(events_ms(lambda: torch.cuda._sleep(trial)) for _ in range(10))


def copy_bandwidth(repeats: int) -> list[float]:
    """Bytes a second of large device-to-device copies; bytes read and bytes written both count."""
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=DEVICE)
    target = torch.zeros_like(source)
    times = [events_ms(lambda: target.copy_(source)) for _ in range(repeats + 2)][2:]
    return [2 * COPY_BYTES / (ms / 1e3) for ms in times]


def step_bytes(params: Sequence[torch.Tensor]) -> int:
    """Number of bytes that any step must move: p and m read and written, g read, all in one dtype."""
    return sum(5 * p.element_size() * p.numel() for p in params)


def host_us(step: Step, before: Step, repeats: int) -> list[float]:
    """Microseconds of host time of each of several steps; ``before`` is called before each and not measured."""
    readings = []
    for _ in range(repeats):
        before()
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        readings.append((time.perf_counter() - start) * 1e6)
        torch.cuda.synchronize()
    return readings


def device_ms(steps: Sequence[Step], before: Step, lead_us: Sequence[float], repeats: int, cycles: float) -> list:
    """Device times, in ms, of several steps that take turns. The host has 1.5 * lead_us[i] to enqueue the i-th step."""
    readings: list[list[float]] = [[] for _ in steps]
    for _ in range(repeats):
        before()
        for step, lead, mine in zip(steps, lead_us, readings, strict=True):
            torch.cuda.synchronize()
            torch.cuda._sleep(int((1.5 * lead / 1e3 + 0.5) * cycles))
            mine.append(events_ms(step))
    return readings


def device_activity(step: Step) -> tuple[list[str], int]:
    """(names of the kernels that one step launches, number of copies and fills that it makes besides)."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        # The trace has a category for each event on the device. The profiler's own event list mixes kernels with copies
        # and with the spans of record_function.
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    kernels = [e["name"] for e in events if e.get("cat") == "kernel"]
    return kernels, sum(e.get("cat") in ("gpu_memcpy", "gpu_memset") for e in events)


def extra_memory(step: Step) -> int:
    """Number of bytes by which memory peaks, during one step, above what was allocated before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    allocated = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - allocated


@contextmanager
def freed() -> Iterator[None]:
    """Context manager that returns memory to the device at its end; the caller has dropped its references."""
    try:
        yield
    finally:
        torch.cuda.synchronize()
        gc.collect()
        torch.cuda.empty_cache()
