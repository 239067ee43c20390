"""FlashLion's state as it saves it, converted: the numbers that it steps with, and a Lion that goes on from them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lion_dist import Lion
from lion_dist.checkpoint import convert

from .common import BF16, F32, GPU, needs_gpu

pytestmark = needs_gpu


def model_of(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(50, 70), nn.Linear(70, 11)).to(GPU)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, count: int) -> None:
    dtype = next(model.parameters()).dtype
    for step in range(first, first + count):
        torch.manual_seed(step)
        optimizer.zero_grad()
        model(torch.randn(16, 50).to(GPU, dtype)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("bits", [24, 32, None])
def test_a_flash_lions_state(bits: int | None, compress: bool) -> None:
    """Numbers within a few roundings of those that flashoptim decodes (GPUs divide a little off there), so that a Lion
    takes the same steps from them but for a few signs of momenta near 0."""
    flashoptim = pytest.importorskip("flashoptim")
    model = model_of(0).to(BF16)
    options: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.1}
    theirs = flashoptim.FlashLion(
        model.named_parameters(), master_weight_bits=bits, compress_state_dict=compress, **options
    )
    train(model, theirs, 0, 20)
    lion = Lion(model.named_parameters(), lr=1.0, momentum_dtype=F32)
    converted, found = convert.from_flashoptim(theirs.state_dict(), lion)
    expected = theirs.get_fp32_model_state_dict(model)
    assert found.keys() == (set() if bits is None else expected.keys())
    for name, w in found.items():
        close(w, expected[name], name)
    lion.load_state_dict(converted)
    for name, p in model.named_parameters():
        close(lion.state[p]["exp_avg"], theirs.state[p]["exp_avg"].materialize().float(), name)
    if bits is None:
        return
    whole = model_of(1)
    whole.load_state_dict(found)
    ours = Lion(whole.named_parameters(), lr=1.0, momentum_dtype=F32)
    ours.load_state_dict(converted)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    for p, q in zip(whole.parameters(), model.parameters(), strict=True):
        assert q.grad is not None
        p.grad = q.grad.float()
    theirs.step()
    ours.step()
    unit = 2.0**-16 if bits == 24 else 2.0**-23  # of weights below 1, in 24 and 32 bits
    for name, w in theirs.get_fp32_model_state_dict(model).items():
        off = (whole.state_dict()[name] - w).abs() > unit
        assert off.float().mean() < 2e-3, name


def close(got: Tensor, expected: Tensor, what: str) -> None:
    assert got.dtype == expected.dtype == F32
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0, msg=what)
