"""Conversion of FlashLion's state: against the formulas of its format, element by element. (Its kernels do not run in
Triton's interpreter; tests/gpu/test_convert_gpu.py has them.)"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lion_dist import Lion
from lion_dist.checkpoint import convert
from lion_dist.update.codecs import decode, join
from tests.asserts import assert_same_bits
from tests.scenarios.flash import BF16, ERRORS, F16, flash, half_unit, in_8_bits, split


def weights(n: int) -> Tensor:
    """Weights of many sizes, zeros and numbers that are subnormal in float16 and bfloat16 among them."""
    w = torch.randn(n) * torch.logspace(-41, 4, n)
    w[:3] = torch.tensor([0.0, -0.0, 1.0])
    return w[torch.randperm(n)]


def model_of() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 11))


def plain(m: Tensor) -> dict[str, Tensor]:
    return {"exp_avg": m}


def test_momenta_are_those_of_the_codes() -> None:
    model = model_of()
    saved = flash(model, in_8_bits, 24)
    optimizer = Lion(model.named_parameters(), lr=1.0)
    converted, _ = convert.from_flashoptim(saved, optimizer)
    for i, entry in saved["state"].items():
        codes, scales = entry["exp_avg::quantized"], entry["exp_avg::scales"].view(F16)
        expected = []
        for j, code in enumerate(codes.flatten().tolist()):
            y = np.float32(code) / np.float32(127)
            expected.append(float(y / (np.float32(2) - abs(y)) * np.float32(scales[j // 32].item())))
        got = converted["state"][i]["exp_avg"]
        assert_same_bits(got, torch.tensor(expected).view(codes.shape), f"parameter {i}")
    optimizer.load_state_dict(converted)
    assert_same_bits(optimizer.state[model.get_parameter("1.weight")]["exp_avg"], converted["state"][2]["exp_avg"])
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (3e-4, (0.95, 0.98), 0.1)
    assert group["decoupled_weight_decay"] is False


@pytest.mark.parametrize("raw", [False, True], ids=["as saved", "int8 and int16"])
@pytest.mark.parametrize("bits", [24, 32])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_weights_are_as_near_as_their_format_says(dtype: torch.dtype, bits: int, raw: bool) -> None:
    master = weights(2000)
    if dtype == F16:
        master = master.clamp(-6e4, 6e4)
    model = nn.ParameterDict({"w": nn.Parameter(master.clone())})
    saved = flash(model, plain, bits)
    model["w"].data, error = split(master, dtype, bits)
    shown = error.to(dtype) if bits == 24 else error.view(dtype)
    saved["state"][0]["error_bits"] = error if raw else shown
    _, found = convert.from_flashoptim(saved, Lion(model.named_parameters()))
    assert found.keys() == {"w"}
    largest = ERRORS[bits][1]
    expected = []
    for p, e in zip(model["w"].tolist(), error.tolist(), strict=True):
        expected.append(float(np.float32(p) + np.float32(np.float64(np.float32(e) / largest) * half_unit(p, dtype))))
    assert_same_bits(found["w"], torch.tensor(expected), "w")
    units = torch.tensor([half_unit(p, dtype) for p in model["w"].tolist()], dtype=torch.float64)
    rounding = torch.finfo(torch.float32).eps * master.abs() + 2.0**-148
    assert ((found["w"].double() - master.double()).abs() <= units / (2 * largest) + rounding).all()
    off_before = (model["w"].detach().double() - master.double()).abs().sum()
    assert (found["w"].double() - master.double()).abs().sum() < off_before / 100


@pytest.mark.parametrize("bits", [24, 32])
def test_lion_goes_on_with_master_weights_and_8_bits(bits: int) -> None:
    """The master weights are those that were found, and their rounded halves the parameters; momenta are rounded to
    Lion's own codes, 3 % apart and less."""
    model = model_of()
    saved = flash(model, in_8_bits, bits)
    optimizer = Lion(model.named_parameters(), lr=1.0, master_weights=True, momentum_dtype="int8")
    converted, found = convert.from_flashoptim(saved, optimizer)
    optimizer.load_state_dict(converted)
    optimizer.take_master_weights(found)
    for i, (name, p) in enumerate(model.named_parameters()):
        entry = optimizer.state[p]
        assert_same_bits(join(p.detach(), entry["remainder"]), found[name], name)
        m = converted["state"][i]["exp_avg"]
        kept = decode(entry["exp_avg"].flatten(), entry["exp_avg_scale"]).view(m.shape)
        assert (kept - m).abs().max() <= 0.032 * m.abs().max()
        assert (kept.sign() == m.sign()).float().mean() > 0.95
    optimizer.step()


