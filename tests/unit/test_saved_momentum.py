"""Momenta of which a rank has a part, as in ShardedLion's state_dict: each rank converts its own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from lion_dist.momentum_codes import decoded, encoded
from lion_dist.saved_momentum import in_kept_form
from lion_dist.sharding.box_tensor import BoxTensor
from lion_dist.sharding.shard import make_shards
from lion_dist.update.state import StateColumn
from tests.asserts import assert_same_bits
from tests.scenarios.precision import F32, I8

NUMBERS, CODES, SCALES = StateColumn("exp_avg", F32), StateColumn("exp_avg", I8), StateColumn("exp_avg_scale", F32, 128)


def parts_of(p: Tensor, m: Tensor, world_size: int, rank: int) -> dict[str, dict[str, Any]]:
    """A rank's parts of a momentum, as numbers and as codes."""
    codes, scale = encoded(m, p)
    numbers = decoded(codes, scale, p)
    found: dict[str, dict[str, Any]] = {}
    for kind, columns in (("numbers", (NUMBERS,)), ("codes", (CODES, SCALES))):
        shard = make_shards([p, p[:1].clone()], [columns] * 2, world_size)[0]
        whole = {"exp_avg": codes if kind == "codes" else numbers, "exp_avg_scale": scale}
        found[kind] = {column.name: shard.boxes(0, column, rank) for column in columns}
        for name, boxes in found[kind].items():
            boxes.copy_(whole[name])
    return found


SIZES = [(1300,), (129, 5), (3, 7), (0, 4), (2, 3, 5, 100), (1,)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize("flipped", [False, True])
def test_parts_are_converted_where_they_lie(world_size: int, shape: tuple[int, ...], flipped: bool) -> None:
    p = torch.zeros(shape)
    if flipped:
        p = torch.zeros(shape[::-1]).permute(*reversed(range(len(shape))))
    m = torch.randn(shape, generator=torch.Generator().manual_seed(8))
    for rank in range(world_size):
        parts = parts_of(p, m, world_size, rank)
        to_codes = in_kept_form(0, parts["numbers"], p, (CODES, SCALES), parts["codes"])
        to_numbers = in_kept_form(0, parts["codes"], p, (NUMBERS,), parts["numbers"])
        for found, expected in ((to_codes, parts["codes"]), (to_numbers, parts["numbers"])):
            assert found.keys() == expected.keys()
            for key, boxes in expected.items():
                got = found[key]
                assert isinstance(got, BoxTensor)
                assert got.boxes == boxes.boxes
                assert got.dtype == boxes.dtype
                for a, b in zip(got.parts, boxes.parts, strict=True):
                    assert_same_bits(a, b, f"rank {rank} {key}")


def test_parts_of_another_cut_are_refused() -> None:
    p, m = torch.zeros(1300), torch.randn(1300, generator=torch.Generator().manual_seed(8))
    here, there = parts_of(p, m, 2, 0), parts_of(p, m, 3, 1)
    with pytest.raises(ValueError, match=r"exp_avg of parameter 4 is a BoxTensor of another cut.*full_state_dict\(\)"):
        in_kept_form(4, there["numbers"], p, (CODES, SCALES), here["codes"])
    with pytest.raises(ValueError, match=r"exp_avg of parameter 4 is a BoxTensor of another cut"):
        in_kept_form(4, here["numbers"], p, (CODES, SCALES), {})
    mixed = {"exp_avg": here["codes"]["exp_avg"], "exp_avg_scale": there["codes"]["exp_avg_scale"]}
    with pytest.raises(ValueError, match="exp_avg and exp_avg_scale of parameter 4 are BoxTensors of different parts"):
        in_kept_form(4, mixed, p, (NUMBERS,), here["numbers"])
    whole = {**here["codes"], "exp_avg_scale": torch.zeros(11)}
    with pytest.raises(ValueError, match=r"expected a BoxTensor of shape \(11,\)"):
        in_kept_form(4, whole, p, (NUMBERS,), here["numbers"])
    bad = copy.deepcopy(here["codes"])
    bad["exp_avg_scale"].parts[0].fill_(-2.0)
    with pytest.raises(ValueError, match=r"has the scale -2\.0"):
        in_kept_form(4, bad, p, (CODES, SCALES), here["codes"])
