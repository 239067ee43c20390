"""Lion.statistics() on a GPU, where the fused kernel makes the step that it describes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lion_dist import Lion
from lion_dist.update.backends import triton_sums
from lion_dist.update.segments import TILE
from tests.scenarios.watched import CASES, assert_same_numbers, check_steps, sums_launched

from .common import BF16, F32, GPU, needs_gpu

pytestmark = [needs_gpu, pytest.mark.filterwarnings("ignore:lion_dist")]


@pytest.mark.parametrize("case", CASES)
def test_they_are_those_of_the_step(case: str) -> None:
    check_steps(case, "parameter", GPU)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize(
    ("dtype", "options"),
    [(F32, {}), (BF16, {}), (BF16, {"momentum_dtype": "int8", "master_weights": True})],
    ids=["fp32", "bf16", "master-int8"],
)
def test_one_pass_gives_the_numbers_of_plain_torch(
    dtype: torch.dtype, options: dict[str, Any], aligned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More tiles of a tensor than are added up at a time; the same bits in every call; gradients at any address."""
    launched = sums_launched(monkeypatch)
    shapes = [(triton_sums.CHUNK + 3, TILE), (4096, 777), (TILE + 1,), (5,)]
    generator = torch.Generator(GPU).manual_seed(1)
    params = [nn.Parameter(torch.randn(s, generator=generator, device=GPU).to(dtype)) for s in shapes]
    optimizer, twin = (Lion(params, 1e-2, weight_decay=0.3, use_triton=choice, **options) for choice in (None, False))
    for step in range(3):
        for p in params:
            memory = torch.randn(p.numel() + 8, generator=generator, device=GPU).to(dtype)
            p.grad = memory[8 if aligned else 1 :][: p.numel()].view(p.shape)
        optimizer.step()
        twin.state = optimizer.state
        launched.clear()
        got = optimizer.statistics("parameter", flips=True)
        assert launched == [triton_sums._sums_kernel, triton_sums._add_tiles_kernel]
        assert_same_numbers(got, twin.statistics("parameter", flips=True), f"step {step}")
        # Compared with themselves, no signs have flipped.
        again = optimizer.statistics("parameter", flips=True)
        assert again == {**got, **{name: 0.0 for name in again if "flipped" in name}}


@pytest.mark.parametrize("there", ["cuda", "cpu"])
@pytest.mark.parametrize("use_triton", [None, False])
def test_signs_of_the_last_call_lie_on_another_device(use_triton: bool | None, there: str) -> None:
    """Where other code has moved weights and momenta, nothing is compared until the next call."""
    p = nn.Parameter(torch.ones(TILE + 1, device="cpu" if there == "cuda" else GPU))
    optimizer = Lion([p], 1e-2, use_triton=use_triton)
    p.grad = torch.ones_like(p)
    optimizer.statistics(flips=True)
    p.grad = None
    p.data = p.data.to(there)
    optimizer.state[p] = {name: t.to(there) if name == "exp_avg" else t for name, t in optimizer.state[p].items()}
    for compared in (False, True):
        p.grad = torch.ones_like(p)
        assert ("sign/flipped/global" in optimizer.statistics(flips=True)) == compared
