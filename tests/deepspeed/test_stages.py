"""Training through real DeepSpeed engines, every stage: the same bits as one process."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lion_dist
from lion_dist import Lion
from tests.asserts import assert_same_bits
from tests.harness import run_ranks
from tests.marks import skip_module_without

from .common import (
    DTYPES,
    Model,
    PlainLion,
    averaged,
    engine_of,
    make_config,
    micro_steps,
    momentum_norm,
    start_deepspeed,
    weights,
)

skip_module_without("deepspeed")

STEPS = 5
DEFAULTS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99)}


@dataclass
class Case:
    """A config, and what in it changes the expected result."""

    stage: int
    dtype: str = "fp32"
    offload: bool = False
    accumulation: int = 1
    max_norm: float = 0.0
    more: dict[str, Any] = field(default_factory=dict)
    steps: int = STEPS
    overflow: int = -1  # the step whose loss is infinite on one rank, so that all leave it out
    away: int = -1  # the step before which states are offloaded and brought back
    alone: bool = False  # whether a group has one element, so that a rank has nothing of it, and another none

    @property
    def keeps_gradients(self) -> bool:
        """Whether parameters that a step does not use keep their gradients; see `averaged`."""
        return self.offload or self.stage == 3

    def groups(self, model: Model) -> list[dict[str, Any]]:
        if not self.alone:
            return model.groups()
        rest = [p for name, p in model.named_parameters() if name != "one"]
        return [{"params": rest, "weight_decay": 0.3}, {"params": [model.one], "lr": 3e-3, "weight_decay": 0.3}]

    def config(self) -> dict[str, Any]:
        return make_config(
            self.stage,
            self.dtype,
            self.offload,
            gradient_accumulation_steps=self.accumulation,
            gradient_clipping=self.max_norm,
            **self.more,
        )


def check_training(deepspeed: Any, rank: int, world_size: int, case: Case) -> None:
    """Trains the engine and, beside it, the rule on one process; with the lr and betas that the engine has then."""
    steady = case.keeps_gradients and (case.accumulation > 1 or case.dtype == "fp16")
    model = Model(rank, world_size, steady=steady)
    last: dict[str, Any] | None = {} if case.keeps_gradients else None
    config = case.config()
    defaults = {**DEFAULTS, "weight_decay": config["optimizer"]["params"].get("weight_decay", 0.0)}
    plain = PlainLion(model, DTYPES[case.dtype], defaults, case.groups(model))
    lion = Lion(case.groups(model), **defaults) if case.dtype == "fp32" and not case.max_norm else None
    trained = Model(rank, world_size, steady=steady, infinite=case.overflow)
    empty: list[dict[str, Any]] = [{"params": []}] if case.alone else []  # DeepSpeed leaves it out
    with engine_of(deepspeed, trained, config, [*case.groups(trained), *empty]) as engine:
        assert type(engine.basic_optimizer) is lion_dist.deepspeed.DeepSpeedLion, case
        for step in range(case.steps):
            micro = range(step * case.accumulation, (step + 1) * case.accumulation)
            for group, now in zip(plain.groups, engine.basic_optimizer.param_groups, strict=True):
                group.update(lr=now["lr"], betas=now["betas"])
            if step == case.away:
                engine.offload_states()
                engine.reload_states()
            for i in micro:
                engine.backward(engine(i))
                engine.step()
            assert engine.skipped_steps == (0 <= case.overflow <= step), case
            if step == case.overflow:
                continue
            gradients = averaged(model, micro, last)
            if case.max_norm:
                gradients = clipped(gradients, case.max_norm)
            if case.stage == 0 and case.dtype == "fp16":
                # DeepSpeed 0.19.8 does not multiply the loss by the scale here, and does divide the gradients by it.
                gradients = {name: g / engine.optimizer.loss_scale for name, g in gradients.items()}
            plain.step(gradients)
            if lion is not None:
                for group, now in zip(lion.param_groups, plain.groups, strict=True):
                    group.update(lr=now["lr"], betas=now["betas"])
                for name, p in model.named_parameters():
                    p.grad = gradients[name].clone() if p.requires_grad else None
                lion.step()
        got = weights(deepspeed, engine)
        norm = torch.cat([m.flatten() for m in plain.momenta.values()]).double().norm().item()
        assert momentum_norm(engine) == pytest.approx(norm, rel=1e-5), f"{case}: norm of the momenta"
    expected = plain.weights()
    for name, p in model.named_parameters():
        assert_same_bits(got[name], expected[name], f"{case}: {name}")
        if lion is not None:
            assert_same_bits(got[name], p.detach(), f"{case}: {name}, of Lion")


def clipped(gradients: dict[str, Tensor], max_norm: float) -> dict[str, Tensor]:
    """In DeepSpeed's arithmetic. The squares are dyadic and few, so their sum is exact in any order."""
    norm = torch.stack([g.double().square().sum() for g in gradients.values()]).sum().sqrt()
    factor = 1 / torch.clamp((norm + 1e-6) / max_norm, min=1.0)
    return {name: g * factor.float() for name, g in gradients.items()}


