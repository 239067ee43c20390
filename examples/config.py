"""The options of a training run.

A *preset* is a set of defaults for the size of the model and of the run; options on the command line override it. A
*step* is one optimizer step. It consists of `accumulation` *micro-steps*, each a forward and backward of `batch_size`
windows on every rank.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import torch

from model import GPTConfig
from strategies import STRATEGIES

PARAM_SYNCS = ("auto", "params", "signs")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MOMENTA = ("auto", "float32", "bfloat16", "int8")


@dataclass(frozen=True)
class Option:
    """How the command line presents a field of Config; `least` is the smallest value allowed."""

    help: str
    least: float | None = None


@dataclass(frozen=True)
class Config:
    """Every option of a run; the defaults are those of the preset `tiny`."""

    strategy: Annotated[str, Option(f"how the work is distributed over the ranks: {', '.join(STRATEGIES)}")] = "zero2"
    param_sync: Annotated[str, Option("what zero1, zero2 and hybrid gather: auto, params or signs")] = "auto"
    replicas: Annotated[int, Option("copies of the model under hsdp and hybrid; 0: one on each node", least=0)] = 0
    deepspeed_config: Annotated[Path | None, Option("DeepSpeed's JSON file, for the strategy deepspeed")] = None
    data: Annotated[Path | None, Option("a file or folder; if absent, the Python standard library's sources")] = None
    out: Annotated[Path | None, Option("folder of checkpoint and curve; if absent, runs/<strategy>")] = None
    resume: Annotated[bool, Option("continue from the last checkpoint in --out")] = False
    device: Annotated[str, Option("cpu or cuda")] = "cuda" if torch.cuda.is_available() else "cpu"
    deterministic: Annotated[bool, Option("the same bits in every run on GPUs too, as always on CPUs")] = False

    dtype: Annotated[str, Option("the weights' dtype: fp32 (GPUs compute in bfloat16 by autocast) or bf16")] = "fp32"
    master_weights: Annotated[bool, Option("bf16 weights learn as fp32 ones do, for 2 more bytes each")] = False
    momentum: Annotated[str, Option("the momentum's dtype: auto (the weights'), float32, bfloat16 or int8")] = "auto"

    steps: Annotated[int, Option("optimizer steps", least=1)] = 1000
    batch_size: Annotated[int, Option("windows per rank and micro-step", least=1)] = 8
    accumulation: Annotated[int, Option("micro-steps per step", least=1)] = 1
    seq_len: Annotated[int, Option("bytes per window", least=1)] = 128
    layers: Annotated[int, Option("blocks of the model", least=1)] = 4
    width: Annotated[int, Option("size of its residual stream", least=1)] = 128
    heads: Annotated[int, Option("attention heads", least=1)] = 4

    lr: Annotated[float, Option("peak learning rate", least=0)] = 1e-3
    warmup: Annotated[int, Option("steps until the learning rate reaches its peak", least=0)] = 100
    beta1: Annotated[float, Option("Lion's beta1", least=0)] = 0.95
    beta2: Annotated[float, Option("Lion's beta2", least=0)] = 0.98
    weight_decay: Annotated[float, Option("weight decay of matrices; norms have none", least=0)] = 0.5
    clip: Annotated[float, Option("largest norm of the gradients; 0: no clipping", least=0)] = 1.0
    seed: Annotated[int, Option("seed of the initial weights, the batches and the sample", least=0)] = 0

    statistics: Annotated[bool, Option("write statistics.jsonl and .png, a line every --log-every steps")] = False
    log_every: Annotated[int, Option("steps between two points of the training curve", least=1)] = 10
    eval_every: Annotated[int, Option("steps between two validations", least=1)] = 100
    eval_windows: Annotated[int, Option("windows of one validation", least=1)] = 256
    checkpoint_every: Annotated[int, Option("steps between two checkpoints; one more at the end", least=1)] = 100
    sample: Annotated[int, Option("bytes of text to generate at the end", least=0)] = 400

    def __post_init__(self) -> None:
        for name, (_, option) in options().items():
            value = getattr(self, name)
            if option.least is not None and not value >= option.least:
                raise ValueError(f"{flag(name)} must be at least {option.least}, got {value}")
        for name in ("beta1", "beta2"):
            if not getattr(self, name) < 1:
                raise ValueError(f"{flag(name)} must be less than 1, got {getattr(self, name)}")
        if self.strategy not in STRATEGIES:
            raise ValueError(f"--strategy must be one of {', '.join(STRATEGIES)}, got {self.strategy!r}")
        choices = {"param_sync": PARAM_SYNCS, "dtype": DTYPES, "momentum": MOMENTA}
        for name, expected in choices.items():
            if getattr(self, name) not in expected:
                raise ValueError(f"{flag(name)} must be one of {', '.join(expected)}, got {getattr(self, name)!r}")
        if (self.strategy == "deepspeed") != (self.deepspeed_config is not None):
            raise ValueError(
                "--strategy deepspeed needs --deepspeed_config, and no other strategy takes it: give both, such as "
                "--deepspeed_config launch/deepspeed/zero2.json, or neither"
            )
        if self.deepspeed_config is not None and not self.deepspeed_config.is_file():
            raise ValueError(f"--deepspeed_config: there is no file {self.deepspeed_config}")
        if self.statistics and self.strategy == "deepspeed":
            raise ValueError("--statistics is not for --strategy deepspeed, whose engine clips and steps by itself")
        self.model()

    @property
    def folder(self) -> Path:
        return self.out or Path("runs") / self.strategy

    def precision(self) -> dict[str, Any]:
        """The arguments of the optimizer that say in how many bits weights and momentum are kept. Those that have the
        optimizer's own default are left out."""
        chosen: dict[str, Any] = {"master_weights": True} if self.master_weights else {}
        return chosen if self.momentum == "auto" else {**chosen, "momentum_dtype": self.momentum}

    def model(self) -> GPTConfig:
        return GPTConfig(self.layers, self.width, self.heads, self.seq_len)

    def identity(self) -> dict[str, Any]:
        """The options that a resumed run must have in common with the one that made the checkpoint: all that determine
        the weights. How the work is distributed (strategy, world size, batch_size, accumulation) may change."""
        names = ("layers", "width", "heads", "seq_len", "steps", "warmup", "lr", "beta1", "beta2", "weight_decay")
        more = ("clip", "seed", "dtype", "master_weights", "momentum")
        return {name: getattr(self, name) for name in (*names, *more)}


