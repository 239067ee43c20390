"""Our class in the checks of DeepSpeed's own tests/unit/ops/lion; and how little these find.

test_lion.py makes an engine of fp16 at stage 2, with and without offload, and asks for the class of its optimizer. It
takes no step.

test_cpu_lion.py makes ten steps of DeepSpeedCPULion and of FusedLion on the same random gradients, and asks whether the
norms of their weights are within a hundredth of each other. Ten steps of lr 1e-3 on weights of about 1 move the norm
by less: an optimizer that does nothing passes, and so does one of the opposite sign (shown below). Neither test looks
at a momentum, at weight decay, at a c of 0, at several steps of a schedule, at more ranks than one.

So the same runs are held to the rule's own bits here; and beside DeepSpeed's two, where they are compiled, to weights
that differ by less than a step, but for the few elements whose c is a rounding away from 0. (That DeepSpeedCPULion
raises for weights on a GPU, the third thing they check, is no wish of ours: Lion steps where its weights are.)
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.cpp_extension import CUDA_HOME

import lion_dist
from lion_dist.deepspeed import DeepSpeedLion
from lion_dist.update.hypers import hyper_table
from lion_dist.update.reference import HyperParameters, lion_rule, scalars
from tests.asserts import assert_same_bits
from tests.harness import run_ranks
from tests.marks import skip_module_without

from .common import Model, engine_of, make_config, needs_cpu_lion, start_deepspeed

skip_module_without("deepspeed")

SIZES = (64, 22, 128, 1024, 1048576)
STEPS, LR, BETAS = 10, 1e-3, (0.9, 0.999)  # the defaults of DeepSpeed's own

Make = Callable[[list[Tensor]], Any]


def ours(params: list[Tensor]) -> DeepSpeedLion:
    return DeepSpeedLion(params, lr=LR, betas=BETAS)


class Idle:
    def __init__(self, params: list[Tensor]) -> None:
        pass

    def step(self) -> None:
        pass


def upside_down(params: list[Tensor]) -> DeepSpeedLion:
    return DeepSpeedLion(params, lr=LR, betas=BETAS, maximize=True)


def trained(make: Make, size: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(size)
    p = torch.nn.Parameter(torch.randn(size, generator=generator).to(dtype).to(device))
    optimizer = make([p])
    for _ in range(STEPS):
        p.grad = torch.randn(size, generator=generator).to(dtype).to(device)
        optimizer.step()
    return p.detach().cpu()


def by_the_rule(size: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    p, m = torch.randn(size, generator=generator).to(dtype), torch.zeros(size)
    s = scalars(hyper_table([HyperParameters(LR, 0.0, *BETAS, False)], torch.device("cpu"))[0])
    for _ in range(STEPS):
        p, m = lion_rule(p, torch.randn(size, generator=generator).to(dtype), m, s)
    return p


def passes_deepspeeds_test(a: Tensor, b: Tensor) -> bool:
    return bool((a.float().norm() - b.float().norm()).abs() <= 1e-2 * a.float().norm())


@pytest.mark.parametrize(
    ("dtype", "sizes"),
    [
        pytest.param(torch.float16, SIZES[:-1], id="fp16"),
        pytest.param(torch.float32, SIZES[:-1], id="fp32"),
        # It is compiled, as in tests/unit/test_compiled.py.
        pytest.param(torch.float32, SIZES[-1:], id="fp32-long", marks=pytest.mark.exhaustive),
    ],
)
def test_ten_steps_on_random_gradients(dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    for size in sizes:
        expected = by_the_rule(size, dtype)
        assert_same_bits(trained(ours, size, dtype), expected, f"{size}")
        for other in (ours, Idle, upside_down):
            assert passes_deepspeeds_test(expected, trained(other, size, dtype)), (other, size)


def assert_equal_but_for_ties(a: Tensor, b: Tensor) -> None:
    """A sign that fell otherwise is a difference of 2 lr."""
    apart = int(((a - b).abs() > LR / 2).sum())
    assert apart <= 1e-4 * a.numel(), f"{apart} of {a.numel()} weights are a step apart"


@pytest.mark.exhaustive  # DeepSpeed may have to compile it again, which takes minutes
@needs_cpu_lion
def test_ten_steps_beside_deepspeeds_lion_for_cpus() -> None:
    from deepspeed.ops.lion import DeepSpeedCPULion

    for size in SIZES:
        theirs = trained(DeepSpeedCPULion, size, torch.float32)
        assert_equal_but_for_ties(trained(ours, size, torch.float32), theirs)
    with pytest.raises(AssertionError, match="a step apart"):
        assert_equal_but_for_ties(trained(upside_down, size, torch.float32), theirs)


@pytest.mark.skipif(CUDA_HOME is None or not torch.cuda.is_available(), reason="needs a CUDA device and its compiler")
def test_ten_steps_beside_deepspeeds_lion_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.ops.lion import FusedLion

    # DeepSpeed 0.19.8, which compiles it, cannot read an architecture such as 9.0a.
    if "TORCH_CUDA_ARCH_LIST" in os.environ:
        plain = re.sub(r"(\d)[a-z]", r"\1", os.environ["TORCH_CUDA_ARCH_LIST"])
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", plain)
    for size in SIZES:
        theirs = trained(FusedLion, size, torch.float32, "cuda")
        assert_equal_but_for_ties(trained(ours, size, torch.float32, "cuda"), theirs)
        fp16 = trained(FusedLion, size, torch.float16, "cuda")
        assert passes_deepspeeds_test(trained(ours, size, torch.float16, "cuda"), fp16)


def body_classes(rank: int, world_size: int) -> None:
    deepspeed = start_deepspeed(rank, world_size)
    lion_dist.deepspeed.register()
    for offload in (False, True):
        config = make_config(2, "fp16", gradient_clipping=1.0, zero_optimization={"cpu_offload": offload})
        with engine_of(deepspeed, Model(rank, world_size), config) as engine:
            assert type(engine.optimizer.optimizer) is DeepSpeedLion
            assert engine.zero_cpu_offload() == offload


def test_the_engine_builds_our_class(tmp_path: Path) -> None:
    run_ranks(body_classes, 1, tmp_path)
