"""ShardedLion: master weights from float32 weights, and momenta that are converted on a load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lion_dist import Lion, ShardedLion
from lion_dist.momentum_codes import decoded, encoded
from lion_dist.sharding.box_tensor import BoxTensor
from lion_dist.update.codecs import join
from tests.asserts import assert_same_bits
from tests.harness import device_of, run_ranks
from tests.scenarios.precision import BF16, F32, I8, gradient_of, rounded_half_away, weights_of

SHAPES = {"matrix": (31, 9), "long": (900,), "kernel": (4, 3, 3, 25), "small": (5,)}


def named_of(device: torch.device) -> dict[str, nn.Parameter]:
    named = {name: torch.zeros(shape, dtype=BF16, device=device) for name, shape in SHAPES.items()}
    named["kernel"] = named["kernel"].to(memory_format=torch.channels_last)
    return {name: nn.Parameter(p) for name, p in named.items()}


def masters(device: torch.device) -> dict[str, Tensor]:
    return {name: weights_of(shape, i).to(device) for i, (name, shape) in enumerate(SHAPES.items())}


def step(named: dict[str, nn.Parameter], optimizer: Lion | ShardedLion, steps: range) -> None:
    for number in steps:
        for i, p in enumerate(named.values()):
            p.grad = gradient_of(tuple(p.shape), i, number).to(p.device, p.dtype)
        optimizer.step()


def body_take(rank: int, world_size: int, sync: str) -> None:
    device = device_of(rank, world_size)
    weights = masters(device)
    plain_named = named_of(device)
    plain = Lion(plain_named.items(), lr=3e-4, weight_decay=0.1, master_weights=True)
    named = named_of(device)
    optimizer = ShardedLion(named.items(), lr=3e-4, weight_decay=0.1, master_weights=True, stage=1, param_sync=sync)
    with pytest.raises((ValueError, RuntimeError), match=r"master weight long|rank 1"):
        optimizer.take_master_weights({**weights, "long": weights["long"] + rank})
    with pytest.raises((ValueError, RuntimeError), match="no parameters called"):
        optimizer.take_master_weights(weights if rank else {**weights, "other": weights["long"]})
    assert not any(p.any() for p in named.values())
    for one in (plain, optimizer):
        one.take_master_weights({f"module.{name}": w for name, w in weights.items()})
    for name, p in named.items():
        assert_same_bits(p.detach(), rounded_half_away(weights[name]), name)
    for params, one in ((plain_named, plain), (named, optimizer)):
        step(params, one, range(4))
    whole = optimizer.full_state_dict()["state"]
    for i, (name, p) in enumerate(named.items()):
        q = plain_named[name]
        expected = join(q.detach(), plain.state[q]["remainder"])
        assert_same_bits(join(p.detach(), whole[i]["remainder"].to(device)), expected, name)


@pytest.mark.parametrize("sync", ["params", "signs"])
def test_weights_are_taken_on_every_rank(sync: str, tmp_path: Path) -> None:
    run_ranks(body_take, 2, tmp_path, (sync,))


def numbers(entry: dict[str, Any]) -> Tensor:
    """The momentum of an entry of a whole state as numbers."""
    m = entry["exp_avg"]
    return decoded(m, entry["exp_avg_scale"], m) if m.dtype == I8 else m


def body_convert(rank: int, world_size: int) -> None:
    device = device_of(rank, world_size)

    def made(momentum: Any, steps: int = 0) -> tuple[dict[str, nn.Parameter], ShardedLion]:
        named = named_of(device)
        optimizer = ShardedLion(named.items(), momentum_dtype=momentum, stage=1)
        step(named, optimizer, range(steps))
        return named, optimizer

    for there, here in (("int8", F32), (F32, "int8"), ("int8", None)):
        source_named, source = made(there, 4)
        state = source.full_state_dict()
        for saved in (state, source.state_dict()):
            named, optimizer = made(here)
            optimizer.load_state_dict(saved)
            whole = optimizer.full_state_dict()["state"]
            for i, (name, p) in enumerate(named.items()):
                entry, like = state["state"][i], p.detach().cpu()
                got = optimizer.state[p]["exp_avg"]
                assert isinstance(got, BoxTensor)
                assert got.dtype == (I8 if here == "int8" else here or BF16)
                m = numbers(entry)
                if here != "int8":
                    assert_same_bits(whole[i]["exp_avg"], m.to(here or BF16), f"momentum of {name}")
                    continue
                codes, scale = encoded(m, like)
                if like.is_contiguous():
                    assert_same_bits(whole[i]["exp_avg"], codes, f"codes of {name}")
                    assert_same_bits(whole[i]["exp_avg_scale"], scale, f"scales of {name}")
                else:
                    assert_same_bits(whole[i]["exp_avg"], decoded(codes, scale, like), f"momentum of {name}")
        lion_named = named_of(device)
        lion = Lion(lion_named.items(), momentum_dtype=there)
        lion.load_state_dict(state)  # also in the memory order of "kernel"
        step(lion_named, lion, range(4, 5))
        step(source_named, source, range(4, 5))
        after, of_lion = source.full_state_dict()["state"], lion.state_dict()["state"]
        for i in after:
            assert_same_bits(of_lion[i]["exp_avg"].cpu(), after[i]["exp_avg"], f"Lion's momentum {i}")


def test_momenta_are_converted_on_a_load(tmp_path: Path) -> None:
    run_ranks(body_convert, 2, tmp_path)
