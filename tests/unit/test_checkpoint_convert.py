"""Conversions from other optimizers' checkpoints and to lion-pytorch's, as their users save them."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lion_dist import Lion
from lion_dist.checkpoint import convert
from tests.asserts import assert_same_bits
from tests.scenarios.tampering import Bomb

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:TypedStorage")


def model_of(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2))


def groups(model: nn.Module) -> list[dict[str, Any]]:
    params = list(model.parameters())
    return [
        {"params": [p for p in params if p.dim() > 1], "weight_decay": 0.5},
        {"params": [p for p in params if p.dim() < 2]},
    ]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    for step in range(steps):
        torch.manual_seed(step)
        optimizer.zero_grad()
        model(torch.randn(4, 5)).square().sum().backward()
        optimizer.step()


def momenta(optimizer: torch.optim.Optimizer, key: str = "exp_avg") -> list[Tensor]:
    return [optimizer.state[p][key].clone() for g in optimizer.param_groups for p in g["params"]]


def assert_all_same(got: list[Tensor], expected: list[Tensor]) -> None:
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert_same_bits(a, b, str(i))


def test_lion_pytorch_there_and_back(tmp_path: Path) -> None:
    lion_pytorch = pytest.importorskip("lion_pytorch")
    theirs_model, ours_model = model_of(0), model_of(0)
    theirs = lion_pytorch.Lion(groups(theirs_model), lr=1e-2)
    train(theirs_model, theirs)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pt")
    ours = Lion(groups(ours_model), lr=0.5)
    ours.load_state_dict(torch.load(tmp_path / "theirs.pt", weights_only=True))
    assert_all_same(momenta(ours), momenta(theirs))
    assert [g["lr"] for g in ours.param_groups] == [1e-2] * 2
    assert [g["weight_decay"] for g in ours.param_groups] == [0.5, 0.0]
    train(ours_model, ours)
    torch.save(convert.to_lion_pytorch(ours.state_dict()), tmp_path / "ours.pt")
    back = lion_pytorch.Lion(groups(ours_model), lr=0.9)
    back.load_state_dict(torch.load(tmp_path / "ours.pt", weights_only=True))
    assert_all_same(momenta(back), momenta(ours))
    assert set(back.param_groups[0]) == set(theirs.param_groups[0])
    assert back.param_groups[0]["lr"] == 1e-2
    train(ours_model, back)
    ours.param_groups[0]["maximize"] = True
    with pytest.raises(ValueError, match="maximize"):
        convert.to_lion_pytorch(ours.state_dict())


def bitsandbytes_state(bits: int) -> dict[str, Any]:
    """bitsandbytes 0.50 saves the step and, in a dict of its own that FSDP leaves alone, tensors."""
    quantised = {"state1": torch.zeros(3, 5, dtype=torch.uint8), "qmap1": torch.zeros(256), "absmax1": torch.zeros(1)}
    wide = {"state1": torch.arange(15.0).view(3, 5)}
    group = {
        "lr": 3e-4, "betas": (0.95, 0.98), "eps": 0.0, "weight_decay": 0.1, "alpha": 0.0, "t_alpha": None,
        "t_beta3": None, "params": [0],
    }  # fmt: skip
    entry = {"step": 7, "__bnb_optimizer_quant_state__": quantised if bits == 8 else wide}
    return {"state": {0: entry}, "param_groups": [group]}


def test_bitsandbytes() -> None:
    p = nn.Parameter(torch.zeros(3, 5))
    optimizer = Lion([p], lr=1.0)
    optimizer.load_state_dict(convert.from_bitsandbytes(bitsandbytes_state(32)))
    assert_same_bits(optimizer.state[p]["exp_avg"], torch.arange(15.0).view(3, 5))
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (3e-4, (0.95, 0.98), 0.1)
    with pytest.raises(ValueError, match="8 bits"):
        convert.from_bitsandbytes(bitsandbytes_state(8))
    unwrapped = {"state": {0: {"step": 7, "state1": torch.ones(3, 5)}}, "param_groups": [{"params": [0], "lr": 1.0}]}
    assert convert.from_bitsandbytes(unwrapped)["state"][0]["exp_avg"].all()
    with pytest.raises(ValueError, match="no state of bitsandbytes' Lion"):
        convert.from_bitsandbytes({"state": {0: {"state1": p, "state2": p}}, "param_groups": []})


def test_adamw_is_a_start_with_advice() -> None:
    model = model_of(0)
    adamw = torch.optim.AdamW(groups(model), lr=3e-4)
    train(model, adamw)
    ours = Lion(groups(model), lr=5e-5)
    told: list[str] = []
    ours.load_state_dict(convert.from_adamw(adamw.state_dict(), ours, tell=told.append))
    assert_all_same(momenta(ours), momenta(adamw))
    assert [g["lr"] for g in ours.param_groups] == [5e-5] * 2
    assert "AdamW had lr 0.0003 and weight_decay 0.5. For Lion take an lr of 3e-05 to 0.0001" in told[0]
    assert "weight_decay of 1.5 to 5; here they are 5e-05 and 0.5" in told[0]
    sgd = torch.optim.SGD(groups(model), lr=1.0, momentum=0.9)
    train(model, sgd, 1)
    with pytest.raises(ValueError, match=r"no state of Adam's, but \['momentum_buffer'\]"):
        convert.from_adamw(sgd.state_dict(), ours)


def test_deepspeed_universal(tmp_path: Path) -> None:
    model = model_of(0)
    optimizer = Lion(groups(model), lr=0.25)
    saved = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    for i, (name, m) in enumerate(saved.items()):
        (tmp_path / "zero" / name).mkdir(parents=True)
        # Stage 3 merges without the shape.
        torch.save({"param": m.flatten() if i % 2 else m, "cat_dim": 0}, tmp_path / "zero" / name / "exp_avg.pt")
    optimizer.load_state_dict(convert.from_deepspeed_universal(tmp_path, model, optimizer))
    for name, p in model.named_parameters():
        assert_same_bits(optimizer.state[p]["exp_avg"], saved[name], name)
    assert optimizer.param_groups[0]["lr"] == 0.25
    file = tmp_path / "zero" / "0.weight" / "exp_avg.pt"
    torch.save({"param": torch.zeros(7)}, file)
    with pytest.raises(ValueError, match=r"expected shape \(3, 5\)"):
        convert.from_deepspeed_universal(tmp_path, model, optimizer)
    torch.save({"param": Bomb}, file)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        convert.from_deepspeed_universal(tmp_path, model, optimizer)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"no exp_avg\.pt of 0\.weight"):
        convert.from_deepspeed_universal(tmp_path, model, optimizer)
