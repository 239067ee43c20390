"""The numbers of `Lion.statistics`, from what a step of `Lion` on one process does to its weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lion_dist import Lion, kernel_launch
from lion_dist.update import codecs
from lion_dist.update.state import EXP_AVG, EXP_AVG_SCALE, REMAINDER
from tests.asserts import assert_same_bits

NORMS = ("param", "moment", "update", "grad")


def sums_launched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A list that takes each kernel of ``statistics()`` when it is launched."""
    from lion_dist.update.backends import triton_sums

    launched: list[Any] = []

    def counting(kernel: Any, *args: Any) -> None:
        launched.append(kernel)
        kernel_launch.launch(kernel, *args)

    monkeypatch.setattr(triton_sums, "launch", counting)
    return launched


class Watcher:
    """Watches steps::

        watcher.begin()
        lion.step()
        expected = watcher.end()    # by the names of the parameters

    Args:
        lion: the optimizer, whose parameters are plain and dense.
        names: the name of each parameter.
    """

    def __init__(self, lion: Lion, names: Sequence[str]) -> None:
        self.lion = lion
        self.params = [(p, group) for group in lion.param_groups for p in group["params"]]
        self.names = names
        self.last: dict[str, Tensor] = {}

    def weight(self, p: Tensor) -> Tensor:
        state = self.lion.state.get(p, {})
        return (codecs.join(p.detach(), state[REMAINDER]) if REMAINDER in state else p.detach()).double()

    def moment(self, p: Tensor) -> Tensor:
        state = self.lion.state[p]
        if EXP_AVG_SCALE not in state:
            return state[EXP_AVG].float()
        codes = state[EXP_AVG]
        flat = codes.as_strided((codes.numel(),), (1,))
        return codecs.decode(flat, state[EXP_AVG_SCALE]).as_strided(codes.shape, codes.stride())

    def begin(self) -> None:
        self.lion.init_state()
        self.before = [
            (self.weight(p).clone(), self.moment(p).clone() if p in self.lion.state else None) for p, _ in self.params
        ]

    def end(self) -> dict[str, float]:
        rows: dict[str, list[float]] = {}
        signs: dict[str, Tensor] = {}
        for name, (p, group), (weight, m) in zip(self.names, self.params, self.before, strict=True):
            if m is None:
                continue
            change = self.weight(p) - weight
            g = torch.zeros_like(p) if p.grad is None else p.grad.float() * (-1 if group["maximize"] else 1)
            beta1 = group["betas"][0]
            c = torch.tensor(beta1) * m + torch.tensor(1 - beta1) * g
            sign = torch.where(torch.isfinite(c) & ~change.isnan(), c.sign(), math.nan)
            if p.grad is None:
                sign = torch.zeros_like(c)
                assert not change.any()
            else:
                signs[name] = sign
            last = self.last.get(name, sign) if p.grad is not None else sign
            compared = p.numel() if p.grad is not None and name in self.last else 0
            squares = [t.double().square().sum().item() for t in (weight, m, change, g)]
            counts = [(sign == 0).sum(), (sign * g > 0).sum(), (sign * last < 0).sum()]
            rows[name] = [*squares, *(float(n) for n in counts), float(compared), float(p.numel())]
        self.last = signs
        self.rows = rows
        return self.numbers({name: [name] for name in rows})

    def numbers(self, members: dict[str, list[str]]) -> dict[str, float]:
        """The numbers of rows: for each its name, and the names of its parameters."""
        found: dict[str, float] = {}
        for name, of in {"global": list(self.rows), **members}.items():
            rows = [[0.0] * 9, *(self.rows[i] for i in of if i in self.rows)]
            *squares, zero, agree, flipped, compared, n = map(sum, zip(*rows, strict=True))
            found |= {f"l2_norm/{what}/{name}": math.sqrt(square) for what, square in zip(NORMS, squares, strict=True)}
            found |= {f"sign/zero/{name}": zero / max(n, 1), f"sign/agree/{name}": agree / max(n, 1)}
            if compared:
                found[f"sign/flipped/{name}"] = flipped / compared
        return found


