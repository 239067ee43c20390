"""Momenta that torch's own functions cast or overwrite on the way: refused by name, and the ways that are right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from lion_dist import Lion, checkpoint
from lion_dist.momentum_codes import decoded
from tests.asserts import assert_same_bits
from tests.scenarios.precision import BF16, F32, I8

pytestmark = [
    pytest.mark.filterwarnings("ignore:lion_dist. lr:UserWarning"),  # bfloat16 weights that stand still
    pytest.mark.filterwarnings("ignore:torch.distributed is"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
INT8: dict[str, Any] = {"momentum_dtype": "int8"}
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
Pair = tuple[nn.Module, Lion]


def trained(steps: int = 3, dtype: torch.dtype = F32, **options: Any) -> Pair:
    model = nn.Linear(32, 16, bias=False).to(dtype)
    optimizer = Lion(model.named_parameters(), lr=1e-3, **options)
    generator = torch.Generator().manual_seed(5)
    for _ in range(steps):
        model.weight.grad = torch.randn(16, 32, generator=generator).mul(1e-4).to(dtype)
        optimizer.step()
    optimizer.init_state()
    return model, optimizer


def entry_of(pair: Pair) -> dict[str, Any]:
    return dict(pair[1].state[pair[0].get_parameter("weight")])


def read(pair: Pair, source: Path, partial: bool = False, **options: Any) -> None:
    state = {"optimizer": get_optimizer_state_dict(*pair)}
    planner = DefaultLoadPlanner(allow_partial_load=partial)
    dcp.load(state, checkpoint_id=None if options else source, planner=planner, **options)
    set_optimizer_state_dict(*pair, state["optimizer"])


CODES = (
    r"exp_avg of parameter '?\w+'? holds 8-bit codes as numbers.*dcp\.load casts.*momentum_dtype=\"int8\".*load again"
)
NUMBERS = (
    r"exp_avg of parameter 'weight' is int8, but its group was saved with a momentum_dtype that is not.*most of them"
)


@pytest.mark.parametrize("asked", [None, BF16, torch.float16], ids=str)
def test_codes_that_were_loaded_as_numbers(asked: torch.dtype | None, tmp_path: Path) -> None:
    source = trained(**INT8)
    dcp.save({"optimizer": get_optimizer_state_dict(*source)}, checkpoint_id=tmp_path)
    target = trained(1, momentum_dtype=asked)
    with pytest.raises(ValueError, match=CODES):
        read(target, tmp_path)
    eight = trained(0, **INT8)  # as the message says
    read(eight, tmp_path)
    target[1].load_state_dict(eight[1].state_dict())
    codes = entry_of(source)
    m = decoded(codes["exp_avg"], codes["exp_avg_scale"], source[0].get_parameter("weight"))
    assert_same_bits(entry_of(target)["exp_avg"], m.to(asked or F32))


@pytest.mark.parametrize("saved", [None, BF16], ids=str)
def test_numbers_that_were_loaded_as_codes(saved: torch.dtype | None, tmp_path: Path) -> None:
    source = trained(momentum_dtype=saved)
    dcp.save({"optimizer": get_optimizer_state_dict(*source)}, checkpoint_id=tmp_path)
    with pytest.raises(ValueError, match=NUMBERS):
        read(trained(0, **INT8), tmp_path, partial=True)


@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize("here", [{}, INT8], ids=["codes as numbers", "numbers as codes"])
def test_a_reader_casts_no_codes(here: dict[str, Any], cast: bool, tmp_path: Path) -> None:
    source = trained(**({} if here else INT8))
    writer = checkpoint.Writer(tmp_path / "c")
    dcp.save({"optimizer": get_optimizer_state_dict(*source)}, storage_writer=writer)
    target = trained(2, **here)
    before = {key: t.clone() for key, t in entry_of(target).items()}
    reader = checkpoint.Reader(tmp_path / "c", cast=cast)
    with pytest.raises(CheckpointException, match=r"weight\.exp_avg is torch\.\w+ in .* has momentum_dtype=\"int8\""):
        read(target, tmp_path, partial=True, storage_reader=reader)
    for key, t in before.items():
        assert_same_bits(entry_of(target)[key], t, key)


def test_codes_as_numbers_in_a_state_dict_are_refused_and_change_nothing() -> None:
    saved = trained(**INT8)[1].state_dict()
    whole = saved["state"][0]["exp_avg"].float()
    saved["state"][0] = {"exp_avg": whole}
    for options in ({}, INT8):
        target = trained(2, **options)
        before = entry_of(target)["exp_avg"].clone()
        with pytest.raises(ValueError, match=CODES):
            target[1].load_state_dict(saved)
        assert_same_bits(entry_of(target)["exp_avg"], before)
        for m in (whole / 2, whole + 200, whole * 0, whole.clone().fill_(torch.nan)):  # these are no codes
            saved["state"][0] = {"exp_avg": m}
            target[1].load_state_dict(saved)
        saved["state"][0] = {"exp_avg": whole}


@pytest.mark.parametrize("dtype", [None, F32, I8], ids=str)
@pytest.mark.parametrize("masters", [True, False])
def test_a_momentum_that_the_remainder_has_overwritten(dtype: torch.dtype | None, masters: bool) -> None:
    source = trained(dtype=BF16, master_weights=True)
    saved = source[1].state_dict()
    remainder = entry_of(source)["remainder"].float()
    assert remainder.any()
    target = trained(0, BF16, momentum_dtype=dtype, master_weights=masters)
    zeros = torch.zeros(16, 32)
    for m, r in ((remainder, remainder.clone()), (zeros, zeros)):
        saved["state"][0] = {"exp_avg": m, "remainder": r}
        with pytest.raises(ValueError, match=r"exp_avg and remainder of parameter 0 are the same numbers.*cpu_offload"):
            target[1].load_state_dict(saved)
    saved["state"][0] = {"exp_avg": zeros, "remainder": zeros.clone()}
    target[1].load_state_dict(saved)


KINDS: list[dict[str, Any]] = [{}, {"master_weights": True}, INT8, {**INT8, "master_weights": True}]


@pytest.mark.parametrize("there", KINDS, ids=str)
@pytest.mark.parametrize("here", KINDS, ids=str)
def test_flattened_state(there: dict[str, Any], here: dict[str, Any]) -> None:
    """The same as the nested form brings, or an error that names that form."""
    source, flat, nested = trained(dtype=BF16, **there), trained(0, BF16, **here), trained(0, BF16, **here)
    set_optimizer_state_dict(*nested, get_optimizer_state_dict(*source))
    state = get_optimizer_state_dict(*source, options=FLAT)
    if "momentum_dtype" in there and "momentum_dtype" not in here:
        with pytest.raises(ValueError, match=r"scales, 'exp_avg_scale', are missing.*flatten_optimizer.*nested form"):
            set_optimizer_state_dict(*flat, state, options=FLAT)
        return
    set_optimizer_state_dict(*flat, state, options=FLAT)
    assert entry_of(flat).keys() == entry_of(nested).keys()
    for key, t in entry_of(nested).items():
        assert_same_bits(entry_of(flat)[key], t, key)
