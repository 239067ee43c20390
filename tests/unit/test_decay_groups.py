"""Groups of what decays and what does not, of plain modules; sharded ones are in tests/distributed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lion_dist import Lion, decay_groups


class Tied(nn.Module):
    """Matrices, biases, a norm, a scalar, a convolution, and an embedding whose weight is the head's too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.conv = nn.Conv1d(3, 3, 3)
        self.norm = nn.LayerNorm(3)
        self.scale = nn.Parameter(torch.ones(()))
        self.head = nn.Linear(3, 5)
        self.head.weight = self.embedding.weight


DECAYING = ["embedding.weight", "conv.weight"]
OTHERS = ["scale", "conv.bias", "norm.weight", "norm.bias", "head.bias"]


def test_matrices_decay_and_biases_and_norms_do_not() -> None:
    model = Tied()
    named = dict(model.named_parameters())
    decays, others = decay_groups(model, 0.5)
    assert sorted(decays["param_names"]) == sorted(DECAYING), "the tied weight once, under its first name"
    assert sorted(others["param_names"]) == sorted(OTHERS)
    assert (decays["weight_decay"], others["weight_decay"]) == (0.5, 0.0)
    for group in (decays, others):
        assert all(p is named[name] for p, name in zip(group["params"], group["param_names"], strict=True))


def test_frozen_parameters_are_in_the_groups() -> None:
    model = Tied().requires_grad_(False)
    model.norm.requires_grad_(True)
    assert sum(len(group["params"]) for group in decay_groups(model, 0.5)) == len(DECAYING + OTHERS)


@pytest.mark.parametrize("make", [Lion, torch.optim.AdamW])
def test_optimizers_take_the_groups_with_their_names(make: Any) -> None:
    model = Tied()
    optimizer = make(decay_groups(model, 0.5), lr=1e-3, weight_decay=7.0)
    assert [sorted(group["param_names"]) for group in optimizer.param_groups] == [sorted(DECAYING), sorted(OTHERS)]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]


def test_an_empty_group_keeps_its_place() -> None:
    """So that every stage of a pipeline has the same groups, and a scheduler as many numbers."""
    for model in (nn.Linear(3, 3, bias=False), nn.LayerNorm(3), nn.Identity()):
        groups = decay_groups(model, 0.5)
        assert [group["weight_decay"] for group in groups] == [0.5, 0.0]
        assert all(len(group["params"]) == len(group["param_names"]) for group in groups)
        if any(group["params"] for group in groups):
            Lion(groups)


def test_state_is_loaded_by_name_into_a_model_in_another_order() -> None:
    def trained(model: nn.Module) -> Lion:
        optimizer = Lion(decay_groups(model, 0.5))
        for name, p in model.named_parameters():
            p.grad = torch.full_like(p, float(len(name)))
        optimizer.step()
        return optimizer

    first = nn.ModuleDict({"a": nn.Linear(3, 3), "bcd": nn.Linear(3, 3)})
    second = nn.ModuleDict({"bcd": nn.Linear(3, 3), "a": nn.Linear(3, 3)})
    saved, loaded = trained(first).state_dict(), Lion(decay_groups(second, 0.5))
    loaded.load_state_dict(saved)
    for name, p in second.named_parameters():
        assert torch.all(loaded.state[p]["exp_avg"] == torch.tensor(1 - 0.99) * len(name)), name


def test_what_is_refused() -> None:
    model: Any = list(Tied().parameters())
    with pytest.raises(TypeError, match=r"needs the model, a torch\.nn\.Module, got a list"):
        decay_groups(model, 0.5)
    with pytest.raises(ValueError, match="'weight' has no shape yet: run the model once"):
        decay_groups(nn.LazyLinear(3), 0.5)
    with pytest.raises(ValueError, match="weight_decay must be finite and >= 0"):
        decay_groups(Tied(), -0.5)
