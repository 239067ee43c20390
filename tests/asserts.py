"""Assertions that several test modules share.

Equality is of bits: Lion stores NaN in one canonical form a dtype, so two results are the same exactly where all
their bits are. -0.0 differs from 0.0, and one NaN from another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict

from lion_dist import Lion, ShardedLion
from lion_dist.hyper_values import to_dtype
from lion_dist.update.reference import NAN_BITS
from lion_dist.update.segments import StepTensors
from lion_dist.update.state import EXP_AVG

if TYPE_CHECKING:
    from tests.scenarios.fsdp_toy import Twin


def bits(t: Tensor) -> Tensor:
    """A copy of t's bit patterns as integers, in t's shape."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]
    return t.detach().clone(memory_format=torch.contiguous_format).view(integer)


def assert_same_bits(got: Tensor, expected: Tensor, what: str = "") -> None:
    """Fails with the first few elements that differ."""
    assert got.shape == expected.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    assert got.dtype == expected.dtype, f"{what}: dtype {got.dtype}, expected {expected.dtype}"
    differ = (bits(got) != bits(expected)).reshape(-1)
    if differ.any():
        where = differ.nonzero().reshape(-1)
        lines = [
            f"  [{i}] got {got.reshape(-1)[i].item()!r}, expected {expected.reshape(-1)[i].item()!r}" for i in where[:8]
        ]
        raise AssertionError(f"{what}: {len(where)} of {got.numel()} elements differ\n" + "\n".join(lines))


def assert_canonical_nan(t: Tensor, where: Tensor, what: str = "") -> None:
    """Fails unless t is NaN exactly at ``where`` (bool, t's shape), in the bits that t's dtype stores."""
    assert torch.equal(t.isnan(), where), f"{what}: NaN in the wrong places"
    expected = torch.full_like(bits(t)[where], NAN_BITS[t.dtype][1])
    assert torch.equal(bits(t)[where], expected), f"{what}: NaN bits {[hex(b) for b in bits(t)[where].unique()]}"


def assert_same_tensors(got: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    assert got.keys() == expected.keys(), f"{what}: {sorted(got.keys() ^ expected.keys())}"
    for name, t in expected.items():
        assert_same_bits(got[name], t, f"{what}: {name}")


def full_states(model: nn.Module, optimizer: Lion) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(parameters, momenta) whole, on every rank, by plain name: what torch's state dicts make of them."""
    options = StateDictOptions(full_state_dict=True)
    weights: Any = get_model_state_dict(model, options=options)
    momenta: Any = get_optimizer_state_dict(model, optimizer, options=options)["state"]
    return weights, {name: entry["exp_avg"] for name, entry in momenta.items()}


def assert_same_as(twin: Twin, model: nn.Module, optimizer: Lion, what: str) -> None:
    weights, momenta = full_states(model, optimizer)
    assert set(momenta) == {name for name, p in twin.model.named_parameters() if p.requires_grad}, what
    for name, p in twin.model.named_parameters():
        assert_same_bits(weights[name], p.detach(), f"{what}: {name}")
        if p.requires_grad:
            assert_same_bits(momenta[name], twin.optimizer.state[p]["exp_avg"], f"{what}: momentum of {name}")


def assert_unmoved(params: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
    for p, w in zip(params, weights, strict=True):
        assert_same_bits(p, w, "not stepped")


def assert_same_model(got: nn.Module, expected: nn.Module) -> None:
    for name, p in expected.named_parameters():
        assert_same_bits(got.get_parameter(name), p, name)


def momentum_parts(optimizer: ShardedLion) -> list[Tensor]:
    """This rank's parts of the momenta, which are views of them."""
    params = [p for group in optimizer.param_groups for p in group["params"] if p in optimizer.state]
    return [part for p in params for part in optimizer.state[p]["exp_avg"].parts]


def assert_same_momentum(got: dict, expected: Lion) -> None:
    params = [p for group in expected.param_groups for p in group["params"]]
    for i, p in enumerate(params):
        if p in expected.state:
            assert_same_bits(got["state"][i]["exp_avg"], expected.state[p]["exp_avg"].cpu(), f"exp_avg {i}")
        else:
            assert i not in got["state"]


def _names(group: dict[str, Any]) -> list[Any] | None:
    names = group.get("param_names")
    return list(names) if isinstance(names, (list, tuple)) else None


def assert_loaded(optimizer: torch.optim.Optimizer, given: Any, momentum_of: Callable[[Tensor], Tensor | None]) -> None:
    """Asserts that an optimizer has what a state_dict says, found again by a few lines of its own: by name where both
    have names, else by position. ``momentum_of`` a parameter: whole, None where it has none."""
    saved_groups, live_groups = given["param_groups"], optimizer.param_groups
    by_name = all(_names(g) for g in saved_groups) and all(_names(g) for g in live_groups)
    place = {name: (g, i) for g in saved_groups for name, i in zip(_names(g) or (), g["params"], strict=False)}
    for number, live in enumerate(live_groups):
        for j, p in enumerate(live["params"]):
            group = saved_groups[number]
            group, i = place[live["param_names"][j]] if by_name else (group, group["params"][j])
            saved = given["state"].get(i, {}).get("exp_avg")
            own = momentum_of(p)
            if saved is None:
                assert own is None or not own.any(), (number, j)
            else:
                assert own is not None, (number, j)
                dtype = to_dtype(group.get("momentum_dtype", live["momentum_dtype"]))
                if dtype == torch.int8:  # whether momenta have 8 bits is the optimizer's own, and here they have not
                    dtype = to_dtype(live["momentum_dtype"])
                    assert dtype != torch.int8
                dtype = dtype or saved.dtype
                assert_same_bits(own.detach().cpu(), saved.detach().to(dtype), f"group {number}, parameter {j}")
        for key in ("lr", "weight_decay"):
            if key in group:
                assert float(live[key]) == float(group[key]), key
        if "betas" in group:
            assert tuple(live["betas"]) == tuple(map(float, group["betas"]))


def assert_same_step(got: StepTensors, expected: StepTensors) -> None:
    for i, (p, other) in enumerate(zip(got.params, expected.params, strict=True)):
        assert_same_bits(p, other, f"parameter {i}")
        assert_same_bits(got.state_of(i)[EXP_AVG], expected.state_of(i)[EXP_AVG], f"momentum {i}")


def assert_same_params(got: list[nn.Parameter], expected: list[nn.Parameter]) -> None:
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert_same_bits(a.detach(), b.detach(), f"parameter {i}")


def assert_same_momenta(got: Lion, expected: Lion) -> None:
    pairs = [
        (a, b)
        for g, h in zip(got.param_groups, expected.param_groups, strict=True)
        for a, b in zip(g["params"], h["params"], strict=True)
    ]
    for a, b in pairs:
        assert_same_bits(got.state[a]["exp_avg"], expected.state[b]["exp_avg"], "momentum")