# `tiny` is for two CPU cores, which need two to three minutes for it; `small` (25 M parameters) is for a GPU.
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {},
    "small": {
        "steps": 3000,
        "batch_size": 32,
        "seq_len": 512,
        "layers": 8,
        "width": 512,
        "heads": 8,
        "lr": 3e-4,
        "warmup": 200,
        "weight_decay": 1.0,
        "eval_every": 250,
        "checkpoint_every": 1000,
    },
}


def options() -> dict[str, tuple[type, Option]]:
    """Returns for each field of Config the type as which the command line is parsed, and its Option."""
    fields = {}
    for name, hint in get_type_hints(Config, include_extras=True).items():
        kind, option = get_args(hint)
        fields[name] = (Path if kind == (Path | None) else kind, option)
    return fields


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def make_parser(argv: Sequence[str] | None = None) -> argparse.ArgumentParser:
    """Makes the parser of Config's options and --preset, which is read first because it sets the others' defaults."""
    presets = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    default = "small" if torch.cuda.is_available() else "tiny"
    presets.add_argument("--preset", choices=PRESETS, default=default, help="size of the model and of the run")
    parser = argparse.ArgumentParser(
        usage="train.py [options]",
        description="Trains a small GPT on bytes with Lion.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        parents=[presets],
        allow_abbrev=False,
    )
    for name, (kind, option) in options().items():
        default = getattr(Config, name)
        if kind is bool:
            parser.add_argument(flag(name), action="store_true", default=default, help=option.help)
        else:
            # DeepSpeed's users write --deepspeed_config.
            parser.add_argument(*dict.fromkeys([flag(name), f"--{name}"]), type=kind, default=default, help=option.help)
    preset = presets.parse_known_args(argv)[0].preset
    parser.set_defaults(**PRESETS[preset])
    return parser
