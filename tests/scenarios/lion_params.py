"""Parameters of a few hundred elements for tests of Lion as an optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.asserts import bits

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SHAPES = [(17, 9), (), (0,), (300,), (2, 3, 4)]


def params_of(dtype: torch.dtype = F32, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def feed(params: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(100 + seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def run(opt: torch.optim.Optimizer, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        feed(params, step)
        opt.step()


def snapshot(opt: torch.optim.Optimizer) -> str:
    """Everything that a failed call might have changed, in bits."""

    def frozen(x: Any) -> Any:
        if isinstance(x, Tensor):
            return x.dtype, x.stride(), x.data_ptr(), bits(x).tolist()
        return {k: frozen(v) for k, v in x.items()} if isinstance(x, dict) else x

    groups = [{k: [id(p) for p in v] if k == "params" else frozen(v) for k, v in g.items()} for g in opt.param_groups]
    params = [p for g in opt.param_groups for p in g["params"]]
    state = [(id(key) if isinstance(key, Tensor) else key, frozen(value)) for key, value in opt.state.items()]
    return str((groups, [frozen(p) for p in params], state, frozen(opt.defaults)))
