"""A model for FSDP to shard, with gradients that are known exactly (see toy.py), and its unsharded twin.

Its units, which are wrapped one by one, are passed through in a chain, each adding its part of a linear loss. Sizes
split badly for 2 and 4 ranks: odd rows, fewer rows than ranks, parameters of which a rank holds nothing, a shard of
FSDP1 that starts at an odd element.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from lion_dist import Lion
from tests.scenarios.toy import coefficient

UNITS: dict[str, dict[str, tuple[int, ...]]] = {
    "first": {"weight": (13, 7), "gain": (13,), "frozen": (5, 9), "bias": (3,)},
    "second": {"weight": (1, 129), "unused": (6, 5), "gain": (127,)},
    "idle": {"weight": (9, 5)},  # not used at all
    "sometimes": {"weight": (30, 11)},
}
OWN: dict[str, tuple[int, ...]] = {"embedding": (17, 3), "scale": (2,)}  # of the root; the embedding has two names
WRAPPINGS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")


class Unit(nn.Module):
    def __init__(self, name: str, make: Callable[[tuple[int, ...]], nn.Parameter]) -> None:
        super().__init__()
        self.name = name
        for key, shape in UNITS[name].items():
            setattr(self, key, make(shape))

    def forward(self, loss: Tensor, step: int, rank: int, dp_size: int) -> Tensor:
        for key in UNITS[self.name]:  # in a forward of FSDP1 they may be no parameters
            if key not in ("frozen", "unused"):
                loss = loss + term(f"{self.name}.{key}", getattr(self, key), step, rank, dp_size)
        return loss


class FsdpToy(nn.Module):
    """
    Args:
        dtypes: of the root's own parameters, then of each unit, over and over.
        frozen: whether what is called so does not require a gradient.
        tied: whether the embedding has a second name.
    """

    embedding: nn.Parameter
    scale: nn.Parameter

    def __init__(
        self,
        dtypes: tuple[torch.dtype, ...] = (torch.float32,),
        device: str | torch.device = "cpu",
        frozen: bool = True,
        tied: bool = True,
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def make(dtype: torch.dtype, shape: tuple[int, ...]) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype))

        for name, shape in OWN.items():
            setattr(self, name, make(dtypes[0], shape))
        if tied:
            self.tied = self.embedding
        self.units = nn.ModuleDict(
            {name: Unit(name, partial(make, dtypes[(i + 1) % len(dtypes)])) for i, name in enumerate(UNITS)}
        )
        self.units["first"].frozen.requires_grad_(not frozen)

    def forward(self, step: int, rank: int, dp_size: int) -> Tensor:
        loss = term("embedding", self.embedding, step, rank, dp_size)
        loss = loss + term("again", getattr(self, "tied", self.embedding), step, rank, dp_size)
        loss = loss + term("scale", self.scale, step, rank, dp_size)
        for name, unit in self.units.items():
            if uses(name, step):
                loss = unit(loss, step, rank, dp_size)
        return loss

    def average_gradient(self, name: str, step: int, dp_size: int, zeros: bool) -> Tensor | None:
        """Over the ranks; of an unused parameter None, or zeros if its unit was used and ``zeros``, as in FSDP1."""
        p = dict(self.named_parameters())[name]
        *units, key = name.split(".")
        if not p.requires_grad or (units and not uses(units[1], step)):
            return None
        if key in ("frozen", "unused"):
            return torch.zeros_like(p) if zeros else None
        coefficients = ["embedding", "again"] if name == "embedding" else [name.removeprefix("units.")]
        terms = [coefficient(c, p, step, r, dp_size).float() for c in coefficients for r in range(dp_size)]
        return (torch.stack(terms).sum(0) / dp_size).to(p.dtype)


def uses(unit: str, step: int) -> bool:
    return unit != "idle" and (unit != "sometimes" or step % 3 == 1)


def term(name: str, p: Tensor, step: int, rank: int, dp_size: int) -> Tensor:
    c = coefficient(name, p, step, rank, dp_size)
    if isinstance(p, DTensor):  # of tensor parallelism: this rank's part of the sum
        c = distribute_tensor(c, p.device_mesh, p.placements, src_data_rank=None).to_local()
        p = p.to_local()
    return (p * c).float().sum()


def plain_name(name: str) -> str:
    for wrapping in WRAPPINGS:
        name = name.replace(wrapping, "")
    return name


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Decay for matrices, none for the rest, at another lr; and one parameter in a group of its own."""
    named = {plain_name(name): p for name, p in model.named_parameters()}
    own = [named.pop("units.second.gain")]
    decays = [n for n in named if n.endswith(("weight", "embedding", "unused", "frozen"))]
    return [
        {"params": [p for n, p in named.items() if n in decays], "weight_decay": 0.3},
        {"params": [p for n, p in named.items() if n not in decays], "lr": 3e-3},
        {"params": own, "betas": (0.95, 0.98), "maximize": True},
    ]


class Twin:
    """The unsharded model, stepped by Lion with the averaged gradients."""

    def __init__(self, model: FsdpToy, make: Callable[[nn.Module], Lion], zeros: bool) -> None:
        self.model, self.optimizer, self.zeros = model, make(model), zeros

    def step(self, steps: Sequence[int], dp_size: int, scale: Tensor | float = 1.0) -> None:
        """With the gradients of these steps, added up."""
        for name, p in self.model.named_parameters():
            found = [self.model.average_gradient(name, step, dp_size, self.zeros) for step in steps]
            grads = [g for g in found if g is not None]
            p.grad = sum(grads[1:], grads[0]) * scale if grads else None
        self.optimizer.step()
