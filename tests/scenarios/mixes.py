"""Mixes of dtypes, hyper-parameters and awkward values for tests of the backends."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lion_dist.update import reference
from lion_dist.update.backends import interpreting
from lion_dist.update.hypers import hyper_table
from lion_dist.update.lion_update import LionUpdate
from lion_dist.update.reference import (
    STORAGE_DTYPES,
    HyperParameters,
    Scalars,
    scalars,
)
from lion_dist.update.segments import StepTensors
from lion_dist.update.state import EXP_AVG
from tests.marks import needs_interpreter

CPU = torch.device("cpu")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
Mix = tuple[torch.dtype, torch.dtype, torch.dtype]
MIXES: list[Mix] = [(p, g, m) for p in STORAGE_DTYPES for g in STORAGE_DTYPES for m in STORAGE_DTYPES]
INTERPRETED = [mix for mix in MIXES if BF16 not in (mix[0], mix[2])]
HYPERS = [
    HyperParameters(0.25, 0.1, 0.9, 0.99, False),
    HyperParameters(1e-2, 0.0, 0.95, 0.98, True),
    HyperParameters(0.0, 1.0, 0.9, 0.99, False),
    HyperParameters(1.0, 0.5, 0.0, 0.5, False),
    HyperParameters(torch.tensor(0.3), 0.7, 0.5, 0.0, True),
]
on_triton = pytest.param(True, marks=needs_interpreter, id="interpreter")
on_torch = pytest.param(False, id="torch")
both = pytest.mark.parametrize("use_triton", [on_torch, on_triton])


def name(mix: Mix) -> str:
    return "-".join({F32: "fp32", BF16: "bf16", F16: "fp16"}[d] for d in mix)


def awkward(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Normal numbers, and among them zeros of both signs, subnormals, the largest, infinities and NaN."""
    t = torch.randn(shape, generator=generator)
    info = torch.finfo(dtype)
    tiny = info.tiny * (2 if dtype == BF16 and interpreting() else 0.5)
    special = torch.tensor([0.0, -0.0, tiny, -tiny / 2, info.max, -info.max, math.inf, -math.inf, math.nan])
    where = torch.randint(0, 60, shape, generator=generator)
    t = torch.where(where < len(special), special[where.clamp(max=len(special) - 1)], t)
    return t.to(dtype)


def tensors(mix: Mix, shapes: list[tuple[int, ...]], seed: int = 0) -> StepTensors:
    generator = torch.Generator().manual_seed(seed)
    params, grads, exp_avgs = [[awkward(shape, dtype, generator) for shape in shapes] for dtype in mix]
    return StepTensors(params, list(grads), {EXP_AVG: exp_avgs}, [i % len(HYPERS) for i in range(len(shapes))])


def momenta(columns: StepTensors) -> list[Tensor]:
    """The momentum of every entry."""
    return [columns.state_of(i)[EXP_AVG] for i in range(len(columns.params))]


def copy_of(columns: StepTensors) -> StepTensors:
    """With every stride kept."""

    def clones(ts: list[Any]) -> list[Any]:
        return [None if t is None else torch.empty_strided(t.shape, t.stride(), dtype=t.dtype).copy_(t) for t in ts]

    return StepTensors(
        clones(columns.params), clones(columns.grads), {EXP_AVG: clones(momenta(columns))}, columns.groups
    )


def reference_step(columns: StepTensors, hypers: list[HyperParameters], grad_scale: Tensor | None = None) -> None:
    """The definition, tensor by tensor."""
    table = hyper_table(hypers, CPU)
    for p, g, m, group in zip(columns.params, columns.grads, momenta(columns), columns.groups, strict=True):
        if g is not None:
            reference.lion_step_(p, g, m, reference.scalars(table[group], grad_scale))


HYPER = HyperParameters(lr=0.25, weight_decay=0.1, beta1=0.9, beta2=0.99, maximize=False)


def scalars_of(hyper: HyperParameters, grad_scale: Tensor | None = None) -> Scalars:
    return scalars(hyper_table([hyper], CPU)[0], grad_scale)


def step_by(
    update: LionUpdate, tensors: StepTensors, hypers: list[HyperParameters], grad_scale: Tensor | None = None
) -> None:
    update.step(update.prepare(tensors), hypers, grad_scale)


def squares_by(update: LionUpdate, tensors: StepTensors) -> Tensor | None:
    return update.sum_of_squares(update.prepare(tensors))
