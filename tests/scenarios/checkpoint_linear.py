"""A linear layer with Lion, for tests of checkpoints in one process."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lion_dist import Lion, checkpoint
from lion_dist.checkpoint.unfinished import Unfinished
from tests.asserts import assert_same_bits


def filled(value: float = 1.0) -> tuple[nn.Linear, Lion]:
    model = nn.Linear(7, 5)
    for p in model.parameters():
        p.data.fill_(value)
    return model, Lion(model.parameters(), lr=0.5)


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def leave_unfinished(path: Path) -> Path:
    """Leaves what a save to ``path`` leaves when its process dies."""
    unfinished = Unfinished.make(path)
    (unfinished.folder / "data-00000.bin").write_bytes(b"x")
    unfinished.lock.release()
    return unfinished.folder


def assert_holds(path: Path, value: float) -> None:
    model, optimizer = filled(-7.0)
    checkpoint.load(path, model, optimizer)
    assert (next(model.parameters()) == value).all()


PARAMS = ("weight", "bias")


def trained(value: float, lr: float = 0.25) -> tuple[nn.Linear, Lion]:
    """Weights and momenta of one value."""
    model = nn.Linear(70, 50)
    optimizer = Lion(
        [{"params": [model.weight], "weight_decay": 0.5}, {"params": [model.bias], "lr": 2 * lr}],
        lr=lr,
        betas=(0.8, 0.9),
    )
    optimizer.init_state()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(value)
            optimizer.state[p]["exp_avg"].fill_(value)
    return model, optimizer


class Before:
    """The present state of a model, an optimizer and schedulers; calling it asserts that they still have it."""

    def __init__(self, model: nn.Module, optimizer: Lion, *schedulers: Any) -> None:
        self.things = model, optimizer, schedulers
        self.tensors = self.read()
        self.state = dict(optimizer.state)
        self.groups = [dict(group) for group in optimizer.param_groups]
        self.schedulers = [copy.deepcopy(scheduler.state_dict()) for scheduler in schedulers]
        self.generators = torch.get_rng_state(), random.getstate()

    def read(self) -> dict[str, Tensor]:
        model, optimizer, _ = self.things
        found = {name: t.clone() for name, t in model.state_dict().items() if isinstance(t, Tensor)}
        for name, p in model.named_parameters():
            found[f"{name}'s momentum"] = optimizer.state[p]["exp_avg"].clone()
        return found

    def __call__(self) -> None:
        _, optimizer, schedulers = self.things
        for name, t in self.read().items():
            assert_same_bits(t, self.tensors[name], name)
        assert optimizer.state.keys() == self.state.keys()
        assert [dict(group) for group in optimizer.param_groups] == self.groups
        assert [scheduler.state_dict() for scheduler in schedulers] == self.schedulers
        assert torch.equal(torch.get_rng_state(), self.generators[0])
        assert random.getstate() == self.generators[1]


class Kept(nn.Linear):
    """A module with an extra state."""

    def __init__(self, refuses: bool = False) -> None:
        super().__init__(2, 2)
        self.kept: Any = {"calls": [1]}
        self.refuses = refuses

    def get_extra_state(self) -> Any:
        return self.kept

    def set_extra_state(self, state: Any) -> None:
        if self.refuses:
            self.kept = None
            raise RuntimeError("this extra state is of another version")
        self.kept = state


def toy() -> tuple[nn.Linear, Lion]:
    model = nn.Linear(7, 5)
    return model, Lion(model.parameters(), lr=0.5)
