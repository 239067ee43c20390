"""Parameters under `Lion` on one process, and copies of them under ShardedLion in all of its modes.

The modes are stage 1 and 2, each with parameters and with signs. Gradients are exact: world_size times numbers of a few
bits, times a power of two that differs from element to element, so that blocks of an 8-bit momentum have small elements
beside large ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from lion_dist import Lion, ShardedLion
from lion_dist.update import reference
from tests.asserts import assert_same_bits

MODES = [(stage, sync) for stage in (1, 2) for sync in ("params", "signs")]
SPECIAL = (math.nan, math.inf, -math.inf)


def sizes(world_size: int) -> list[tuple[int, ...]]:
    """Heads with and without tails, tails alone that share a part of the tail buffer, and nothing at all."""
    return [(1,), (127,), (129,), (world_size * 128 + 5,), (8, 6, 5, 7), (world_size * 256, 3), (0, 3), (40, 33)]


def values(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Parameters of these shapes; those of four dimensions are channels-last."""
    generator = torch.Generator().manual_seed(5)
    drawn = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    return [t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in drawn]


def gradient(i: int, p: Tensor, step: int, rank: int, world_size: int, hostile: bool) -> Tensor:
    """One rank's gradient of parameter i. Where ``hostile``, a few elements of the first rank's are not finite."""
    generator = torch.Generator().manual_seed(1_000_003 * step + 1009 * i)  # the same on all ranks
    power = torch.exp2(torch.randint(-12, 1, p.shape, generator=generator))
    where = torch.randint(400, p.shape, generator=generator)
    generator.manual_seed(1_000_003 * step + 1009 * i + rank + 1)
    g = world_size * torch.randint(-4, 5, p.shape, generator=generator) / 4 * power
    if hostile and rank == 0:
        for number, special in enumerate(SPECIAL):
            g[where == number] = special
    return g.to(p.device, p.dtype)


def average(i: int, p: Tensor, step: int, world_size: int, hostile: bool) -> Tensor:
    terms = [gradient(i, p, step, r, world_size, hostile).float() for r in range(world_size)]
    return (torch.stack(terms).sum(0) / world_size).to(p.dtype)


@dataclass
class Mode:
    """Copies of the parameters under ShardedLion."""

    stage: int
    sync: str
    params: list[nn.Parameter]
    optimizer: ShardedLion

    def __str__(self) -> str:
        return f"stage {self.stage}, {self.sync}"

    def whole_state(self) -> list[dict[str, Tensor]]:
        """The whole state of each parameter, on the CPU; a collective call."""
        return by_param(self.optimizer.full_state_dict(), self.optimizer, self.params)


def by_param(state_dict: dict[str, Any], optimizer: Optimizer, params: Sequence[Tensor]) -> list[dict[str, Tensor]]:
    """The state of each parameter in a state_dict."""
    numbers = {id(p): i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    return [state_dict["state"].get(numbers.get(id(p)), {}) for p in params]


class Modes:
    """`Lion` and the four modes of ShardedLion, which make the same steps.

    Args:
        values: the parameters.
        groups: for each group, its options and the numbers of its parameters.
        of_lion: options of `Lion` alone, which then has float32 parameters of the same values; None: as all others.
        options: of all optimizers.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        values: Sequence[Tensor],
        groups: Sequence[dict[str, Any]],
        of_lion: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.rank, self.world_size = rank, world_size
        self._groups, self._options = groups, {"lr": 0.01, **options}
        self.params = [nn.Parameter(v.clone() if of_lion is None else v.float()) for v in values]
        lion_options = self._options if of_lion is None else {"lr": 0.01, **of_lion}
        self.lion = Lion(self.grouped(self.params), **lion_options)
        self.modes = [self.fresh(stage, sync, values) for stage, sync in MODES]

    def grouped(self, params: list[nn.Parameter]) -> list[dict[str, Any]]:
        return [{**group, "params": [params[i] for i in group["params"]]} for group in self._groups]

    def fresh(self, stage: int, sync: str, values: Sequence[Tensor], **options: Any) -> Mode:
        """One more mode, not among ``modes``, whose parameters have these values; with further options."""
        params = [nn.Parameter(v.detach().clone()) for v in values]
        groups = self.grouped(params)
        return Mode(
            stage, sync, params, ShardedLion(groups, stage=stage, param_sync=sync, **{**self._options, **options})
        )

    def step(self, step: int, max_norm: float | None = None, hostile: bool = False) -> None:
        """One step of all. If there is a max_norm, gradients are clipped, and the parameters of `Lion` must be float32:
        the product with the coefficient would be rounded to 16 bits."""
        world_size, params = self.world_size, self.modes[0].params
        averages = [average(i, p, step, world_size, hostile) for i, p in enumerate(params)]
        self.step_lion(averages, max_norm)
        own = [gradient(i, p, step, self.rank, world_size, hostile) for i, p in enumerate(params)]
        for mode in self.modes:
            if mode.stage == 2:
                pairs = zip(mode.params, own, strict=True)
                torch.stack([(p * g).float().sum() for p, g in pairs if p.requires_grad]).sum().backward()
            else:
                for p, g in zip(mode.params, averages, strict=True):
                    p.grad = g.clone() if p.requires_grad else None
            if max_norm is not None:
                mode.optimizer.clip_grad_norm_(max_norm)
            self.make_step(mode.optimizer)
            mode.optimizer.zero_grad()

    def step_lion(self, averages: Sequence[Tensor], max_norm: float | None) -> None:
        grads = []
        for p, g in zip(self.params, averages, strict=True):
            if p.requires_grad:
                p.grad = g.to(p.dtype, copy=True)
                grads.append(p.grad)
        if max_norm is not None:
            total = torch.stack([reference.sum_of_squares(g) for g in grads]).sum()
            _, scale = reference.clip_coefficient(total, max_norm)
            for g in grads:
                assert g.dtype == torch.float32
                g.mul_(scale)
        self.make_step(self.lion)
        self.lion.zero_grad()

    def make_step(self, optimizer: Optimizer) -> None:
        """Makes one step of `Lion`, which is the first, or of a mode."""
        optimizer.step()

    def check(self, what: str, modes: Sequence[Mode] | None = None) -> None:
        """All weights, all state as state_dict() shows it and the counts of steps are those of `Lion`."""
        of_lion = by_param(self.lion.state_dict(), self.lion, self.params)
        for mode in self.modes if modes is None else modes:
            state = mode.whole_state()
            for i, (p, expected) in enumerate(zip(mode.params, self.params, strict=True)):
                assert_same_bits(p, expected, f"{what}, {mode}: parameter {i}")
                assert list(state[i]) == list(of_lion[i])
                for name, t in of_lion[i].items():
                    assert_same_bits(state[i][name], t.cpu(), f"{what}, {mode}: {name} of parameter {i}")
            for group, other in zip(mode.optimizer.param_groups, self.lion.param_groups, strict=True):
                assert group["rounding_step"] == other["rounding_step"]
