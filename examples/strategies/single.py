"""One process, `lion_dist.Lion`; also what the other strategies start from."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lion_dist import Lion

Groups = list[dict[str, Any]]


class Single:
    """The model and its optimizer, as the training loop sees them.

    Attributes:
        model: the module itself, under plain names: what is saved, evaluated and sampled from.
        wrapped: what a training forward calls.
        optimizer: made from `groups`, the parameter groups; it keeps their order.
        config: of the run, for strategies that have options of their own.
    """

    def __init__(
        self, model: nn.Module, groups: Groups, lr: float, betas: tuple[float, float], config: Any = None
    ) -> None:
        self.model, self.config = model, config
        self.wrapped = self.wrap(model)
        self.optimizer = self.make_optimizer(groups, lr, betas)

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
        """The model's state, whole. Every rank must call it."""
        return self.model.state_dict()

    def optimizer_state(self) -> dict[str, Any]:
        """The whole optimizer's state on rank 0. Every rank must call it."""
        return self.optimizer.state_dict()

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Load what `optimizer_state` of any strategy and world size returned. Every rank must call it."""
        self.optimizer.load_state_dict(state)

    def bytes_sent_per_step(self, world_size: int) -> int:
        """What one rank sends in an optimizer step, by arithmetic, not measured."""
        return 0

    def parameter_bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.model.parameters())
