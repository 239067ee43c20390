"""Lion.statistics(): the numbers of what the next step then does, without a trace of having been asked for."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from lion_dist import Lion
from lion_dist.update import sums
from tests.scenarios.watched import CASES, assert_same_numbers, check_steps

F32 = torch.float32


@pytest.mark.filterwarnings("ignore:lion_dist")
@pytest.mark.parametrize("by", ["group", "parameter"])
@pytest.mark.parametrize("case", CASES)
def test_they_are_those_of_the_step(case: str, by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if by == "parameter":
        monkeypatch.setattr(sums, "PIECE", 256)  # several pieces for the larger ones
    check_steps(case, by, torch.device("cpu"))


def test_gradients_that_are_not_finite() -> None:
    """Signs of such elements are neither zero nor those of their gradients, nor do they flip."""
    params = [nn.Parameter(torch.ones(4)) for _ in range(3)]
    optimizer = Lion(params, lr=0.5)
    for own in (torch.tensor([1.0, 0.0, -1.0, 1.0]), torch.tensor([math.inf, math.nan, 1.0, -math.inf])):
        for p, g in zip(params, (own, torch.ones(4), None), strict=True):
            p.grad = g
        got = optimizer.statistics("parameter", flips=True)
        optimizer.step()
    assert math.isnan(got["l2_norm/grad/0"])
    assert math.isnan(got["l2_norm/update/0"])
    assert got["l2_norm/update/1"] == got["l2_norm/grad/1"] / 2 == 1
    assert (got["sign/zero/0"], got["sign/agree/0"], got["sign/flipped/0"]) == (0, 0.25, 0.25)
    assert math.isnan(got["l2_norm/update/global"])
    assert got["sign/zero/global"] == 4 / 12  # of the parameter without a gradient
    assert got["l2_norm/param/2"] == 2
    params[0].grad = torch.full((4,), math.inf)
    assert optimizer.statistics("parameter")["l2_norm/grad/0"] == math.inf


def test_a_parameter_with_gaps_between_its_elements() -> None:
    for options in ({}, {"momentum_dtype": "int8"}):
        whole = [torch.randn(300, 8, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
        params = nn.Parameter(whole[0][:, ::2]), nn.Parameter(whole[0][:, ::2].contiguous())
        found = []
        for p in params:
            p.grad = whole[1][:, 1::2].to(p.dtype)
            found.append(Lion([p], lr=0.1, **options).statistics())  # type: ignore[arg-type]
        assert not params[0].is_contiguous()
        assert_same_numbers(found[0], found[1])


def test_names() -> None:
    def names(by: str, groups: Any) -> set[str]:
        return {name.split("/", 2)[2] for name in Lion(groups, lr=0.1).statistics(by)} - {"global"}

    a, b, frozen = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(4), False)
    assert names("group", [{"params": [a], "name": "decay"}, {"params": [b], "name": "none"}]) == {"decay", "none"}
    assert names("group", [{"params": [a], "name": "same"}, {"params": [b], "name": "same"}]) == {"group0", "group1"}
    assert names("group", [{"params": [a], "name": "decay"}, {"params": [frozen]}]) == {"group0", "group1"}
    assert names("parameter", [("first.weight", a), ("frozen", frozen), ("bias", b)]) == {"first.weight", "bias"}
    assert names("parameter", [frozen, a, b]) == {"1", "2"}
    assert names("group", [{"params": [a], "name": "global"}, {"params": [b], "name": "local"}]) == {"group0", "group1"}
    twice = [{"params": [("w", a)]}, {"params": [("w", b)]}]
    assert names("parameter", twice) == {"0", "1"}


def test_flips_are_counted_from_the_last_call_that_asked_for_them() -> None:
    a, b = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(5))
    optimizer = Lion([a], lr=0.1)

    def flipped(g: list[float], flips: bool = True) -> float | None:
        a.grad = torch.tensor(g, dtype=F32)
        return optimizer.statistics(flips=flips).get("sign/flipped/global")

    assert flipped([1, 1, -1, 0]) is None
    assert flipped([1, -1, 1, 1]) == 0.5
    assert flipped([1, -1, 1, -1]) == 0.25
    assert flipped([1, 1, 1, 1], flips=False) is None
    assert flipped([1, 1, 1, 1]) is None  # the signs had been dropped
    optimizer.add_param_group({"params": [b]})
    assert flipped([-1, -1, -1, -1]) is None  # other parameters
    assert flipped([1, 1, -1, 1]) == 0.75
    a.grad = None
    assert "sign/flipped/global" not in optimizer.statistics(flips=True)
    assert flipped([1, 1, -1, 1]) is None


def test_what_is_refused() -> None:
    p = nn.Parameter(torch.ones(4))
    optimizer = Lion([p], lr=0.1)
    with pytest.raises(ValueError, match='by must be "group" or "parameter", got \'layer\''):
        optimizer.statistics("layer")
    with pytest.raises(TypeError, match="flips must be True or False, got int 1"):
        optimizer.statistics(flips=1)  # type: ignore[arg-type]
    for groups, found in ((None, "a NoneType: give"), ("dp", "a str in it"), ([None], "a NoneType in it")):
        with pytest.raises(TypeError, match=f"process_groups must be a list of process groups, got {found}"):
            optimizer.statistics(process_groups=groups)  # type: ignore[arg-type]
    p.grad = torch.ones(4).to_sparse()
    with pytest.raises(TypeError, match="dense gradients"):
        optimizer.statistics()


def test_without_parameters_and_before_any_gradient() -> None:
    p = nn.Parameter(torch.full((4,), 0.5))
    frozen = nn.Parameter(torch.ones(3), requires_grad=False)
    got = Lion([{"params": [p]}, {"params": [frozen]}], lr=0.1).statistics()
    assert got["l2_norm/param/group0"] == got["l2_norm/param/global"] == 1
    assert got["sign/zero/group0"] == got["sign/zero/global"] == 1
    assert got["l2_norm/param/group1"] == got["sign/zero/group1"] == got["l2_norm/update/global"] == 0


def test_a_call_in_inference_mode_leaves_state_that_can_be_stepped() -> None:
    p = nn.Parameter(torch.ones(4))
    optimizer = Lion([p], lr=0.5)
    p.grad = torch.ones(4)
    with torch.inference_mode():
        optimizer.statistics(flips=True)
    optimizer.step()
    assert (p == 0.5).all()
    assert optimizer.statistics(flips=True)["sign/flipped/global"] == 0


def test_copies_have_signs_of_their_own() -> None:
    p = nn.Parameter(torch.ones(4))
    optimizer = Lion([p], lr=0.1)
    p.grad = torch.ones(4)
    optimizer.statistics(flips=True)
    assert "sign/flipped/global" not in copy.deepcopy(optimizer).statistics(flips=True)
    assert optimizer.statistics(flips=True)["sign/flipped/global"] == 0
