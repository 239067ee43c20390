"""Parameters synchronised by signs: the same bits as by parameters and as Lion on one process, for a sixteenth of
the bytes."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import nn

from lion_dist import Lion, ShardedLion
from lion_dist.sharding.exchange import FOOTER
from tests.asserts import assert_same_model, assert_same_momentum
from tests.harness import device_of, run_ranks
from tests.scenarios.hostile import equals, hostile_averages, hostile_backward
from tests.scenarios.toy import BF16, FP32, MAX_NORM, MIXED, SHAPES, Toy
from tests.scenarios.wire import Counter

LR = 0.25
EACH_ONCE = {(2, "fp32"), (3, "bf16"), (4, "mixed")}


# -- The same bits


@pytest.mark.parametrize(
    ("world_size", "dtypes"),
    [
        # Each number of ranks, and each dtype, once.
        pytest.param(
            world_size,
            dtypes,
            id=f"{world_size}-{name}",
            marks=[] if (world_size, name) in EACH_ONCE else pytest.mark.exhaustive,
        )
        for name, dtypes in (("fp32", FP32), ("bf16", BF16), ("mixed", MIXED))
        for world_size in (2, 3, 4)
    ],
)
def test_signs_equal_params_and_lion(world_size: int, dtypes: tuple, tmp_path: Path) -> None:
    run_ranks(equals, world_size, tmp_path, (dtypes,))


def body_through_triton(rank: int, world_size: int) -> None:
    """The kernels, in the interpreter or on the GPU, from backward to weight."""
    device = device_of(rank, world_size)
    model, expected = (Toy(100, FP32, device) for _ in range(2))
    optimizer = ShardedLion(model.groups(), lr=0.01, param_sync="signs", use_triton=True)
    lion = Lion(expected.groups(), lr=0.01)
    for step in range(2):
        hostile_backward(model, step, rank, world_size)
        for name, g in hostile_averages(expected, step, world_size).items():
            getattr(expected, name).grad = g
        for o in (optimizer, lion):
            o.step()
            o.zero_grad()
        assert_same_model(model, expected)
    assert_same_momentum(optimizer.full_state_dict(), lion)


def test_through_triton(tmp_path: Path) -> None:
    run_ranks(body_through_triton, 2, tmp_path, share_gpus=True)


def body_clipped(rank: int, world_size: int) -> None:
    device = device_of(rank, world_size)
    models = [Toy(100, MIXED, device) for _ in range(4)]
    optimizers = [
        ShardedLion(model.groups(), lr=0.01, stage=stage, param_sync=sync)
        for model, (stage, sync) in zip(models, [(s, p) for s in (1, 2) for p in ("params", "signs")], strict=True)
    ]
    for step in range(5):
        for number, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            if number < 2:
                for name in SHAPES:
                    getattr(model, name).grad = model.average_gradient(name, step, world_size)
            else:
                model(step, rank, world_size).backward()
            assert optimizer.clip_grad_norm_(MAX_NORM) > MAX_NORM
            optimizer.step()
            optimizer.zero_grad()
            assert_same_model(model, models[0])


def test_clipped(tmp_path: Path) -> None:
    run_ranks(body_clipped, 3, tmp_path)


def body_one_rank(rank: int, world_size: int) -> None:
    device = device_of(rank, world_size)
    for stage in (1, 2):
        model, expected = (Toy(100, MIXED, device) for _ in range(2))
        optimizer = ShardedLion(model.groups(), lr=0.01, stage=stage, param_sync="signs")
        lion = Lion(expected.groups(), lr=0.01)
        for step in range(3):
            for m, o in ((model, optimizer), (expected, lion)):
                m(step, rank, world_size).backward()
                o.step()
                o.zero_grad()
            assert_same_model(model, expected)
        optimizer.check_replicas()
        optimizer.resync()
        assert_same_momentum(optimizer.full_state_dict(), lion)


def test_one_rank(tmp_path: Path) -> None:
    run_ranks(body_one_rank, 1, tmp_path)


# -- What travels


def body_auto(rank: int, world_size: int) -> list[str]:
    """Returns what is logged; and checks whether signs are sent."""
    logger, said = logging.getLogger("lion_dist"), []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(f"{record.levelname}: {record.getMessage()}")
    logger.addHandler(handler)
    p = nn.Parameter(torch.zeros(300, device=device_of(rank, world_size)))
    ShardedLion([p], stage=1)
    assert said == []  # not at the usual level
    logger.setLevel(logging.DEBUG)
    for sync in ("auto", "signs", "params"):
        optimizer = ShardedLion([p], stage=1, param_sync=sync)
        p.grad = torch.ones_like(p)
        with Counter() as counter:
            optimizer.step()
        if world_size > 1:
            signs_are_gathered = sum(counter.bytes["gather"]) < p.numel() * p.element_size()
            assert signs_are_gathered == (sync != "params")
    return said


@pytest.mark.parametrize(("world_size", "word"), [(1, "params"), (2, "signs")])
def test_auto_says_what_it_chose(world_size: int, word: str, tmp_path: Path) -> None:
    for said in run_ranks(body_auto, world_size, tmp_path):
        (line,) = said  # of the one that chose
        assert line.startswith(f"DEBUG: param_sync: {word}")


def body_bytes(rank: int, world_size: int) -> None:
    """fp32, stage 2. A parameter's gradient takes 4 bytes, and then 4 or 1/4; beside them padding of the tails, a
    footer or a checksum a rank, and one flag a parameter."""
    device = device_of(rank, world_size)
    unit = 128 * world_size
    shapes = [(20 * unit,), (33, 40), (3,)]
    numel = sum(torch.Size(s).numel() for s in shapes)
    tails = 33 * 40 % unit, 3
    padded = sum(-(-t // 128) * 128 for t in tails)
    padding = -(-padded // unit) * unit - sum(tails)
    for sync in ("signs", "params"):
        params = [nn.Parameter(torch.zeros(s, device=device)) for s in shapes]
        optimizer = ShardedLion(params, lr=LR, param_sync=sync)
        for step in range(3):
            with Counter() as counter:
                torch.stack([(p * (step + 1)).sum() for p in params]).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
            assert sum(counter.bytes["scatter"]) == 4 * (numel + padding)
            signs = (numel + padding) // 4 + world_size * FOOTER
            first, *more = counter.bytes["gather"]
            if sync == "signs":  # the checksum of the step is among them
                assert (first, more) == (signs, [])
            else:  # it precedes the parameters, which gloo gathers one buffer after the other
                assert (first, sum(more)) == (8 * world_size, 4 * (numel + padding))
            assert sum(counter.bytes["reduce"]) <= len(params) + 8
            assert not counter.bytes["broadcast"] or step == 0  # the order of readiness, once
        assert all((p == -3 * LR).all() for p in params)


@pytest.mark.parametrize("world_size", [2, 3])
def test_bytes_on_the_wire(world_size: int, tmp_path: Path) -> None:
    run_ranks(body_bytes, world_size, tmp_path)
