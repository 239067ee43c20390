"""FlashLion's state, by the formulas of its format."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

BF16, F16 = torch.bfloat16, torch.float16
FRACTION, LEAST = {BF16: 7, F16: 10}, {BF16: -126, F16: -14}  # bits, and exponent of the smallest normal number
ERRORS = {24: (torch.int8, 127), 32: (torch.int16, 32767)}  # bits of a master weight -> dtype and largest error


def codes_of(m: Tensor) -> tuple[Tensor, Tensor]:
    """FlashLion's codes of a momentum, and a float16 scale for each 32 elements."""
    n = m.numel()
    groups = torch.nn.functional.pad(m.flatten(), (0, -n % 32)).view(-1, 32)
    scale = groups.abs().amax(1).clamp(min=1e-12)
    x = groups / scale[:, None]
    codes = (2 * x / (1 + x.abs()) * 127 + 0.5).floor().to(torch.int8).flatten()[:n]
    return codes.view(m.shape), scale.half()


def half_unit(p: float, dtype: torch.dtype) -> float:
    """Half a unit in the last place of a number of a dtype."""
    exponent = math.frexp(p)[1] - 1 if p else LEAST[dtype]
    return 2.0 ** (max(exponent, LEAST[dtype]) - FRACTION[dtype] - 1)


def split(master: Tensor, dtype: torch.dtype, bits: int) -> tuple[Tensor, Tensor]:
    """FlashLion's weight of a dtype and its error, of a float32 master weight."""
    p, (error_dtype, largest) = master.to(dtype), ERRORS[bits]
    units = torch.tensor([half_unit(x, dtype) for x in p.flatten().tolist()], dtype=torch.float64).view(p.shape)
    share = ((master.double() - p.double()) / units).clamp(-1, 1) * largest
    return p, (share.sign() * (share.abs() + 0.5).floor()).to(error_dtype)


def flash(p: nn.Module, momentum: Callable[[Tensor], dict[str, Tensor]], bits: int | None) -> dict[str, Any]:
    """A state_dict of FlashLion over a model of float32 weights, which become those of FlashLion's bfloat16 model."""
    state: dict[int, Any] = {}
    for i, q in enumerate(p.parameters()):
        state[i] = momentum(torch.randn(q.shape) * 1e-3)
        if bits is None:
            q.data = q.data.to(BF16)
        else:
            q.data, error = split(q.data, BF16, bits)
            state[i]["error_bits"] = error.to(BF16) if bits == 24 else error.view(BF16)
    bytes_of_master = 0 if bits is None else bits // 8
    group = {
        "lr": 3e-4, "betas": (0.95, 0.98), "weight_decay": 0.1, "initial_lr": 6e-4, "master_bytewidth": bytes_of_master,
        "quantize": True, "params": list(state),
    }  # fmt: skip
    return {"state": state, "param_groups": [group]}


def in_8_bits(m: Tensor) -> dict[str, Tensor]:
    """As a state_dict shows it for bfloat16 parameters: scales by their bytes."""
    codes, scale = codes_of(m)
    return {"exp_avg::quantized": codes, "exp_avg::scales": scale.view(BF16)}
