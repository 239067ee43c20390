"""The byte model of examples/, for benchmarks that train it: its modules, and one run as examples/train.py makes it."""

from __future__ import annotations

import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lion_dist import decay_groups

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))  # the examples are scripts, which import each other from their own folder

import config  # noqa: E402
import data  # noqa: E402
import train  # noqa: E402
from model import GPT  # noqa: E402
from strategies.single import Groups, Single  # noqa: E402

__all__ = ["GPT", "Groups", "Single", "Training", "make_config"]


@lru_cache
def corpus(seq_len: int) -> data.Corpus:
    return data.load_corpus(None, seq_len)


def make_config(preset: str, **options: Any) -> config.Config:
    return config.Config(**{**config.PRESETS[preset], "strategy": "single", **options})


class Training:
    """A run of examples/train.py in one process, step by step, without checkpoints.

    Attributes:
        model: the model, whose gradients stay in place, clipped, until the next step.
        optimizer: `Lion`, unless the class is derived from.
    """

    strategy: type[Single] = Single

    def __init__(self, settings: config.Config) -> None:
        self.config = settings
        self.world = train.World(0, 1, torch.device(settings.device))
        self.corpus = corpus(settings.seq_len)
        torch.manual_seed(settings.seed)
        self.model = self.cast(GPT(settings.model()).to(self.world.device))
        groups = decay_groups(self.model, settings.weight_decay)
        self.trained = self.strategy(self.model, groups, settings)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.trained.optimizer, lambda step: train.lr_factor(step, settings.warmup, settings.steps)
        )
        self.steps = 0

    def cast(self, made: GPT) -> GPT:
        return made

    def step(self) -> Tensor:
        """Makes one step. Returns the loss, on the device."""
        loss = train.train_step(self.trained, self.corpus, self.config, self.world, self.steps)
        self.scheduler.step()
        self.steps += 1
        return loss

    def evaluate(self) -> float:
        return train.evaluate(self.trained.wrapped, self.corpus, self.config, self.world)
