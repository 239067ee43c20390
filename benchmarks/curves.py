"""One training job, examples/train.py, under every strategy: the loss curves on one plot, and the final losses.

    python -m benchmarks.curves --ranks 8 --out curves.png -- --preset tiny --steps 300     (from the repository's root)

Options after `--` go to examples/train.py. Each strategy runs under torchrun, on GPUs (NCCL) or on CPUs (gloo). Where
every rank holds the whole model, the job compares the replicas' bits at its end and fails if they differ.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import torch

from lion_dist import checkpoint

STRATEGIES = {
    "DDP + Lion": ("ddp",),
    "ShardedLion stage 1, signs": ("zero1", "--param-sync=signs"),
    "ShardedLion stage 2, parameters": ("zero2", "--param-sync=params"),
    "ShardedLion stage 2, signs": ("zero2", "--param-sync=signs"),
    "FSDP1 + Lion": ("fsdp1",),
    "FSDP2 + Lion": ("fsdp2",),
}
Curves = dict[str, list[tuple[int, float]]]  # of one run, by name: (step, loss), as examples/report.py records them
LAST_LINE = re.compile(r"val_loss=(\S+) unigram=\S+ bigram=\S+ tokens_per_s=(\S+) peak_mib=(\S+)")
SAME = re.compile(r"the weights are the same bits on all \d+ ranks")


def run(name: str, ranks: int, folder: Path, options: list[str]) -> tuple[list[str], Curves]:
    """Trains with one strategy. Returns the cells of its row and its curves."""
    strategy, *more = STRATEGIES[name]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command += ["examples/train.py", f"--strategy={strategy}", *more, f"--out={folder}", *options]
    threads = str(max(1, (os.cpu_count() or 1) // ranks))
    began = time.monotonic()
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": threads}, check=False
    )
    found = LAST_LINE.search(done.stdout)
    if done.returncode or found is None:
        raise RuntimeError(f"{name} failed: {' '.join(command)}\n{done.stderr}")
    val_loss, tokens_per_s, _ = found.groups()
    same = "yes" if SAME.search(done.stdout) else "not replicated"
    cells = [name, val_loss, same, tokens_per_s, f"{time.monotonic() - began:.0f}"]
    return cells, checkpoint.read_extra(checkpoint.latest(folder))["history"]


def draw(path: Path, curves: dict[str, Curves], title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (losses, differences) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    steps, first = zip(*next(iter(curves.values()))["validation"], strict=True)
    for (name, history), style in zip(curves.items(), ("-", "--", "-.", ":", "-", "--"), strict=True):
        values = [loss for _, loss in history["validation"]]
        losses.plot(steps, values, linestyle=style, label=name)
        differences.plot(steps, [x - y for x, y in zip(values, first, strict=True)], linestyle=style, label=name)
    losses.set(xlabel="step", ylabel="validation loss, nats per byte")
    losses.legend()
    differences.set(xlabel="step", ylabel=f"above the loss of {next(iter(curves))}")
    figure.suptitle(textwrap.fill(title, 120), fontsize=9)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count() or 2)
    parser.add_argument("--out", type=Path, default=Path("curves.png"), help="the plot")
    parser.add_argument("options", nargs="*", help="after --: options of examples/train.py")
    given = parser.parse_args()
    print(
        "| strategy | validation loss | replicas' bits alike | tokens a second | s |\n|---|---|---|---|---|", flush=True
    )
    curves: dict[str, Curves] = {}
    with tempfile.TemporaryDirectory() as folder:
        for i, name in enumerate(STRATEGIES):
            cells, curves[name] = run(name, given.ranks, Path(folder) / str(i), given.options)
            print(f"| {' | '.join(cells)} |", flush=True)
    draw(given.out, curves, f"examples/train.py {' '.join(given.options)}, {given.ranks} ranks")


if __name__ == "__main__":
    main()