def check_bf16_masters(deepspeed: Any, rank: int, world_size: int, stage: int) -> None:
    """No float32 anywhere: the rule on bfloat16 weights, gradients and momentum. (With float32 states beside bfloat16
    master weights DeepSpeed 0.19.8 takes no optimizer but its DeepSpeedCPUAdam.)"""
    no_masters = {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    config = make_config(stage, "bf16", bf16=no_masters)
    model, trained = Model(rank, world_size, steady=True).bfloat16(), Model(rank, world_size, steady=True)
    lion = Lion(model.groups(), **DEFAULTS)
    with engine_of(deepspeed, trained, config, trained.groups()) as engine:
        for step in range(STEPS):
            micro_steps(engine, step, 1)
            for name, g in averaged(model, range(step, step + 1)).items():
                p = model.get_parameter(name)
                p.grad = g.to(p.dtype) if p.requires_grad else None
            lion.step()
        assert {m["exp_avg"].dtype for m in engine.basic_optimizer.state.values()} == {torch.bfloat16}
        got = weights(deepspeed, engine)
    for name, p in model.named_parameters():
        assert_same_bits(got[name], p.detach(), f"bf16 masters, stage {stage}: {name}")


def body_half_precision(rank: int, world_size: int, cases: list[Case]) -> None:
    body_cases(rank, world_size, cases)
    deepspeed = start_deepspeed(rank, world_size)
    for stage in (1, 2, 3):
        check_bf16_masters(deepspeed, rank, world_size, stage)


def body_cases(rank: int, world_size: int, cases: list[Case]) -> int:
    deepspeed = start_deepspeed(rank, world_size)
    lion_dist.deepspeed.register()
    for case in cases:
        check_training(deepspeed, rank, world_size, case)
    return len(cases)


def every_stage() -> Iterator[Case]:
    for stage, offload, dtype in itertools.product(range(4), (False, True), ("fp32", "bf16")):
        if not (offload and stage == 0):
            yield Case(stage, dtype, offload)


def test_every_stage_is_lion_on_one_process(tmp_path: Path) -> None:
    """2 ranks, stages 0 to 3, with and without offload: fp32 has the bits of `Lion` on the averaged
    gradient; bf16 those of the same arithmetic on float32 master weights."""
    cases = list(every_stage())
    assert len(cases) == 14
    run_ranks(body_cases, 2, tmp_path, (cases,))


def variants() -> Iterator[Case]:
    for stage in range(4):
        yield Case(stage, accumulation=2)
        yield Case(stage, "bf16", accumulation=2)
        yield Case(stage, max_norm=1.0)
        yield Case(stage, alone=True)
    for stage in (1, 2, 3):
        yield Case(stage, offload=True, accumulation=2)
        # At stage 1 that is another wrapper, BF16_Optimizer.
        yield Case(stage, "bf16", accumulation=2, more={"data_types": {"grad_accum_dtype": "fp32"}})
    # Several sub-groups to a group, so that step() is called with all groups empty but one, time and again.
    small = {"zero_optimization": {"sub_group_size": 2000, "stage3_param_persistence_threshold": 0}}
    yield Case(3, more=small)
    yield Case(3, "bf16", more=small)
    yield Case(3, offload=True, more=small)
    warm_up = {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-2, "warmup_num_steps": 4}}}
    one_cycle = {"cycle_min_lr": 1e-3, "cycle_max_lr": 1e-2, "cycle_first_step_size": 3, "cycle_min_mom": 0.8}
    for stage in (0, 2, 3):
        yield Case(stage, more=warm_up)
        yield Case(stage, more={"scheduler": {"type": "OneCycle", "params": {**one_cycle, "cycle_max_mom": 0.95}}})


def test_accumulation_clipping_sub_groups_and_schedulers(tmp_path: Path) -> None:
    run_ranks(body_cases, 2, tmp_path, (list(variants()),))


def half_precision() -> Iterator[Case]:
    static = {"fp16": {"loss_scale": 8.0}}
    dynamic = {"fp16": {"initial_scale_power": 4, "hysteresis": 1}}
    for stage in range(4):
        yield Case(stage, "fp16", more=static)
        yield Case(stage, "fp16", more=dynamic, overflow=2)
        # The step that the wrappers of stage 0 make of gradients of zero, in which weights must not decay.
        decay = {"optimizer": {"type": "Lion", "params": {"lr": 1e-2, "betas": [0.9, 0.99], "weight_decay": 0.5}}}
        yield Case(stage, "bf16", more=decay)
        yield Case(stage, "fp16", more={**static, **decay})
    yield Case(2, "fp16", offload=True, more=static)
    yield Case(2, "fp16", offload=True, more=dynamic, overflow=2)
    for stage in (1, 2):
        yield Case(stage, "bf16", away=2)  # DeepSpeed's stage 3 does this for its FusedAdam alone


def test_half_precision_overflows_and_offloaded_states(tmp_path: Path) -> None:
    run_ranks(body_half_precision, 2, tmp_path, (list(half_precision()),))
