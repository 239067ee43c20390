"""The optimizer's step on the CPU, as ZeRO's offload_optimizer calls it: one flat float32 partition, ours beside
DeepSpeedCPULion.

    python -m benchmarks.cpu_offload                  64 Mi elements
    python -m benchmarks.cpu_offload --mi 256 --threads 16

DeepSpeedCPULion is compiled from C++ when it is first made, which takes minutes; TORCH_EXTENSIONS_DIR is its cache.
torch.compile compiles ours in the first step, which takes seconds.
Floor: the bytes that a step must move (p, g and m read, p and m written) over the bandwidth of a pass that negates a
    tensor in place, whose bytes read and written both count; measured in turn with the steps, on as many threads.
    (A copy would not measure that: a CPU reads a line of memory before it writes one that it has not read.)
Times: the contestants take turns, every second time in reverse order; the median, and the 10th and 90th percentiles.
    The ratio is the median of the turns' ratios.
"""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable

import torch

from lion_dist.deepspeed import DeepSpeedLion

from .measure import Spread, Step
from .peer_steps import BETAS, DECAY, LR, installed_version, missing


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def ours(p: torch.Tensor) -> Step:
    return DeepSpeedLion([p], lr=LR, betas=BETAS, weight_decay=DECAY).step


def deepspeeds(p: torch.Tensor) -> Step:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # the device of the step, even if there is a GPU
    from deepspeed.ops.lion import DeepSpeedCPULion

    step: Step = DeepSpeedCPULion([p], lr=LR, betas=BETAS, weight_decay=DECAY).step
    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--mi", type=int, default=64, help="size of the partition, in 2^20 elements")
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    if reason := missing("deepspeed"):
        parser.error(f"DeepSpeed is {reason}")
    # DeepSpeed's OpenMP reads this when it is loaded; torch has its own setting.
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    torch.set_num_threads(options.threads)

    numel = options.mi << 20
    start, grad = torch.randn(numel), torch.randn(numel)
    steps, params = {}, {}
    for name, make in (("lion_dist", ours), ("DeepSpeedCPULion", deepspeeds)):
        p = params[name] = torch.nn.Parameter(start.clone())
        p.grad = grad.clone()
        steps[name] = make(p)
    for name, step in steps.items():
        print(f"{name}: first step, with compilation, {seconds(step):.1f} s", flush=True)
    far = (params["lion_dist"] - params["DeepSpeedCPULion"]).abs().max().item()
    print(
        f"after it the weights differ by at most {far:.1e} (lr is {LR:.0e}; where c is 0, DeepSpeed moves the weight)",
        flush=True,
    )

    runs: dict[str, Callable[[], object]] = {"floor": start.neg_, **steps}
    turns: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(options.repeats):
        for name in list(runs)[:: 1 if i % 2 else -1]:
            turns[name].append(seconds(runs[name]))
    moved = 20 * numel
    floor = moved / (8 * numel) * statistics.median(turns["floor"])
    versions = f"torch {torch.__version__}, DeepSpeed {installed_version('deepspeed')}"
    print(f"\n{options.mi} Mi float32 elements, {options.threads} threads, {versions}")
    print(f"`{shlex.join(['python', '-m', 'benchmarks.cpu_offload', *sys.argv[1:]])}`\n")
    print("| | ms [p10, p90] | floor / ms | ms / DeepSpeedCPULion's |\n|---|---|---|---|")
    print(f"| floor ({moved / floor / 1e9:.1f} GB/s) | {floor * 1e3:.1f} | 1 | |")
    for name in steps:
        s = Spread.of([1e3 * t for t in turns[name]])
        ratio = statistics.median(a / b for a, b in zip(turns[name], turns["DeepSpeedCPULion"], strict=True))
        print(f"| {name} | {s.median:.1f} [{s.p10:.1f}, {s.p90:.1f}] | {floor * 1e3 / s.median:.2f} | {ratio:.3f} |")


if __name__ == "__main__":
    main()
