"""The modes of benchmarks.iteration: how a way to train makes the parts of an iteration."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from .llama import LanguageModel

MAX_NORM = 1.0  # the norm to which --clip clips gradients


@dataclass
class Trainer:
    """The parts of an iteration, which are called in order: forward, backward, step.

    Attributes:
        forward: takes tokens and returns the loss.
        step: clips with --clip, steps, and drops the gradients.
        local: the optimizer, if its step does not communicate, so that one rank can step alone; else None.
        between: the process group of this rank's replicas, in modes over a mesh; else None.
    """

    forward: Callable[[Tensor], Tensor]
    step: Callable[[], object]
    backward: Callable[[Tensor], object] = Tensor.backward
    local: Any = None
    between: dist.ProcessGroup | None = None


def make_trainer(
    forward: Any, optimizer: Any, clip: Callable[[float], object], options: Namespace, local: bool = False
) -> Trainer:
    def step() -> None:
        if options.clip:
            clip(MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()

    return Trainer(forward, step, local=optimizer if local else None)


def torch_clip(model: LanguageModel) -> Callable[[float], object]:
    return partial(clip_grad_norm_, list(model.parameters()))


def device_type(model: LanguageModel) -> str:
    return next(model.parameters()).device.type


def on_gpu(model: LanguageModel) -> bool:
    return device_type(model) == "cuda"


class Mode(NamedTuple):
    """``distribution``: name, for pip, of the package that the mode needs; "" if none."""

    make: Callable[[LanguageModel, Namespace], Trainer]
    what: str
    distribution: str = ""
