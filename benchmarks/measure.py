"""How the benchmarks measure one device: device time, host time, launches, memory and copy bandwidth. And their ranks.

Device time: between two CUDA events around a call, with the device held up beforehand so that the host
    is never what is waited for.
Host time: what a call takes with nothing queued on the device.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

DEVICE = torch.device("cuda")
COPY_BYTES = 4 << 30

Step = Callable[[], object]


class Spread(NamedTuple):
    """The median of many readings, with their 10th and 90th percentiles."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, readings: Sequence[float]) -> Spread:
        ordered = sorted(readings)
        last = len(ordered) - 1
        return cls(statistics.median(ordered), ordered[round(0.1 * last)], ordered[round(0.9 * last)])


def join_group(rank: int, ranks: int, rendezvous: str) -> torch.device:
    """Takes this rank's GPU and makes the default process group, on NCCL. Ranks that are more than the GPUs share them:
    NCCL takes each for a host of its own, and they talk over its socket transport."""
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    if torch.cuda.device_count() < ranks:
        os.environ.update(NCCL_HOSTID=f"rank {rank}", NCCL_SOCKET_IFNAME="lo")
    dist.init_process_group("nccl", init_method=f"file://{rendezvous}", rank=rank, world_size=ranks, device_id=device)
    return device


def machine(ranks: int) -> str:
    """The GPUs that so many ranks run on, for the head of a table."""
    gpus = min(ranks, torch.cuda.device_count())
    shared = f", shared by {ranks} ranks over NCCL's sockets" if gpus < ranks else ""
    return f"{gpus} x {torch.cuda.get_device_name()}{shared}"


def events_ms(run: Step) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end))


def cycles_a_ms() -> float:
    """Of torch.cuda._sleep; the fastest of several, because an idle device's clock takes a while to rise."""
    trial = 20_000_000
    return trial / min(events_ms(lambda: torch.cuda._sleep(trial)) for _ in range(10))


def copy_bandwidth(repeats: int) -> list[float]:
    """Bytes a second, read and written ones both counted, of large device-to-device copies."""
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=DEVICE)
    target = torch.zeros_like(source)
    times = [events_ms(lambda: target.copy_(source)) for _ in range(repeats + 2)][2:]
    return [2 * COPY_BYTES / (ms / 1e3) for ms in times]


def step_bytes(params: Sequence[torch.Tensor]) -> int:
    """That any step of plain tensors must move: p and m read and written, g read, all of one dtype."""
    return sum(5 * p.element_size() * p.numel() for p in params)


def host_us(step: Step, before: Step, repeats: int) -> list[float]:
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
    """Device times of several steps that take turns; the i-th is given lead_us[i] to enqueue itself in."""
    readings: list[list[float]] = [[] for _ in steps]
    for _ in range(repeats):
        before()
        for step, lead, mine in zip(steps, lead_us, readings, strict=True):
            torch.cuda.synchronize()
            torch.cuda._sleep(int((1.5 * lead / 1e3 + 0.5) * cycles))
            mine.append(events_ms(step))
    return readings


def device_activity(step: Step) -> tuple[list[str], int]:
    """(names of the kernels that one step launches, how many copies and fills it makes beside)."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        # The trace sorts what ran on the device by category; the profiler's own event list mixes kernels with
        # copies and with the spans of record_function.
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    kernels = [e["name"] for e in events if e.get("cat") == "kernel"]
    return kernels, sum(e.get("cat") in ("gpu_memcpy", "gpu_memset") for e in events)


def extra_memory(step: Step) -> int:
    """Bytes by which one step's peak exceeds what was allocated before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    allocated = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - allocated


@contextmanager
def freed() -> Iterator[None]:
    """Gives back the memory of what was dropped within."""
    try:
        yield
    finally:
        torch.cuda.synchronize()
        gc.collect()
        torch.cuda.empty_cache()
