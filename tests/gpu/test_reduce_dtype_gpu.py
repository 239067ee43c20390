"""reduce_dtype=torch.bfloat16 on GPUs: the kernels and plain torch against the definition on the CPU, and training over
NCCL beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lion_dist.sharding.all_to_all import TorchRows
from tests.scenarios.sixteen_bits import (
    BF16,
    CASES,
    F16,
    F32,
    assert_same_numbers,
    average_of,
    awkward,
    body_cases,
    body_hybrid,
)  # fmt: skip

from .common import GPU, needs_gpu, run_on_gpus

pytestmark = needs_gpu

LENGTHS = (128, 2048 + 128, 128, 40 * 2048, 640, 2048 * 300 + 384)


@pytest.mark.parametrize("name", ["torch", "triton"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8, 31])
@pytest.mark.parametrize("dtypes", [(F32,), (BF16,), (F16, BF16, F32)], ids=["fp32", "bf16", "mixed"])
def test_both_halves(name: str, world_size: int, dtypes: tuple[torch.dtype, ...]) -> None:
    """One rank rounds, and then averages what it would have been sent, as all ranks have the same gradients but for a
    shift: row r of what it sends stands for the contribution of rank r."""
    from lion_dist.sharding.triton_rows import TritonRows

    make: Any = {"torch": TorchRows, "triton": TritonRows}[name]
    generator = torch.Generator().manual_seed(world_size)
    inputs: list[Tensor | None] = []
    for i, length in enumerate(LENGTHS):
        shift = (0, 1, 3, 8)[i % 4]
        inputs.append(awkward(shift + length * world_size, dtypes[i % len(dtypes)], generator)[shift:])
    inputs[2] = None
    on_gpu = []
    for i, t in enumerate(inputs):
        shift = (0, 1, 3, 8)[i % 4]
        buffer = torch.empty(0 if t is None else shift + t.numel(), dtype=F32 if t is None else t.dtype, device=GPU)
        on_gpu.append(None if t is None else buffer[shift:].copy_(t))
    outputs = [torch.randn(sum(LENGTHS), generator=generator).to(GPU) for _ in range(2)]
    before = outputs[1].cpu()
    rows = torch.full((world_size, sum(LENGTHS)), 7.0, dtype=BF16, device=GPU)
    halves = [make(t.split(list(LENGTHS))) for t in outputs]
    halves[0].round(rows, on_gpu)
    for adds in (False, True):
        halves[adds].average(rows, adds)
    offset = 0
    for i, (length, t) in enumerate(zip(LENGTHS, inputs, strict=True)):
        expected = torch.zeros(length) if t is None else average_of(list(t.view(world_size, length)))
        assert expected is not None
        part = slice(offset, offset + length)
        assert_same_numbers(outputs[0][part].cpu(), expected, f"input {i}")
        assert_same_numbers(outputs[1][part].cpu(), before[part] + expected, f"input {i}, added")
        offset += length


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_the_bits_of_the_definition(world_size: int, tmp_path: Path) -> None:
    run_on_gpus(body_cases, world_size, tmp_path, (CASES[: 3 if world_size < 3 else 2], [{}]))


def test_master_weights_and_int8_momenta(tmp_path: Path) -> None:
    options = [{"master_weights": True, "momentum_dtype": "int8"}]
    run_on_gpus(body_cases, 2, tmp_path, ([((BF16,), "signs", 64.0)], options, False))


@pytest.mark.parametrize("mesh", [(2, 1), (2, 2)], ids=lambda mesh: f"{mesh[0]}x{mesh[1]}")
def test_between_nodes(mesh: tuple[int, int], tmp_path: Path) -> None:
    run_on_gpus(body_hybrid, mesh[0] * mesh[1], tmp_path, mesh)