def test_names_order_and_the_decay_by_a_share_of_the_lr() -> None:
    """Parameters are matched by name, whatever their order, and weights have the optimizer's names."""
    model = model_of()
    saved = flash(model, in_8_bits, 32)
    names = [name for name, _ in model.named_parameters()]
    saved["param_groups"][0]["param_names"] = names
    backwards = [("module." + name, p) for name, p in reversed(list(model.named_parameters()))]
    optimizer = Lion(backwards, lr=1.0)
    converted, found = convert.from_flashoptim(saved, optimizer, decouple_lr=True)
    straight, expected = convert.from_flashoptim(saved, Lion(model.named_parameters()))
    assert {name.removeprefix("module.") for name in found} == expected.keys() == set(names)
    for name in names:
        assert_same_bits(found["module." + name], expected[name], name)
    optimizer.load_state_dict(converted)
    for i, p in enumerate(model.parameters()):
        assert_same_bits(optimizer.state[p]["exp_avg"], straight["state"][i]["exp_avg"], names[i])
    group = optimizer.param_groups[0]
    assert (group["decoupled_weight_decay"], group["init_lr"], group["weight_decay"]) == (True, 6e-4, 0.1)


def test_without_errors_and_without_codes() -> None:
    """master_weight_bits=None and quantize=False; and a parameter that had no gradient has no state."""
    model = model_of()
    saved = flash(model, plain, None)
    del saved["state"][1]
    converted, found = convert.from_flashoptim(saved, Lion(model.named_parameters()))
    assert found == {}
    assert converted["state"].keys() == {0, 2, 3}
    assert converted["state"][0]["exp_avg"] is saved["state"][0]["exp_avg"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"exp_avg_sq": torch.zeros(7, 5)}, "parameter 0 has no state of FlashLion"),
        ({"exp_avg": torch.zeros(7, 5)}, "parameter 0 has no state of FlashLion"),
        ({"exp_avg::scales": None}, "exp_avg::scales of parameter 0 is a NoneType"),
        ({"exp_avg::quantized": torch.zeros(5, 7, dtype=torch.int8)}, r"has shape \(5, 7\); expected \(7, 5\)"),
        ({"exp_avg::quantized": torch.zeros(7, 5)}, "codes in torch.float32"),
        ({"exp_avg::quantized": torch.zeros(7, 1, dtype=torch.int8).expand(7, 5)}, "expected a dense tensor"),
        ({"exp_avg::scales": torch.zeros(3).half()}, "2 scales in float16"),
        ({"exp_avg::scales": torch.zeros(2)}, "2 scales in float16"),
        ({"exp_avg::scales": torch.tensor([1.0, -1.0]).half()}, "negative or not finite"),
        ({"exp_avg::scales": torch.tensor([1.0, torch.inf]).half()}, "negative or not finite"),
        ({"error_bits": torch.zeros(35, dtype=torch.int8)}, r"error_bits of parameter 0 has shape \(35,\)"),
        ({"error_bits": torch.zeros(7, 5, dtype=torch.int16)}, "error_bits of parameter 0 is torch.int16"),
        ({"error_bits": torch.full((7, 5), 0.5, dtype=BF16)}, "no integers from -127 to 127"),
        ({"error_bits": torch.full((7, 5), -128, dtype=torch.int8)}, "no integers from -127 to 127"),
        ({"error_bits": torch.full((7, 5), torch.nan, dtype=BF16)}, "no integers from -127 to 127"),
    ],
)
def test_damaged_states(change: dict[str, Any], message: str) -> None:
    model = model_of()
    saved = flash(model, in_8_bits, 24)
    saved["state"][0].update(change)
    with pytest.raises(ValueError, match=message):
        convert.from_flashoptim(saved, Lion(model.named_parameters()))


def test_what_does_not_fit() -> None:
    model = model_of()
    saved = flash(model, in_8_bits, 24)
    saved["param_groups"][0]["master_bytewidth"] = 2
    with pytest.raises(ValueError, match="master_bytewidth 2; expected 3 or 4"):
        convert.from_flashoptim(saved, Lion(model.named_parameters()))
    saved["param_groups"][0]["master_bytewidth"] = 3
    with pytest.raises(ValueError, match=r"no names of its parameters: make it from model\.named_parameters\(\)"):
        convert.from_flashoptim(saved, Lion(model.parameters()))
    with pytest.raises(ValueError, match=r"parameter 0 of the optimizer is torch\.float32"):
        convert.from_flashoptim(saved, Lion(model.float().named_parameters()))
    with pytest.raises(ValueError, match="groups of sizes"):
        convert.from_flashoptim(saved, Lion([model.get_parameter("0.weight")]))
    del saved["param_groups"][0]["initial_lr"]
    with pytest.raises(ValueError, match="parameter group 0 has initial_lr None"):
        convert.from_flashoptim(saved, Lion(model.named_parameters()), decouple_lr=True)
