"""Damaged copies of an optimizer's state_dict, from a seed: what a wrong tool or an older version might make."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lion_dist.sharding.box_tensor import BoxTensor


def _sparse() -> Tensor:
    return torch.sparse_coo_tensor(torch.tensor([[0]]), torch.ones(1), (3,), check_invariants=True)


def _freed() -> Tensor:
    t = torch.zeros(3)
    t.untyped_storage().resize_(0)
    return t


def _endless() -> list[Any]:
    itself: list[Any] = []
    itself.append(itself)
    return itself


_JUNK: list[Callable[[], Any]] = [
    lambda: None, lambda: "", lambda: "junk", lambda: "0.1", lambda: 0, lambda: -1, lambda: 1, lambda: 7, lambda: 2.5,
    lambda: math.nan, lambda: math.inf, lambda: -0.0, lambda: 10**400, lambda: 1j, lambda: True, lambda: False,
    list, dict, tuple, set, lambda: [1], lambda: [None], lambda: {"a": 1}, lambda: {0: {"exp_avg": torch.zeros(3)}},
    lambda: (0.5, 0.5), lambda: (1.0, 0.5), lambda: "ab", lambda: b"\0", object, lambda: Decimal("0.25"),
    lambda: np.float32(0.5), lambda: np.array([0.5, 0.5]), lambda: np.zeros(0), lambda: np.str_("1.0"),
    lambda: torch.bfloat16, lambda: torch.int8, lambda: "bfloat16", lambda: "int8", lambda: torch.tensor(0.5),
    lambda: torch.zeros(3), lambda: torch.zeros(3, dtype=torch.int64), lambda: torch.zeros(2, 3).t(),
    lambda: torch.zeros(3, device="meta"), lambda: torch.tensor(0.5, device="meta"), _sparse, _freed, _endless,
    lambda: torch.zeros(3, dtype=torch.complex64), lambda: torch.zeros(1).expand(3),
    lambda: nn.Parameter(torch.ones(3)),
    lambda: BoxTensor((3,), (), (), torch.float32, "cpu"), lambda: torch.zeros(3).to(torch.float8_e4m3fn),
    lambda: torch.full((3,), math.nan), lambda: lambda: 0,
]  # fmt: skip

_KEYS = [
    "lr", "betas", "weight_decay", "init_lr", "momentum_dtype", "maximize", "params", "param_names", "exp_avg",
    "exp_avg_sq", "momentum_buffer", "step", "state", "param_groups", "initial_lr", "max_lr", "fused", "weight_deacy",
    0, 1, 77, -1, 1.5, None, (), "0", "a.weight", True,
]  # fmt: skip

_TENSORS: list[Callable[[Tensor], Any]] = [
    lambda t: t.double(), lambda t: t.half(), lambda t: t.bfloat16(), lambda t: t.int(), lambda t: t.bool(),
    lambda t: t.to(torch.complex64), lambda t: t.reshape(-1), lambda t: t[None], lambda t: t.flatten()[1:],
    lambda t: t.to("meta"), lambda t: t.to_sparse() if t.dim() else t, lambda t: t * math.nan, lambda t: t * math.inf,
    lambda t: t.clone().requires_grad_(t.is_floating_point()), torch.clone,
    lambda t: t.flatten()[:1].expand(t.numel()).reshape(t.shape),
    lambda t: t.t() if t.dim() == 2 else t, lambda t: t.tolist(), lambda t: t.numpy(), lambda t: [t],
    lambda t: {"t": t},
    lambda t: BoxTensor(t.shape, (), (), t.dtype, "cpu"), lambda t: t.to(torch.float8_e4m3fn),
]  # fmt: skip


def _places(tree: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Every (container, key) below a nest of dicts and lists."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(items):
        found.append((tree, key))
        if value is not tree:
            _places(value, found)
    return found


def _change(value: Any, rng: random.Random) -> Any:
    """A value that somebody may have made of this one."""
    if isinstance(value, Tensor) and rng.random() < 0.7:
        if value.is_meta:  # made so by an earlier change, and it has no values to change
            return value
        return rng.choice(_TENSORS)(value.detach())
    if type(value) in (list, tuple) and value and rng.random() < 0.7:
        items = list(value)
        rng.choice([items.pop, items.reverse, lambda: items.append(items[0]), lambda: rng.shuffle(items)])()
        return rng.choice([list, tuple])(items)
    if type(value) is dict and value and rng.random() < 0.5:
        keys = list(value)
        rng.shuffle(keys)
        return {key: value[key] for key in keys}
    if type(value) is float and rng.random() < 0.5:
        return rng.choice([-value, value * 1e300 * 1e300, str(value), [value], Decimal(value), np.float32(value)])
    return rng.choice(_JUNK)()


def mutated(state_dict: dict[str, Any], seed: int) -> Any:
    """A copy of a state_dict with one to three faults, or none that matters; the same for the same seed."""
    rng = random.Random(seed)
    damaged: Any = {"it": copy.deepcopy(state_dict)}
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        container, key = rng.choice(_places(damaged, []))
        what = rng.random()
        if what < 0.6 or isinstance(container, list):
            container[key] = _change(container[key], rng)
        elif what < 0.75 and container is not damaged:
            del container[key]
        elif what < 0.9 and container is not damaged:
            container[rng.choice(_KEYS)] = rng.choice(_JUNK)()
        elif container is not damaged:  # under another name, or exchanged with another
            other = rng.choice([*_KEYS, *container])
            container[other], container[key] = container[key], container.get(other)
    return damaged["it"]
