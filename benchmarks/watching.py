"""The time and memory of Lion.statistics() beside those of step(), on one GPU.

    python -m benchmarks.watching          (from the repository's root)

Model: that of benchmarks.step. Time: of the call, until the device has finished; the median of several. Memory: what
the call allocates at most beyond what there was.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from lion_dist import Lion

from .measure import DEVICE, freed
from .peer_steps import BETAS, LR
from .step_model import MODES, Model, llama_shapes

REPEATS, WARM_UP = 10, 2


def report(name: str, call: Callable[[], object]) -> None:
    taken = []
    for _ in range(WARM_UP + REPEATS):
        torch.cuda.synchronize()
        before, start = torch.cuda.memory_allocated(), time.perf_counter()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    extra = torch.cuda.max_memory_allocated() - before
    print(f"  {name}: {statistics.median(taken[WARM_UP:]) * 1e3:.1f} ms, {extra / 2**20:.0f} MiB at most", flush=True)


def main() -> None:
    for mode, dtype in MODES.items():
        with freed():
            model = Model.random(llama_shapes(), dtype)
            optimizer = Lion(model.groups(), lr=LR, betas=BETAS)
            print(
                f"{mode}, {sum(p.numel() for p in model.params):,} parameters on {torch.cuda.get_device_name(DEVICE)}"
            )
            report("step()", optimizer.step)
            report('statistics("group")', optimizer.statistics)
            report('statistics("parameter")', partial(optimizer.statistics, "parameter"))
            report("statistics(flips=True)", partial(optimizer.statistics, flips=True))
            del model, optimizer


if __name__ == "__main__":
    main()
