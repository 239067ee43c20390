"""One process, `lion_dist.Lion`; also what the other strategies start from."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

import lion_dist
from lion_dist import Lion

if TYPE_CHECKING:
    from config import Config  # which lists the strategies

Groups = list[dict[str, Any]]


class Single:
    """The model and its optimizer, as the training loop sees them.

    Attributes:
        model: what is evaluated: the module itself, unless its forward is not to be called without its wrapper.
        wrapped: what a training forward calls.
        optimizer: made from `groups`, the parameter groups; it keeps their order.
        replicated: whether every rank holds the model whole.
        config: the run's options.
    """

    replicated = True

    def __init__(self, model: nn.Module, groups: Groups, config: Config) -> None:
        self.model, self.config = model, config
        self.wrapped = self.wrap(model)
        self.optimizer = self.make_optimizer(groups, config.lr, (config.beta1, config.beta2))

    def wrap(self, model: nn.Module) -> nn.Module:
        return model

    def make_optimizer(self, groups: Groups, lr: float, betas: tuple[float, float]) -> torch.optim.Optimizer:
        return Lion(groups, lr=lr, betas=betas)

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def backward(self, loss: Tensor, last: bool) -> None:
        """The gradients of one micro-step; `last` of its step or not."""
        loss.backward()

    def step(self, max_norm: float) -> None:
        """One optimizer step, after clipping to `max_norm` where that is not 0."""
        if max_norm:
            self.clip(max_norm)
        self.optimizer.step()

    def no_sync(self) -> AbstractContextManager[None]:
        """Around every micro-step but the last: gradients add up locally and are not communicated."""
        return nullcontext()

    def clip(self, max_norm: float) -> Tensor:
        """Scale the gradients so that their norm over all parameters is at most `max_norm`; the norm before."""
        return torch.nn.utils.clip_grad_norm_(self.model.parameters(), max_norm)

    def model_state(self) -> dict[str, Tensor]:
        """The whole model's state on rank 0, under plain names. Every rank must call it."""
        return self.model.state_dict()

    def save(self, path: Path, scheduler: LRScheduler, extra: dict[str, Any], keep_last: int) -> None:
        """A checkpoint, which any strategy can `load` that has not a format of its own. Every rank must call it."""
        lion_dist.checkpoint.save(
            path, self.wrapped, self.optimizer, schedulers=scheduler, extra=extra, keep_last=keep_last
        )

    def load(self, path: Path, scheduler: LRScheduler) -> None:
        """Every rank must call it."""
        if "deepspeed" in lion_dist.checkpoint.read_extra(path):
            raise ValueError(f"{path} was written by --strategy deepspeed, in a format of its own: resume with that")
        lion_dist.checkpoint.load(path, self.wrapped, self.optimizer, schedulers=scheduler)

    def bytes_sent_per_step(self, world_size: int, micro_steps: int) -> int:
        """What one rank sends in an optimizer step of so many micro-steps, by arithmetic, not measured."""
        return 0

    def parameter_bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.model.parameters())
