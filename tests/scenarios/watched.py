"""The numbers of `Lion.statistics`, from what a step of `Lion` on one process does to its weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from lion_dist import Lion
from lion_dist.update import codecs
from lion_dist.update.state import EXP_AVG, EXP_AVG_SCALE, REMAINDER

NORMS = ("param", "moment", "update", "grad")


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
