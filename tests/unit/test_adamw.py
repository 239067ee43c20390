"""Advice for those who come from AdamW: one place has the numbers, and they are arguments of both optimizers."""

from __future__ import annotations

import inspect
from decimal import Decimal
from typing import Any

import pytest
import torch
from torch import nn

from lion_dist import Lion, ShardedLion, from_adamw
from lion_dist.adamw import FACTORS


@pytest.mark.parametrize("options", [{}, {"factor": FACTORS[0]}, {"factor": 5.5}])
def test_the_product_of_lr_and_weight_decay_stays(options: dict[str, Any]) -> None:
    advice = from_adamw(3e-4, 0.1, **options)
    factor = options.get("factor", 10)
    assert advice["lr"] == pytest.approx(3e-4 / factor)
    assert advice["lr"] * advice["weight_decay"] == pytest.approx(3e-4 * 0.1)


def test_it_is_keyword_arguments_of_both_optimizers() -> None:
    given: dict[str, Any] = {"lr": Decimal("0.001"), "weight_decay": torch.tensor(0.5)}
    advice = from_adamw(**given)
    group = Lion(nn.Linear(2, 2).parameters(), **advice).param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (1e-4, (0.9, 0.99), 5.0)
    for optimizer in (Lion, ShardedLion):
        parameters = inspect.signature(optimizer).parameters
        assert advice.keys() <= parameters.keys()
        assert parameters["betas"].default == advice["betas"], "its betas are those of the paper by default"


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "lr must be finite and >= 0"),
        ({"lr": "1e-3"}, TypeError, "lr must be a number"),
        ({"weight_decay": float("nan")}, ValueError, "weight_decay must be finite"),
        ({"weight_decay": 1e308}, ValueError, "weight_decay must be finite"),
        ({"factor": 0}, ValueError, "factor must be finite and > 0, got 0.0: the paper advises 3 to 10"),
        ({"factor": float("inf")}, ValueError, "factor must be finite"),
        ({"factor": None}, TypeError, "factor must be a number"),
        ({"factor": 1e-320}, ValueError, "is too small for lr .*: lr / factor is infinite"),
    ],
)
def test_what_is_no_advice(given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        from_adamw(**{"lr": 1e-3, "weight_decay": 0.1, **given})
