"""Lion's groups and state under FSDP1 and FSDP2: frozen parameters of any kind, names, entries of others, warnings.
On one rank: what is asked here does not depend on the number of ranks."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor

from lion_dist import Lion
from tests.asserts import assert_same_bits
from tests.harness import device_of, run_ranks


class Adapted(nn.Module):
    """Two layers of one shape, in an order, over a base that is frozen."""

    def __init__(self, order: str, dtype: torch.dtype, base: torch.dtype) -> None:
        super().__init__()
        for name in order:
            setattr(self, name, nn.Linear(16, 16, bias=False, dtype=dtype))
        self.base = nn.Parameter(torch.ones(8, 2).to(base), requires_grad=False)


def trained(model: nn.Module, optimizer: Lion) -> None:
    for value, name in enumerate("ab", 1):
        p = getattr(model, name).weight
        p.grad = torch.full_like(p, float(value))
    optimizer.step()


def assert_by_name(model: nn.Module, optimizer: Lion, value: float) -> None:
    for factor, name in enumerate("ab", 1):
        m = optimizer.state[getattr(model, name).weight]["exp_avg"]
        whole = m.full_tensor() if isinstance(m, DTensor) else m
        assert whole.flatten()[0].item() == pytest.approx(factor * value, rel=0.01), name


def body_fsdp2(rank: int, world_size: int) -> None:
    device = device_of(rank, world_size)
    mesh = init_device_mesh(device.type, (world_size,))

    def made(order: str, dtype: torch.dtype, base: torch.dtype, lr: float) -> tuple[Any, Any]:
        torch.manual_seed(0)
        model = Adapted(order, dtype, base).to(device)
        fully_shard(model, mesh=mesh)
        return model, Lion(model.named_parameters(), lr=lr)

    integers = (torch.uint8,) if torch.__version__ >= "2.13" else ()  # fully_shard of torch 2.11 takes none
    for base in (*integers, torch.float64):
        model, optimizer = made("ab", torch.float32, base, 0.25)
        trained(model, optimizer)
        assert [p for p in model.parameters() if optimizer.state.get(p)] == [model.a.weight, model.b.weight]
        # Names: through torch's door, and directly.
        other, loaded = made("ba", torch.float32, base, 0.25)
        set_optimizer_state_dict(other, loaded, get_optimizer_state_dict(model, optimizer))
        assert_by_name(other, loaded, 0.01)
        other, loaded = made("ba", torch.float32, base, 0.25)
        loaded.load_state_dict(optimizer.state_dict())
        assert_by_name(other, loaded, 0.01)
    model.base.requires_grad_(True)
    before = model.a.weight.full_tensor()
    with pytest.raises(TypeError, match=r"parameter 0 \(shape \(8, 2\)\) is torch.strided torch.float64"):
        optimizer.step()
    assert_same_bits(model.a.weight.full_tensor(), before)
    model.base.requires_grad_(False)

    # A wrapper's entries, DTensors too; cast as torch does it.
    p = model.a.weight
    optimizer.state[p]["slow"] = p.detach().clone()
    optimizer.state["count"] = 3
    other, loaded = made("ba", torch.float32, torch.float64, 0.25)
    loaded.load_state_dict(optimizer.state_dict())
    slow = loaded.state[other.a.weight]["slow"]
    assert isinstance(slow, DTensor)
    assert_same_bits(slow.to_local(), p.detach().to_local())
    assert loaded.state["count"] == 3

    # Of 16-bit weights this rank's part is looked at.
    model, optimizer = made("ab", torch.bfloat16, torch.bfloat16, 1e-6)
    with pytest.warns(UserWarning, match=r"below half a unit .* of (99|100)% of the torch.bfloat16 weights"):
        trained(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained(model, optimizer)


def body_fsdp1(rank: int, world_size: int) -> None:
    device = device_of(rank, world_size)

    def made(order: str, dtype: torch.dtype = torch.float32, lr: float = 0.25) -> tuple[nn.Module, Lion]:
        torch.manual_seed(0)
        model = Adapted(order, dtype, dtype)
        wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=device)
        return wrapped, Lion(wrapped.named_parameters(), lr=lr)

    model, optimizer = made("ab")
    trained(model, optimizer)
    for door in ("FSDP", "state_dict", "directly", "saved", "with its own state_dict"):
        other, loaded = made("ba")
        if door in ("directly", "saved"):
            # The same model, its parameters given in the other order.
            other, _ = made("ab")
            loaded = Lion(list(other.named_parameters())[::-1], lr=0.25)
            saved = optimizer.state_dict()
            if door == "saved":
                torch.save(saved, file := io.BytesIO())
                saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
            loaded.load_state_dict(saved)
        elif door == "FSDP":
            state = FullyShardedDataParallel.optim_state_dict(model, optimizer)
            loaded.load_state_dict(FullyShardedDataParallel.optim_state_dict_to_load(other, loaded, state))
        elif door == "with its own state_dict":
            state = FullyShardedDataParallel.optim_state_dict(model, optimizer, optimizer.state_dict())
            loaded.load_state_dict(FullyShardedDataParallel.optim_state_dict_to_load(other, loaded, state))
        else:
            set_optimizer_state_dict(other, loaded, get_optimizer_state_dict(model, optimizer))
        assert_by_name(other, loaded, 0.01)
        names = [name for name, _ in other.named_parameters()]
        assert loaded.param_groups[0]["param_names"] == (names[::-1] if door in ("directly", "saved") else names)
    model, optimizer = made("ab", torch.bfloat16, 1e-6)
    with pytest.warns(UserWarning, match=r"below half a unit .* of (99|100)% of the torch.bfloat16 weights"):
        trained(model, optimizer)


def body(rank: int, world_size: int) -> None:
    body_fsdp2(rank, world_size)
    body_fsdp1(rank, world_size)


def test_groups_and_state_under_fsdp(tmp_path: Path) -> None:
    run_ranks(body, 1, tmp_path)
