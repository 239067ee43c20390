"""Training where the user has set torch's default device and dtype, which decide nothing of what lion_dist computes.

The meta device stands for a GPU: a tensor that lands there by mistake is found on machines without one.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lion_dist
from lion_dist import Lion, ShardedLion, checkpoint
from tests.asserts import assert_same_bits
from tests.harness import run_ranks

F32, BF16 = torch.float32, torch.bfloat16
EIGHT: dict[str, Any] = {"master_weights": True, "momentum_dtype": "int8"}
OPTIONS: list[tuple[torch.dtype, dict[str, Any]]] = [(F32, {}), (BF16, EIGHT)]
MODES: list[tuple[type[Any], dict[str, Any]]] = [
    (Lion, {}),
    (ShardedLion, {"stage": 1, "param_sync": "signs"}),
    (ShardedLion, {"stage": 2, "param_sync": "params", "reduce_dtype": BF16}),
]


@contextmanager
def defaults(device: str, dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(F32)


def train(rank: int, cls: type[Any], dtype: torch.dtype, options: dict[str, Any], folder: Path, where: Any) -> Any:
    """Trains, saves and loads, under the defaults ``where`` from the first call of lion_dist on."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 3)).to(dtype)
    batches = [torch.randn(4, 40, dtype=dtype) + rank * (options.get("stage") == 2) for _ in range(3)]
    found: list[Any] = []
    with defaults(*where):
        optimizer = cls(model.named_parameters(), lr=0.01, weight_decay=0.1, **options)
        for batch in batches:
            model(batch).square().sum().backward()
            if cls is Lion:
                found.append(lion_dist.clip_grad_norm_(model.parameters(), 1.0).item())
            else:
                found.append(optimizer.clip_grad_norm_(1.0).item())
            found.append(optimizer.statistics("parameter", flips=True))
            optimizer.step()
            optimizer.zero_grad()
        state_dict = optimizer.state_dict()
        if cls is ShardedLion:
            state_dict = optimizer.full_state_dict()
            optimizer.offload_state()
            optimizer.reload_state()
        optimizer.load_state_dict(state_dict)
        checkpoint.save(folder, model, optimizer, extra={"order": torch.zeros(3, dtype=F32, device="cpu")})
        assert checkpoint.load(folder, model, optimizer)["order"].device.type == "cpu"
    momenta = [t for i in sorted(state_dict["state"]) for t in state_dict["state"][i].values()]
    return found, [*(p.detach() for p in model.parameters()), *momenta]


def body(rank: int, world_size: int, folder: Path) -> None:
    warnings.simplefilter("ignore")  # of updates that bfloat16 rounds away
    for number, (cls, mode) in enumerate(MODES):
        for form, (dtype, options) in enumerate(OPTIONS):
            numbers: list[Any] = []
            tensors: list[torch.Tensor] = []
            for where in (("cpu", F32), ("meta", BF16), ("cpu", torch.float64)):
                place = folder / f"{number}-{form}-{where[0]}-{where[1]}"
                found, state = train(rank, cls, dtype, {**mode, **options}, place, where)
                what = f"{cls.__name__}, {mode}, {dtype}, {options}, by default {where}"
                numbers = numbers or found
                assert repr(found) == repr(numbers), what
                tensors = tensors or [t.clone() for t in state]
                for i, (got, expected) in enumerate(zip(state, tensors, strict=True)):
                    assert_same_bits(got, expected, f"{what}: {i}")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the meta device stands for the GPU")
def test_they_decide_nothing(tmp_path: Path) -> None:
    run_ranks(body, 2, tmp_path, (tmp_path,))