def assert_same_numbers(got: dict[str, float], expected: dict[str, float], what: str = "") -> None:
    assert got.keys() == expected.keys(), f"{what}: {sorted(got.keys() ^ expected.keys())}"
    for name, number in expected.items():
        assert got[name] == pytest.approx(number, rel=1e-12, nan_ok=True), f"{what}: {name}"


# Steps on one device --------------------------------------------------------------------------------

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SHAPES = [(40, 33), (8, 6, 5, 7), (129,), (1,), (), (0, 3), (700,), (5, 4)]


def made(dtypes: tuple[torch.dtype, ...], device: torch.device) -> list[nn.Parameter]:
    """One is channels-last, one empty, the last but one never has a gradient, and the last is frozen."""
    generator = torch.Generator().manual_seed(0)
    params = []
    for i, shape in enumerate(SHAPES):
        value = torch.randn(shape, generator=generator).to(device, dtypes[i % len(dtypes)])
        if value.dim() == 4:
            value = value.contiguous(memory_format=torch.channels_last)
        params.append(nn.Parameter(value, requires_grad=i < len(SHAPES) - 1))
    return params


def groups_of(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [
        {"params": params[0::2], "weight_decay": 0.3},
        {"params": params[1::2], "lr": 3e-3, "betas": (0.95, 0.98), "maximize": True},
    ]


def set_gradients(params: list[nn.Parameter], step: int) -> None:
    """Many are 0, so that signs are."""
    generator = torch.Generator().manual_seed(100 + step)
    for p in params[:-2]:
        g = torch.randn(p.shape, generator=generator) * torch.randint(2, p.shape, generator=generator)
        p.grad = g.to(p.device, p.dtype)
    if step % 2:
        params[2].grad = None


CASES: dict[str, tuple[tuple[torch.dtype, ...], dict[str, Any]]] = {
    "float32": ((F32,), {}),
    "mixed": ((F32, BF16, F16), {}),
    "bfloat16, momentum in float32": ((BF16,), {"momentum_dtype": F32}),
    "master weights": ((BF16, F32), {"master_weights": True}),
    "8 bits": ((F32, BF16), {"momentum_dtype": "int8"}),
    "master weights, 8 bits": ((BF16,), {"momentum_dtype": "int8", "master_weights": True}),
}


def check_steps(case: str, by: str, device: torch.device, use_triton: bool | None = None) -> None:
    """Five steps of a case, each measured before it is made; beside an optimizer that is never asked."""
    dtypes, options = CASES[case]
    params = made(dtypes, device)
    optimizer = Lion(groups_of(params), lr=1e-2, use_triton=use_triton, **options)
    untold = [nn.Parameter(p.detach().clone(), p.requires_grad) for p in params]
    silent = Lion(groups_of(untold), lr=1e-2, use_triton=use_triton, **options)
    order = [*range(0, len(SHAPES), 2), *range(1, len(SHAPES), 2)]  # of the groups
    watcher = Watcher(silent, list(map(str, range(len(SHAPES)))))
    group_of = {f"group{k}": [str(i) for i in range(len(SHAPES)) if order[i] % 2 == k] for k in (0, 1)}
    for step in range(5):
        for own in (params, untold):
            set_gradients(own, step)
        got = optimizer.statistics(by, flips=True)
        watcher.begin()
        optimizer.step()
        silent.step()
        expected = watcher.end()
        assert_same_numbers(got, expected if by == "parameter" else watcher.numbers(group_of), f"{case}, step {step}")
        for i, (p, q) in enumerate(zip(params, untold, strict=True)):
            assert_same_bits(p.detach(), q.detach(), f"parameter {i}, step {step}")
            for name, t in silent.state.get(q, {}).items():
                assert_same_bits(optimizer.state[p][name], t, f"{name} of {i}, step {step}")
    assert all(0 < got[f"sign/{what}/global"] < 1 for what in ("zero", "agree", "flipped"))
