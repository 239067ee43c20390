"""The byte model of examples/ trained with weights and momenta of several precisions: validation losses over seeds.

    python -m benchmarks.precision_curves --preset small --steps 800 --jobs 4 --json precision_curves.json

Runs of one seed begin with the same weights, rounded, and read the same batches, so their losses are also compared in
pairs: run by run with the float32 run of that seed. On GPUs all runs compute under bfloat16 autocast. On CPUs, where
products in bfloat16 take eight times as long, all compute in float32, on bfloat16 weights converted to float32;
gradients have the weights' dtype. FlashLion runs on GPUs, if flashoptim is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import statistics
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lion_dist import Lion

from .byte_model import GPT, Groups, Single, Training, make_config
from .momentum_codes import table

FLASHLION = "FlashLion: bf16, 24-bit master, int8"


class Precision(NamedTuple):
    """How weights and momenta are stored. ``options``: of Lion."""

    weights: torch.dtype
    options: dict[str, Any]


PRECISIONS = {
    "fp32": Precision(torch.float32, {}),
    "bf16": Precision(torch.bfloat16, {}),
    "bf16 + master": Precision(torch.bfloat16, {"master_weights": True}),
    "bf16 + master + int8": Precision(torch.bfloat16, {"master_weights": True, "momentum_dtype": torch.int8}),
    "fp32 + int8": Precision(torch.float32, {"momentum_dtype": torch.int8}),
    FLASHLION: Precision(torch.bfloat16, {}),
}


class InFloat32(nn.Module):
    """Computes a module with its parameters converted to float32."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, tokens: Tensor) -> Tensor:
        converted = {name: p.float() for name, p in self.module.named_parameters()}
        logits: Tensor = torch.func.functional_call(self.module, converted, (tokens,))
        return logits


def training_of(name: str, preset: str, seed: int, steps: int, device: str) -> Training:
    """A run that has not begun."""
    precision = PRECISIONS[name]

    class Strategy(Single):
        def wrap(self, model: nn.Module) -> nn.Module:
            on_cpu = next(model.parameters()).device.type == "cpu"
            return InFloat32(model) if on_cpu and precision.weights != torch.float32 else model

        def make_optimizer(self, groups: Groups, lr: float, betas: tuple[float, float]) -> torch.optim.Optimizer:
            if name != FLASHLION:
                return Lion(groups, lr=lr, betas=betas, **precision.options)
            from flashoptim import FlashLion

            made: torch.optim.Optimizer = FlashLion(groups, lr=lr, betas=betas, master_weight_bits=24)
            return made

    class Run(Training):
        strategy = Strategy

        def cast(self, made: GPT) -> GPT:
            for p in made.parameters():  # not its buffers, the angles of positions
                p.data = p.data.to(precision.weights)
            return made

    return Run(make_config(preset, seed=seed, steps=steps, warmup=max(1, steps // 10), device=device))


def run(name: str, preset: str, seed: int, steps: int, device: str, threads: int) -> dict[str, Any]:
    """Trains once. Returns what the JSON holds of a run."""
    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore", message="lion_dist: ")  # bf16 weights without masters: the point of this run
    began = time.monotonic()
    training = training_of(name, preset, seed, steps, device)
    losses = [training.step() for _ in range(steps)]
    val_loss = training.evaluate()
    return {
        "precision": name, "seed": seed, "val_loss": val_loss, "seconds": round(time.monotonic() - began, 1),
        "train_loss": [round(float(loss), 4) for loss in losses[9::10]],
    }  # fmt: skip


def summary(runs: list[dict[str, Any]]) -> str:
    """A table: the mean and standard deviation over seeds, and of the differences from float32 in pairs."""
    losses: dict[str, dict[int, float]] = {}
    for r in runs:
        losses.setdefault(r["precision"], {})[r["seed"]] = r["val_loss"]
    base = losses.get("fp32", {})
    rows = []
    for name in PRECISIONS:
        if not (of := losses.get(name)):
            continue
        differences = [loss - base[seed] for seed, loss in of.items() if seed in base]
        each = ", ".join(f"{of[seed]:.4f}" for seed in sorted(of))
        rows.append([name, mean_and_spread(list(of.values())), mean_and_spread(differences, "+"), each])
    return table(["precision", "validation loss", "above fp32 of the same seed", "each seed"], rows)


def mean_and_spread(values: list[float], sign: str = "") -> str:
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.4f}{spread}"


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--preset", choices=("tiny", "small"), default="small" if device == "cuda" else "tiny")
    parser.add_argument("--steps", type=int, default=800 if device == "cuda" else 250)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--precisions", nargs="*", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each in a process of its own")
    parser.add_argument("--json", type=Path, help="where every run is written")
    options = parser.parse_args()
    names = list(options.precisions)
    if FLASHLION in names and (device == "cpu" or importlib.util.find_spec("flashoptim") is None):
        names.remove(FLASHLION)
        print("FlashLion is left out: it needs a GPU, and flashoptim on PYTHONPATH", flush=True)
    machine = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    found: dict[str, Any] = {
        "machine": machine, "torch": torch.__version__, "preset": options.preset, "steps": options.steps, "runs": []
    }  # fmt: skip
    threads = max(1, len(os.sched_getaffinity(0)) // options.jobs) if device == "cuda" else 1
    began = time.monotonic()
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=spawn) as pool:
        started = [
            pool.submit(run, name, options.preset, seed, options.steps, device, threads)
            for seed in range(options.seeds)
            for name in names
        ]
        for future in as_completed(started):
            found["runs"].append(one := future.result())
            print(f"seed {one['seed']}, {one['precision']}: {one['val_loss']:.4f} ({one['seconds']} s)", flush=True)
            if options.json:
                options.json.write_text(json.dumps(found, indent=1) + "\n")
    what = (
        f"{machine}, torch {torch.__version__}, preset {options.preset}, {options.steps} steps, {options.seeds} seeds"
    )
    print(f"\n{what}, {options.jobs} at a time: {time.monotonic() - began:.0f} s\n\n{summary(found['runs'])}")


if __name__ == "__main__":
    main()
