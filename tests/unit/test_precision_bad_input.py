"""Bad input that concerns master weights and 8-bit momenta: a clear error, and nothing is changed."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from lion_dist import Lion
from tests.asserts import assert_same_params
from tests.scenarios.lion_params import feed, params_of, run, snapshot

pytestmark = pytest.mark.filterwarnings("ignore:lion_dist. lr = ")


@pytest.mark.parametrize(
    ("count", "error"),
    [(-1, ValueError), (1.5, ValueError), (math.nan, ValueError), (2**60, ValueError), ("3", TypeError)],
)
def test_bad_counts_of_rounded_steps(count: Any, error: type[Exception]) -> None:
    """They choose how 8-bit momenta are rounded next; only groups have them."""
    message, bad = "rounding_step must be", {"rounding_step": count, "momentum_dtype": "int8"}
    with pytest.raises(error, match=message):
        Lion([{"params": params_of(), **bad}])
    params = params_of()
    opt = Lion([{"params": params[:2]}, {"params": params[2:]}], lr=0.25, momentum_dtype="int8")
    run(opt, params, range(1))
    before = snapshot(opt)
    with pytest.raises(error, match=message):
        opt.add_param_group({"params": params_of(seed=5), **bad})
    saved = copy.deepcopy(opt.state_dict())
    saved["param_groups"][1].update(bad)
    with pytest.raises(error, match=message):
        opt.load_state_dict(saved)
    assert snapshot(opt) == before
    opt.param_groups[1]["rounding_step"] = count
    before = snapshot(opt)
    feed(params, 1)
    with pytest.raises(error, match=message):
        opt.step()
    assert snapshot(opt) == before


EDITS: dict[str, tuple[dict[str, Any], dict[str, Any], type[Exception], str]] = {
    "to 8 bits": ({}, {"momentum_dtype": "int8"}, ValueError, r"was changed to int8, .* \(2, 3, 4\) is torch.bfloat16"),
    "from 8 bits": (
        {"momentum_dtype": "int8"},
        {"momentum_dtype": None},
        ValueError,
        "was changed to None, .*torch.int8",
    ),
    "master weights by word": (
        {},
        {"master_weights": "on"},
        TypeError,
        "master_weights must be True or False, got 'on'",
    ),
    "int16": ({}, {"momentum_dtype": torch.int16}, TypeError, "or int8, got torch.int16"),
}


@pytest.mark.parametrize(("options", "edit", "error", "message"), EDITS.values(), ids=EDITS.keys())
@pytest.mark.parametrize("also", ["edit alone", "edit and new group"])
def test_edited_precision(
    options: dict[str, Any], edit: dict[str, Any], error: type[Exception], message: str, also: str
) -> None:
    """In the second group: the first must not have been stepped by then. A new group makes Lion look at all."""
    params = params_of(torch.bfloat16)
    opt = Lion([{"params": params[:-1]}, {"params": params[-1:]}], lr=0.25, **options)
    run(opt, params, range(1))
    opt.param_groups[1].update(edit)
    if also == "edit and new group":
        opt.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    before = snapshot(opt)
    feed(params, 1)
    with pytest.raises(error, match=message):
        opt.step()
    assert snapshot(opt) == before


@pytest.mark.parametrize("edit", [(torch.int8, None), (None, torch.int8)], ids=["from 8 bits", "to 8 bits"])
def test_a_form_edited_while_its_parameters_are_frozen(edit: tuple[Any, Any]) -> None:
    """The other parameters are stepped; the frozen ones are refused once they take part, with nothing changed."""
    params = params_of(torch.bfloat16)
    frozen, rest = params[:2], params[2:]
    opt = Lion([{"params": frozen, "momentum_dtype": edit[0]}, {"params": rest}], lr=0.25)
    run(opt, params, range(2))
    for p in frozen:
        p.requires_grad_(False)
        p.grad = None
    opt.param_groups[0]["momentum_dtype"] = edit[1]
    run(opt, rest, range(2, 4))
    for p in frozen:
        p.requires_grad_(True)
    before = snapshot(opt)
    feed(params, 4)
    with pytest.raises(ValueError, match="momentum_dtype of a parameter group was changed"):
        opt.step()
    assert snapshot(opt) == before
    opt.param_groups[0]["momentum_dtype"] = edit[0]
    opt.step()
    assert snapshot(opt) != before


def test_edited_master_weights() -> None:
    """Switched on between steps they begin at the weights as they are; and another optimizer takes the same steps."""
    params, twins = params_of(torch.bfloat16), params_of(torch.bfloat16)
    opt, twin = Lion(params, lr=1e-3), Lion(twins, lr=1e-3)
    run(opt, params, range(2))
    run(twin, twins, range(2))
    opt.param_groups[0]["master_weights"] = True
    other = Lion(twins, lr=1e-3, master_weights=True)
    other.load_state_dict(twin.state_dict())
    run(opt, params, range(2, 12))
    run(other, twins, range(2, 12))
    assert_same_params(params, twins)
    assert any(opt.state[p]["remainder"].count_nonzero() for p in params)


@pytest.mark.parametrize("where", ["constructor", "group", "new group", "between steps", "unfrozen"])
def test_master_weights_of_float16(where: str) -> None:
    message = r"master_weights=True, but a parameter of shape \(3,\) is torch.float16; expected bfloat16"
    half, params = nn.Parameter(torch.zeros(3, dtype=torch.float16)), params_of(torch.bfloat16)
    if where == "constructor":
        with pytest.raises(TypeError, match=message):
            Lion([*params, half], master_weights=True)
        return
    groups: list[dict[str, Any]] = [{"params": params}, {"params": [half], "master_weights": True}]
    if where == "group":
        with pytest.raises(TypeError, match=message):
            Lion(groups)
        return
    groups = [{"params": params, "master_weights": True}, {"params": [half]}]
    if where == "new group":
        del groups[1]
    if where == "unfrozen":
        groups[1]["master_weights"] = True
        half.requires_grad_(False)
    opt = Lion(groups, lr=0.25)
    run(opt, params, range(1))
    if where == "between steps":
        opt.param_groups[1]["master_weights"] = True
    half.requires_grad_(True)
    before = snapshot(opt)
    feed([*params, half], 1)
    with pytest.raises(TypeError, match=message):
        opt.add_param_group({"params": [half], "master_weights": True}) if where == "new group" else opt.step()
    assert snapshot(opt) == before


def test_a_load_gives_float16_weights_no_masters() -> None:
    """master_weights is the optimizer's own, whatever was saved."""
    others = params_of()
    other = Lion(others)
    run(other, others, range(1))
    saved = copy.deepcopy(other.state_dict())
    saved["param_groups"][0]["master_weights"] = True
    params = params_of(torch.float16)
    opt = Lion(params)
    opt.load_state_dict(saved)
    assert opt.param_groups[0]["master_weights"] is False
    run(opt, params, range(1))
