"""8-bit momenta through torch.distributed.checkpoint between memory orders: right or refused, never of other scales."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from lion_dist import Lion, ShardedLion
from lion_dist.momentum_codes import decoded
from lion_dist.sharding.box_tensor import BoxTensor
from tests.asserts import assert_same_bits
from tests.harness import device_of, run_ranks

BOTH: dict[str, Any] = {"momentum_dtype": "int8", "master_weights": True}
ORDERS = {"row-major": torch.contiguous_format, "channels-last": torch.channels_last}


def trained(order: str, steps: int, kind: Any, device: torch.device) -> tuple[nn.Conv2d, Any]:
    """A layer whose gradients of half of the input channels are 2^13 times those of the others."""
    torch.manual_seed(0)
    model = nn.Conv2d(32, 16, 3).bfloat16().to(device, memory_format=ORDERS[order])  # type: ignore[call-overload]
    optimizer = kind(model.named_parameters(), lr=1e-3, **BOTH)
    feed(model, optimizer, range(steps))
    return model, optimizer


def feed(model: nn.Conv2d, optimizer: Any, steps: range) -> None:
    for step in steps:
        for p in model.parameters():
            g = torch.randn(p.shape, generator=torch.Generator().manual_seed(step)).to(p.device, p.dtype)
            if p.dim() == 4:
                g[:, :16] *= 2.0**-13
            p.grad = torch.empty_like(p).copy_(g)
        optimizer.step()


def momenta(model: nn.Conv2d, optimizer: Any) -> list[Tensor]:
    """The momentum of each parameter, float32 on the CPU, in its logical order."""
    sharded = isinstance(optimizer, ShardedLion)
    entries = (optimizer.full_state_dict() if sharded else optimizer.state_dict())["state"]
    found = []
    for i, p in enumerate(model.parameters()):
        m, scale = entries[i]["exp_avg"], entries[i]["exp_avg_scale"]
        assert (m.dtype == torch.int8) == p.is_contiguous()  # elsewhere decoded
        assert m.is_contiguous() or not sharded
        found.append((decoded(m, scale, m) if m.dtype == torch.int8 else m).cpu().contiguous())
    return found


def shown(model: nn.Conv2d, optimizer: Any, own: bool) -> dict[str, Any]:
    return {"optim": optimizer.state_dict() if own else get_optimizer_state_dict(model, optimizer)}


def check(kind: Any, device: torch.device, folder: Path) -> None:
    saved = {order: trained(order, 4, kind, device) for order in ORDERS}
    for own in (True, False):
        for order, (model, optimizer) in saved.items():
            state = shown(model, optimizer, own)
            entry = next(iter(state["optim"]["state"].values()))
            assert isinstance(entry["exp_avg"], BoxTensor) == (kind is not Lion)
            assert (entry["exp_avg"].dtype == torch.int8) == (order == "row-major")
            assert (entry["exp_avg_scale"].dim() == 0) == (order != "row-major")
            dcp.save(state, checkpoint_id=folder / f"{own} {order}")
        for order, (model, optimizer) in saved.items():
            for into in ORDERS:
                other, loaded = trained(into, 1, kind, device)
                before = momenta(other, loaded)
                state = shown(other, loaded, own)
                if into != order:
                    with pytest.raises(CheckpointException, match=r"(?s)ize mismatch.*exp_avg_scale"):
                        dcp.load(state, checkpoint_id=folder / f"{own} {order}")
                    expected = before
                else:
                    dcp.load(state, checkpoint_id=folder / f"{own} {order}")
                    if own:
                        loaded.load_state_dict(state["optim"])
                    else:
                        set_optimizer_state_dict(other, loaded, state["optim"])
                    expected = momenta(model, optimizer)
                for found, m in zip(momenta(other, loaded), expected, strict=True):
                    assert_same_bits(found, m, f"{order} into {into}")
    # What is right goes on with the same bits, without torch's checkpoints too.
    model, optimizer = saved["channels-last"]
    other, loaded = trained("channels-last", 0, kind, device)
    other.load_state_dict(model.state_dict())
    for p, q in zip(other.parameters(), model.parameters(), strict=True):
        assert_same_bits(p.detach(), q.detach())
    loaded.load_state_dict(optimizer.state_dict())
    for one in (saved["channels-last"], (other, loaded)):
        feed(*one, range(4, 7))
    for p, q in zip(other.parameters(), model.parameters(), strict=True):
        assert_same_bits(p.detach(), q.detach(), "later")
    for found, m in zip(momenta(other, loaded), momenta(model, optimizer), strict=True):
        assert_same_bits(found, m, "later")


def sharded(*args: Any, **options: Any) -> ShardedLion:
    return ShardedLion(*args, stage=1, **options)


def body(rank: int, world_size: int, folder: Path) -> None:
    device = device_of(rank, world_size)
    check(Lion, device, folder / "lion")
    check(sharded, device, folder / "sharded")


def test_torchs_checkpoints_between_memory_orders(tmp_path: Path) -> None:
    run_ranks(body, 2, tmp_path, (tmp_path,))
