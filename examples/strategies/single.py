"""One process with `lion_dist.Lion`; also the base class of the other strategies."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

import lion_dist
from lion_dist import Lion, ShardedLion

if TYPE_CHECKING:
    from config import Config  # which lists the strategies

Groups = list[dict[str, Any]]


class Single:
    """The model and its optimizer, as the training loop sees them.

    Attributes:
        model: the module to evaluate: the plain module, or the wrapper where the plain one cannot be called.
        wrapped: the module that a training step calls.
        optimizer: made from the parameter groups `groups`, in their order.
        replicated: whether every rank holds the whole model.
        config: the run's options.
        measures: whether `step` measures what it does.
        numbers: what it measured last.
    """

    replicated = True
    measures = False
    numbers: dict[str, float]

    def __init__(self, model: nn.Module, groups: Groups, config: Config) -> None:
        self.model, self.config = model, config
        self.wrapped = self.wrap(model)
        self.optimizer = self.make_optimizer(groups, config.lr, (config.beta1, config.beta2))

    def wrap(self, model: nn.Module) -> nn.Module:
        return model

    def make_optimizer(self, groups: Groups, lr: float, betas: tuple[float, float]) -> torch.optim.Optimizer:
        return Lion(groups, lr=lr, betas=betas, **self.config.precision())

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def backward(self, loss: Tensor, last: bool) -> None:
        """Computes the gradients of one micro-step; `last` says whether it is the last of its step."""
        loss.backward()

    def step(self, max_norm: float) -> None:
        """Makes one optimizer step, after clipping to `max_norm` if that is not 0."""
        if max_norm:
            self.clip(max_norm)
        if self.measures:
            self.numbers = self.statistics()
        self.optimizer.step()

    def no_sync(self) -> AbstractContextManager[None]:
        """Context manager for every micro-step but the last: gradients add up locally and are not communicated."""
        return nullcontext()

    def clip(self, max_norm: float) -> Tensor:
        """Scales the gradients so that their norm over all parameters is at most `max_norm`. Returns the old norm."""
        return torch.nn.utils.clip_grad_norm_(self.model.parameters(), max_norm)

    def statistics(self) -> dict[str, float]:
        """Numbers that describe the next step, over all ranks. Every rank must call it."""
        assert isinstance(self.optimizer, (Lion, ShardedLion))
        return self.optimizer.statistics()

    def model_state(self) -> dict[str, Tensor]:
        """Returns the whole model's state on rank 0, under plain names. Every rank must call it."""
        return self.model.state_dict()

    def save(self, path: Path, scheduler: LRScheduler, extra: dict[str, Any], keep_last: int) -> None:
        """Saves a checkpoint that every strategy but DeepSpeed can `load`. Every rank must call it."""
        lion_dist.checkpoint.save(
            path, self.wrapped, self.optimizer, schedulers=scheduler, extra=extra, keep_last=keep_last
        )

    def load(self, path: Path, scheduler: LRScheduler) -> None:
        """Loads a checkpoint of `save`. Every rank must call it."""
        if "deepspeed" in lion_dist.checkpoint.read_extra(path):
            raise ValueError(f"{path} was written by --strategy deepspeed, which has its own format: resume with that")
        lion_dist.checkpoint.load(path, self.wrapped, self.optimizer, schedulers=scheduler)

    def bytes_sent_per_step(self, world_size: int, micro_steps: int) -> int:
        """Bytes that one rank sends in an optimizer step of `micro_steps` micro-steps; calculated, not measured."""
        return 0

    def parameter_bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.model.parameters())
