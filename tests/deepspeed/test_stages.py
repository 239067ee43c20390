"""Training through real DeepSpeed engines, every stage: the same bits as one process."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from torch import Tensor

import lion_dist
from lion_dist import Lion
from tests.bits import assert_same_bits
from tests.harness import run_ranks

from .common import DTYPES, Model, PlainLion, averaged, engine_of, make_config, micro_steps, start_deepspeed, weights

pytest.importorskip("deepspeed")

STEPS = 20
LR, BETAS = 1e-2, (0.9, 0.99)


def expected_weights(rank: int, world_size: int, dtype: str, keeps_gradients: bool) -> dict[str, Tensor]:
    """In fp32, what `Lion` makes of the averaged gradients; else the rule on master weights, in plain torch."""
    model, last = Model(rank, world_size), {} if keeps_gradients else None
    plain = PlainLion(model, DTYPES[dtype], {"lr": LR, "betas": BETAS})
    lion = Lion(model.groups(), lr=LR, betas=BETAS)
    for step in range(STEPS):
        gradients = averaged(model, range(step, step + 1), last)
        plain.step(gradients)
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.grad = gradients[name].clone()
        lion.step()
    return {name: p.detach() for name, p in model.named_parameters()} if dtype == "fp32" else plain.weights()


def body_every_stage(rank: int, world_size: int) -> list[str]:
    deepspeed = start_deepspeed(rank, world_size)
    lion_dist.deepspeed.register()
    seen = []
    for stage, offload, dtype in itertools.product(range(4), (False, True), ("fp32", "bf16")):
        if offload and stage == 0:
            continue
        case = f"stage {stage}, offload {offload}, {dtype}"
        expected = expected_weights(rank, world_size, dtype, keeps_gradients=offload or stage == 3)
        model = Model(rank, world_size)
        with engine_of(deepspeed, model, make_config(stage, dtype, offload), model.groups()) as engine:
            assert type(engine.basic_optimizer) is lion_dist.deepspeed.DeepSpeedLion, case
            micro_steps(engine, 0, STEPS)
            for name, got in weights(deepspeed, engine).items():
                assert_same_bits(got, expected[name], f"{case}: {name}")
        seen.append(case)
    return seen


def test_every_stage_is_lion_on_one_process(tmp_path: Path) -> None:
    """20 steps, 2 ranks, stages 0 to 3, with and without offload: fp32 has the bits of `Lion` on the averaged
    gradient; bf16 those of the same arithmetic on float32 master weights."""
    (seen, _) = run_ranks(body_every_stage, 2, tmp_path)
    assert len(seen) == 14
