"""Measures what limits.json bounds, for `python -m benchmarks.step --check`.

GPU: the model of benchmarks.step, in float32 and bfloat16, with gradients kept and moved: our host time in units of the
    foreach baseline's, in turn with it; the kernels and copies of our step; the fraction of the floor.
CPU: the cases of benchmarks.cpu_step on one and on two threads: our time in units of lion-pytorch's, in turn with it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from . import cpu_step, limits
from .measure import Step, copy_bandwidth, cycles_a_ms, device_activity, device_ms, freed
from .peer_steps import foreach, missing
from .step_model import MODES, Model, llama_shapes, make_ours

GPU_REPEATS, CPU_REPEATS = 31, 15
CPU_THREADS = (1, 2)


def host_seconds(step: Step) -> float:
    """Host time of one step with nothing queued on the device."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def on_gpu() -> dict[str, float]:
    """Measured values by the names of their limits."""
    found: dict[str, float] = {}
    cycles = cycles_a_ms()
    for mode, dtype in MODES.items():
        with freed():
            bandwidth = copy_bandwidth(GPU_REPEATS)
        with freed():
            model = Model.random(llama_shapes(), dtype)
            ours, theirs = make_ours(model.groups()), foreach(model.groups())
            for case, before in (("kept", lambda: None), ("moved", model.move_gradients)):
                for _ in range(3):  # compiles, makes state, tables and, for moved gradients, the second set's
                    before()
                    ours()
                    theirs()
                name = f"{mode}, gradients {case}: "
                turns = []
                for _ in range(GPU_REPEATS):
                    before()
                    turns.append((host_seconds(ours), host_seconds(theirs)))
                # The least times: other programs on the host only add to them.
                found[name + "host time / foreach's"] = min(a for a, _ in turns) / min(b for _, b in turns)
                lead_us = 1e6 * statistics.median(a for a, _ in turns)
                (ms,) = device_ms([ours], before, [lead_us], GPU_REPEATS, cycles)
                before()
                kernels, copies = device_activity(ours)
                found |= {name + "kernels": len(kernels), name + "copies": copies}
                floor_ms = model.step_bytes / statistics.median(bandwidth) * 1e3
                found[name + "fraction of the floor"] = floor_ms / statistics.median(ms)
            del model, ours, theirs
    return found


def on_cpu() -> dict[str, float]:
    """Measured values by the names of their limits."""
    found = {}
    for case in cpu_step.CASES:
        for threads in CPU_THREADS:
            names = [cpu_step.OURS, cpu_step.PEER]
            ms = cpu_step.measure(case, threads, names, CPU_REPEATS, cold=False)["ms"]
            found[f"CPU, {case} elements, {threads} threads: time / {cpu_step.PEER}'s"] = cpu_step.ratio(ms)
    return found


def check(device: str = "all") -> int:
    """Prints a line for each limit.

    Args:
        device: "gpu" or "cpu": only what is measured there; "all": both.

    Returns:
        0: every limit that can be measured here holds; 1: one does not; 2: none can be measured here.
    """
    every = limits.read()
    parts: list[tuple[Callable[[], dict[str, float]], list[limits.Limit]]] = []
    if device != "cpu":
        if torch.cuda.is_available():
            parts.append((on_gpu, [limit for limit in every if not limit.name.startswith("CPU, ")]))
        else:
            print("not checked: kernels, the floor and host time, which need a CUDA device")
    if device != "gpu":
        if reason := missing("lion-pytorch"):
            print(f"not checked: time on the CPU beside lion-pytorch, which is {reason}")
        else:
            parts.append((on_cpu, [limit for limit in every if limit.name.startswith("CPU, ")]))
    if not parts:
        return 2
    lines: list[str] = []
    broken: list[str] = []
    for measure, bounds in parts:
        of_part, broken_in_part = limits.compare(measure(), bounds)
        print("\n".join(of_part), flush=True)  # at once: the CPU takes some minutes
        lines += of_part
        broken += broken_in_part
    if broken:
        print(f"\n{len(broken)} of {len(lines)} numbers are worse than {limits.PATH.name} allows:")
        print("\n".join(f"  {line}" for line in broken))
        print("Measure again on an idle machine. If it stays so, find what made the step slower.")
    return 1 if broken else 0
