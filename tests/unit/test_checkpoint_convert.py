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
from lion_dist.memory_order import flat
from lion_dist.sharding.box_tensor import BoxTensor
from lion_dist.update.codecs import decode
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


@pytest.mark.parametrize("master_weights", [False, True])
def test_lion_pytorch_goes_on_from_8_bits(master_weights: bool) -> None:
    """It is given the momentum that the codes stand for, whatever the memory order, and nothing else."""
    lion_pytorch = pytest.importorskip("lion_pytorch")
    kernel = torch.randn(11, 4, 5, 3).contiguous(memory_format=torch.channels_last)
    params = [nn.Parameter(t.bfloat16() if master_weights else t) for t in (torch.randn(7, 41), kernel)]
    ours = Lion(params, lr=1e-3, momentum_dtype="int8", master_weights=master_weights)
    for _ in range(3):
        for p in params:
            p.grad = torch.randn_like(p) * 1e-4
        ours.step()
    saved = ours.state_dict()
    found = convert.to_lion_pytorch(saved)
    assert set(saved["state"][0]) >= {"exp_avg", "exp_avg_scale"}  # is not changed
    for i, p in enumerate(params):
        codes, scale = ours.state[p]["exp_avg"], ours.state[p]["exp_avg_scale"]
        expected = decode(flat(codes), scale).as_strided(p.shape, p.stride())
        assert set(found["state"][i]) == {"exp_avg"}
        assert_same_bits(found["state"][i]["exp_avg"], expected, str(i))
        assert 0 < expected.abs().max() < 1e-3
    back = lion_pytorch.Lion(params, lr=0.9)
    back.load_state_dict(found)
    assert_all_same(momenta(back), [found["state"][i]["exp_avg"].to(p.dtype) for i, p in enumerate(params)])
    del saved["state"][0]["exp_avg_scale"]  # the other, channels-last, is shown in float32
    with pytest.raises(ValueError, match="exp_avg of parameter 0 is int8, but its scales"):
        convert.to_lion_pytorch(saved)
    saved["state"][0]["exp_avg"] = BoxTensor.of_runs((7, 41), (41, 1), [], torch.empty(0))
    with pytest.raises(TypeError, match=r"exp_avg of parameter 0 is a BoxTensor.*full_state_dict\(\)"):
        convert.to_lion_pytorch(saved)


def bitsandbytes_state(values: dict[str, Any]) -> dict[str, Any]:
    """bitsandbytes 0.50 saves the step and, in a dict of its own that FSDP leaves alone, tensors."""
    group = {
        "lr": 3e-4, "betas": (0.95, 0.98), "eps": 0.0, "weight_decay": 0.1, "alpha": 0.0, "t_alpha": None,
        "t_beta3": None, "params": [0],
    }  # fmt: skip
    return {"state": {0: {"step": 7, "__bnb_optimizer_quant_state__": values}}, "param_groups": [group]}


def dynamic_map() -> Tensor:
    """bitsandbytes' signed dynamic map: 2**i levels of each sign between 10**(i-7) and 10**(i-6), for i from 0 to 6, in
    the middles of equal parts; 0, and 1."""
    levels = [0.0, 1.0]
    for i in range(7):
        parts = torch.linspace(0.1, 1, 2**i + 1)
        levels += [sign * float(10 ** (i - 6) * x) for x in (parts[:-1] + parts[1:]) / 2 for sign in (1, -1)]
    return torch.tensor(sorted(levels))


def eight_bits(m: Tensor, block: int = 256) -> dict[str, Any]:
    """The state of bitsandbytes' 8-bit Lion that is nearest to a momentum."""
    qmap, n = dynamic_map(), m.numel()
    blocks = torch.nn.functional.pad(m.flatten(), (0, -n % block)).view(-1, block)
    largest = blocks.abs().amax(1)
    codes = ((blocks / largest[:, None])[:, :, None] - qmap).abs().argmin(2).flatten()[:n]
    return {"state1": codes.to(torch.uint8).view(m.shape), "qmap1": qmap, "absmax1": largest}


def test_bitsandbytes_with_32_bits() -> None:
    p, m = nn.Parameter(torch.zeros(3, 5)), torch.arange(15.0).view(3, 5)
    optimizer = Lion([p], lr=1.0)
    optimizer.load_state_dict(convert.from_bitsandbytes(bitsandbytes_state({"state1": m})))
    assert_same_bits(optimizer.state[p]["exp_avg"], m)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (3e-4, (0.95, 0.98), 0.1)
    unwrapped = {"state": {0: {"step": 7, "state1": torch.ones(3, 5)}}, "param_groups": [{"params": [0], "lr": 1.0}]}
    assert convert.from_bitsandbytes(unwrapped)["state"][0]["exp_avg"].all()


@pytest.mark.parametrize("block", [256, 2048])  # 2048 in earlier versions
def test_bitsandbytes_with_8_bits(block: int) -> None:
    """Seventeen blocks of 256, the last one of four elements; each block has a size of its own."""
    p = nn.Parameter(torch.zeros(41, 100))
    m = torch.randn(41, 100) * torch.logspace(-9, 1, 41)[:, None]
    values = eight_bits(m, block)
    assert values["qmap1"].numel() == 256
    optimizer = Lion([p], lr=1.0)
    optimizer.load_state_dict(convert.from_bitsandbytes(bitsandbytes_state(values)))
    codes, largest = values["state1"].flatten().tolist(), values["absmax1"]
    expected = torch.stack([values["qmap1"][code] * largest[i // block] for i, code in enumerate(codes)])
    got = optimizer.state[p]["exp_avg"]
    assert_same_bits(got, expected.view(41, 100))
    of_block = largest.repeat_interleave(block)[: m.numel()].view(m.shape)
    assert ((got - m).abs() <= 0.008 * of_block).all()  # half the distance of the largest levels, 0.9 / 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state1": torch.zeros(3, 5, dtype=torch.int8)}, "state1 of parameter 0 is torch.int8"),
        ({"state1": torch.zeros(5, 3, dtype=torch.uint8).T}, r"state1 of parameter 0 has strides \(1, 3\)"),
        ({"state1": torch.zeros(5, 3).T}, r"state1 of parameter 0 has strides \(1, 3\)"),
        ({"state1": None}, "no state of bitsandbytes' Lion"),
        ({"state2": torch.zeros(3, 5, dtype=torch.uint8)}, "no state of bitsandbytes' Lion"),
        ({"max1": torch.zeros(1)}, "block_wise=False"),
        ({"qmap1": None}, "qmap1 of parameter 0 is a NoneType"),
        ({"qmap1": torch.zeros(255)}, "qmap1 of parameter 0 is no map of 256 levels"),
        ({"qmap1": torch.full((256,), 1.5)}, "qmap1 of parameter 0 is no map of 256 levels"),
        ({"qmap1": torch.zeros(256).half()}, r"qmap1 of parameter 0 is \(256,\) torch.float16"),
        ({"absmax1": None}, "absmax1 of parameter 0 is a NoneType"),
        ({"absmax1": torch.zeros(2)}, "absmax1 of parameter 0 has 2 scales for 15 elements; expected 1"),
        ({"absmax1": torch.tensor([-1.0])}, "absmax1 of parameter 0 has negative scales"),
        ({"absmax1": torch.tensor([torch.nan])}, "absmax1 of parameter 0 has numbers that are not finite"),
        ({"absmax1": torch.tensor([torch.inf])}, "absmax1 of parameter 0 has numbers that are not finite"),
    ],
)
def test_damaged_states_of_bitsandbytes(change: dict[str, Any], message: str) -> None:
    values = eight_bits(torch.ones(3, 5))
    convert.from_bitsandbytes(bitsandbytes_state(values))
    with pytest.raises(ValueError, match=message):
        convert.from_bitsandbytes(bitsandbytes_state({**values, **change}))


class DecoupledLionW(torch.optim.Optimizer):
    """The step of llm-foundry's optimizer of this name, and its groups."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})
        for group in self.param_groups:
            group["initial_lr"] = group["lr"]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            lr, wd, (beta1, beta2) = group["lr"], group["weight_decay"], group["betas"]
            for p in group["params"]:
                assert p.grad is not None
                m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.mul_(1 - lr / group["initial_lr"] * wd)
                p.add_(m.lerp(p.grad, 1 - beta1).sign_(), alpha=-lr)
                m.lerp_(p.grad, 1 - beta2)


@pytest.mark.parametrize("named", [False, True])
def test_decoupled_lionw_goes_on_with_the_same_weights(named: bool) -> None:
    """Two groups with an lr and a decay each, and a schedule: the decay is a share of lr / initial_lr of each group's
    own. A wrong sign would be 2 * lr, a decay by lr alone a quarter of that."""
    model, twin = model_of(0), model_of(0)

    def of(model: nn.Module) -> list[dict[str, Any]]:
        first, *rest = model.named_parameters() if named else model.parameters()
        return [{"params": [first], "lr": 0.02, "weight_decay": 0.3}, {"params": rest}]

    theirs = DecoupledLionW(of(model), lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
    train(model, theirs)
    for group in theirs.param_groups:
        group["lr"] *= 0.25
    twin.load_state_dict(model.state_dict())
    ours = Lion(of(twin), lr=1.0)
    converted = convert.from_decoupled_lionw(theirs.state_dict())
    ours.load_state_dict(converted)
    assert_all_same(momenta(ours), momenta(theirs))
    train(model, theirs, 20)
    train(twin, ours, 20)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(q, p, atol=1e-6, rtol=0)
    assert [g["init_lr"] for g in ours.param_groups] == [0.02, 0.01]
    assert ("param_names" in converted["param_groups"][0]) == named


def test_what_is_not_decoupled_lionws() -> None:
    model = model_of(0)
    theirs = DecoupledLionW(model.parameters(), lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)
    train(model, theirs, 1)
    for initial in (None, 0.0):
        saved = theirs.state_dict()
        saved["param_groups"][0]["initial_lr"] = initial
        with pytest.raises(ValueError, match=f"parameter group 0 has initial_lr {initial}; expected a number > 0"):
            convert.from_decoupled_lionw(saved)
    saved = theirs.state_dict()
    saved["state"][0] = {"exp_avg::quantized": torch.zeros(3, 5, dtype=torch.int8)}
    with pytest.raises(ValueError, match=r"no state of DecoupledLionW, but \['exp_avg::quantized'\]"):
        convert.from_decoupled_lionw(saved)


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
