"""State_dicts with 8-bit momenta and remainders on one device: nothing is lost, forms are converted, and damaged ones
are refused with nothing changed."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from lion_dist import Lion
from lion_dist.momentum_codes import decoded, encoded
from lion_dist.param_groups import keep_storage
from lion_dist.update.codecs import join
from tests.asserts import assert_same_bits
from tests.scenarios.precision import BF16, F32, I8, I16, gradient_of, weights_of

SHAPES = {"matrix": (31, 9), "gain": (127,), "scalar": (), "empty": (0,), "kernel": (4, 3, 3, 5), "flipped": (20, 13)}


class Model(nn.Module):
    """Parameters of many shapes, and of two other memory orders where ``strided``."""

    def __init__(self, dtype: torch.dtype = BF16, strided: bool = True) -> None:
        super().__init__()
        for i, (name, shape) in enumerate(SHAPES.items()):
            w = torch.randn(shape, generator=torch.Generator().manual_seed(i)).to(dtype)
            if strided and name == "kernel":
                w = w.to(memory_format=torch.channels_last)
            if strided and name == "flipped":
                w = w.t().contiguous().t()
            self.register_parameter(name, nn.Parameter(w))

    def feed(self, step: int) -> None:
        for i, p in enumerate(self.parameters()):
            p.grad = gradient_of(tuple(p.shape), i, step).to(p.dtype)


def trained(steps: int = 4, dtype: torch.dtype = BF16, strided: bool = True, **options: Any) -> tuple[Model, Lion]:
    model = Model(dtype, strided)
    optimizer = Lion(model.named_parameters(), lr=1e-3, weight_decay=0.1, **options)
    for step in range(steps):
        model.feed(step)
        optimizer.step()
    return model, optimizer


def assert_same_run(got: tuple[Model, Lion], expected: tuple[Model, Lion], what: str = "") -> None:
    """The same state, and the same bits after two more steps."""
    for step in (None, 50, 51):
        for (name, p), q in zip(got[0].named_parameters(), expected[0].parameters(), strict=True):
            assert_same_bits(p.detach(), q.detach(), f"{what} {name}")
            own, other = got[1].state[p], expected[1].state[q]
            assert own.keys() == other.keys()
            for key, t in other.items():
                assert_same_bits(own[key], t, f"{what} {key} of {name}")
                assert own[key].stride() == t.stride(), f"{what} {key} of {name}"
        for model, optimizer in (got, expected) if step else ():
            model.feed(step or 0)
            optimizer.step()


def loaded_into(saved: dict[str, Any], weights: Model, **options: Any) -> tuple[Model, Lion]:
    model, optimizer = trained(0, **options)
    model.load_state_dict(weights.state_dict())
    optimizer.load_state_dict(saved)
    return model, optimizer


BOTH: dict[str, Any] = {"momentum_dtype": "int8", "master_weights": True}


def through_file(saved: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return dict(torch.load(file, weights_only=True))


@pytest.mark.parametrize("door", [dict, copy.deepcopy, through_file])
@pytest.mark.parametrize("options", [BOTH, {"master_weights": True}, {"momentum_dtype": I8}], ids=str)
def test_a_state_dict_brings_every_bit(options: dict[str, Any], door: Callable[..., dict[str, Any]]) -> None:
    model, optimizer = trained(**options)
    saved = door(optimizer.state_dict())
    other = loaded_into(saved, model, **options)
    assert other[1].param_groups[0]["rounding_step"] == (4 if "momentum_dtype" in options else 0)
    assert_same_run(other, (model, optimizer))


def test_the_dtypes_of_the_state_are_kept() -> None:
    model, optimizer = trained(**BOTH)
    other, loaded = loaded_into(optimizer.state_dict(), model, **BOTH)
    for p in other.parameters():
        entry = loaded.state[p]
        assert {key: t.dtype for key, t in entry.items()} == {"exp_avg": I8, "exp_avg_scale": F32, "remainder": I16}
        assert entry["exp_avg_scale"].shape == (-(-p.numel() // 128),)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_and_pickles(copied: Callable[[Any], Any]) -> None:
    pair = trained(**BOTH)
    other = copied(pair)
    assert other[1].param_groups[0]["rounding_step"] == 4
    assert_same_run(other, pair)


OPTIONS = [StateDictOptions(), StateDictOptions(flatten_optimizer_state_dict=True), StateDictOptions(cpu_offload=True)]


@pytest.mark.parametrize("options", OPTIONS, ids=["nested", "flattened", "offloaded"])
def test_torchs_own_functions(options: StateDictOptions) -> None:
    model, optimizer = trained(**BOTH)
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    other, loaded = trained(0, **BOTH)
    other.load_state_dict(model.state_dict())
    set_optimizer_state_dict(other, loaded, saved, options=options)
    assert_same_run((other, loaded), (model, optimizer))


def test_asking_for_a_state_before_the_first_step_moves_nothing() -> None:
    """torch makes a step with lr 0 and gradients of zeros then."""
    model, optimizer = trained(0, **BOTH)
    weights = {name: weights_of(tuple(p.shape), 1) for name, p in model.named_parameters()}
    optimizer.take_master_weights(weights)
    fresh = Lion(model.named_parameters(), **BOTH)
    for one in (optimizer, fresh):
        remainders = [one.state[p]["remainder"].clone() for p in model.parameters() if p in one.state]
        get_optimizer_state_dict(model, one)
        for p, r in zip(model.parameters(), remainders, strict=False):
            assert_same_bits(one.state[p]["remainder"], r)
    for name, p in model.named_parameters():
        assert_same_bits(join(p.detach(), optimizer.state[p]["remainder"]), weights[name], name)
        assert not fresh.state[p]["remainder"].any()


# Conversions ------------------------------------------------------------------------------------------


def momenta(model: Model, optimizer: Lion) -> dict[str, Tensor]:
    """In float32."""
    return {
        name: decoded(entry["exp_avg"], entry["exp_avg_scale"], p)
        if (entry := optimizer.state[p])["exp_avg"].dtype == I8
        else entry["exp_avg"].float()
        for name, p in model.named_parameters()
    }


@pytest.mark.parametrize("strided", [True, False], ids=["the same memory order", "another memory order"])
@pytest.mark.parametrize("asked", [None, F32, BF16], ids=str)
def test_codes_become_numbers(asked: torch.dtype | None, strided: bool) -> None:
    model, optimizer = trained(momentum_dtype="int8")
    other, loaded = loaded_into(optimizer.state_dict(), model, momentum_dtype=asked, strided=strided)
    assert loaded.param_groups[0]["momentum_dtype"] == asked
    for name, expected in momenta(model, optimizer).items():
        entry = loaded.state[other.get_parameter(name)]
        assert entry.keys() == {"exp_avg"}
        assert_same_bits(entry["exp_avg"], expected.to(asked or BF16), name)


@pytest.mark.parametrize("saved", [F32, BF16, torch.float16], ids=str)
def test_numbers_become_codes_and_come_back_as_they_were(saved: torch.dtype) -> None:
    model, optimizer = trained(momentum_dtype=saved)
    eight = loaded_into(optimizer.state_dict(), model, momentum_dtype="int8")
    assert eight[1].param_groups[0]["momentum_dtype"] == I8
    numbers, codes = momenta(model, optimizer), momenta(*eight)
    for name, m in numbers.items():
        p = eight[0].get_parameter(name)
        entry = eight[1].state[p]
        found, scale = encoded(m, p)
        assert_same_bits(entry["exp_avg"], found, name)
        assert_same_bits(entry["exp_avg_scale"], scale, name)
        assert ((codes[name] - m).abs() <= 0.04 * m.abs() + m[~m.isnan()].abs().amax() / 3000 if m.numel() else m).all()
    back = loaded_into(eight[1].state_dict(), model, momentum_dtype=F32)
    again = loaded_into(back[1].state_dict(), model, momentum_dtype="int8")
    assert_same_run(again, eight)


def test_codes_of_another_memory_order_are_laid_out_anew() -> None:
    model, optimizer = trained(momentum_dtype="int8")
    other, loaded = loaded_into(optimizer.state_dict(), model, momentum_dtype="int8", strided=False)
    for name, m in momenta(model, optimizer).items():
        p = other.get_parameter(name)
        codes, scale = encoded(m.contiguous(), p)
        assert_same_bits(loaded.state[p]["exp_avg"], codes, name)
        assert_same_bits(loaded.state[p]["exp_avg_scale"], scale, name)
        assert loaded.state[p]["exp_avg"].is_contiguous()


@pytest.mark.parametrize("factor", [1.0, 0.25])
@pytest.mark.parametrize("asked", ["int8", None, F32], ids=str)
def test_numbers_with_one_scale(asked: Any, factor: float) -> None:
    """As `Lion` shows momenta under FSDP."""
    model, optimizer = trained(momentum_dtype=F32)
    saved = optimizer.state_dict()
    for entry in saved["state"].values():
        entry["exp_avg_scale"] = torch.tensor(factor)
    saved["param_groups"][0]["momentum_dtype"] = "int8"
    other, loaded = loaded_into(saved, model, momentum_dtype=asked)
    for name, m in momenta(model, optimizer).items():
        p = other.get_parameter(name)
        if asked == "int8":
            assert_same_bits(loaded.state[p]["exp_avg"], encoded(m * factor, p)[0], name)
        else:
            assert loaded.state[p].keys() == {"exp_avg"}
            assert_same_bits(loaded.state[p]["exp_avg"], (m * factor).to(asked or BF16), name)


@pytest.mark.parametrize("kept", [None, BF16, "int8"], ids=str)
def test_which_group_decides(kept: Any) -> None:
    """The loaded one on every number; the live one on master weights, and on 8 bits where the two do not agree."""
    _, optimizer = trained(momentum_dtype=F32)
    saved = optimizer.state_dict()
    saved["param_groups"][0].pop("master_weights")
    saved["param_groups"][0].pop("rounding_step")
    saved["param_groups"][0]["lr"] = 0.5
    _, loaded = trained(2, momentum_dtype=kept, master_weights=True)
    loaded.load_state_dict(saved)
    group = loaded.param_groups[0]
    assert group["master_weights"]
    assert group["lr"] == 0.5
    assert group["momentum_dtype"] == (I8 if kept == "int8" else F32)
    assert group["rounding_step"] == (2 if kept == "int8" else 0)


def test_the_rule_on_groups() -> None:
    live: dict[str, Any] = {"momentum_dtype": I8, "master_weights": False, "rounding_step": 7}
    loaded: dict[str, Any] = {"momentum_dtype": "int8", "master_weights": True, "rounding_step": 3, "lr": 1.0}
    keep_storage(loaded, live)
    assert loaded == {"momentum_dtype": "int8", "master_weights": False, "rounding_step": 3, "lr": 1.0}
    without: dict[str, Any] = {}
    keep_storage(without, live)
    assert without == {"master_weights": False, "rounding_step": 7}
    for saved in (None, "float32"):
        other: dict[str, Any] = {"momentum_dtype": saved}
        keep_storage(other, live)
        assert other["momentum_dtype"] == I8
    with pytest.raises(TypeError, match="momentum_dtype must be None, float32"):
        keep_storage({"momentum_dtype": "int4"}, live)


def test_missing_remainders_are_zeros_and_needless_ones_are_dropped() -> None:
    model, optimizer = trained(momentum_dtype=BF16)
    other, loaded = trained(3, master_weights=True)
    loaded.load_state_dict(optimizer.state_dict())
    other.load_state_dict(model.state_dict())
    other.feed(9)
    loaded.step()
    reference = Lion([nn.Parameter(p.detach().float()) for p in model.parameters()], momentum_dtype=BF16)
    saved = optimizer.state_dict()
    saved["param_groups"][0].pop("param_names")
    reference.load_state_dict(saved)
    for i, p in enumerate(reference.param_groups[0]["params"]):
        p.grad = gradient_of(tuple(p.shape), i, 9).float()
    reference.step()
    for p, q in zip(other.parameters(), reference.param_groups[0]["params"], strict=True):
        assert_same_bits(join(p.detach(), loaded.state[p]["remainder"]), q.detach())

    _, plain = loaded_into(loaded.state_dict(), other)
    assert all(entry.keys() == {"exp_avg"} for entry in plain.state.values())


# What is refused --------------------------------------------------------------------------------------


def damaged(key: str, make: Callable[[Tensor], Any]) -> Callable[[dict[Any, Any]], None]:
    """Changes one value of the state of the second parameter, or takes it away if ``make`` returns None."""

    def change(state: dict[Any, Any]) -> None:
        entry = state[1]
        value = make(entry[key].clone())
        if value is None:
            del entry[key]
        else:
            entry[key] = value

    return change


def filled(value: float) -> Callable[[Tensor], Tensor]:
    return lambda t: t.fill_(value)


SCALE = r"exp_avg_scale of parameter 1 "
REFUSED: list[tuple[str, Callable[[Tensor], Any], str]] = [
    ("exp_avg_scale", filled(-1.0), SCALE + r"has the scale -1.0; expected finite numbers >= 0"),
    ("exp_avg_scale", filled(torch.nan), SCALE + r"has the scale nan; expected finite"),
    ("exp_avg_scale", filled(torch.inf), SCALE + r"has the scale inf; expected finite"),
    ("exp_avg_scale", lambda t: None, r"exp_avg of parameter 1 is int8, but its scales, 'exp_avg_scale', are missing"),
    ("exp_avg_scale", lambda t: t.repeat(2), SCALE + r"is \(2,\) torch.float32; expected a plain tensor of shape \(1,"),
    ("exp_avg_scale", lambda t: t[0], SCALE + r"is \(\) torch.float32; expected a plain tensor of shape \(1,\)"),
    ("exp_avg_scale", lambda t: t.double(), SCALE + r"is \(1,\) torch.float64; expected"),
    ("exp_avg_scale", lambda t: t.to("meta"), SCALE + r"is \(1,\) torch.float32; expected a plain"),
    ("exp_avg_scale", lambda t: 1.0, SCALE + r"is float; expected a plain tensor"),
    ("exp_avg", lambda t: t[:5], r"exp_avg of parameter 1 is \(5,\).*expected shape \(127,\)"),
    ("exp_avg", lambda t: t.short(), r"exp_avg of parameter 1 is int16; expected float32, bfloat16, float16, or int8"),
    ("exp_avg", lambda t: t.float(), SCALE + r"is of shape \(1,\), and its exp_avg is no int8; expected one scale"),
    ("remainder", lambda t: t[:5], r"remainder of parameter 1 is \(5,\) torch.int16.*expected shape \(127,\) in int16"),
    ("remainder", lambda t: t.int(), r"remainder of parameter 1 is \(127,\) torch.int32.*expected .* in int16"),
    ("remainder", lambda t: t.to(BF16), r"remainder of parameter 1 is \(127,\) torch.bfloat16.*in int16"),
    ("remainder", lambda t: t.float() + 0.5, r"remainder of parameter 1 has the number .*\.5; expected int16"),
    ("remainder", lambda t: t.float().fill_(32768), r"has the number 32768.0; expected int16, or integers of 16"),
    ("remainder", lambda t: t.float().fill_(torch.nan), r"has the number nan; expected int16"),
    ("remainder", lambda t: "junk", r"remainder of parameter 1 is str; expected"),
    ("remainder", lambda t: t.to("meta"), r"remainder of parameter 1 is a tensor without memory, on meta"),
]


@pytest.mark.parametrize(("key", "make", "message"), REFUSED, ids=[f"{k}: {m[-24:]}" for k, _, m in REFUSED])
@pytest.mark.parametrize("kept", [BOTH, {"momentum_dtype": F32, "master_weights": True}], ids=["int8", "float32"])
def test_damage_is_refused_by_name(key: str, make: Callable[[Tensor], Any], message: str, kept: dict[str, Any]) -> None:
    _, optimizer = trained(**BOTH)
    saved = copy.deepcopy(optimizer.state_dict())
    damaged(key, make)(saved["state"])
    model, live = trained(2, **kept)
    entries = [live.state[p] for p in model.parameters()]
    before = copy.deepcopy((live.param_groups[0]["rounding_step"], entries))
    with pytest.raises(ValueError, match=message):
        live.load_state_dict(saved)
    assert live.param_groups[0]["rounding_step"] == before[0]
    for i, p in enumerate(model.parameters()):
        for name, t in before[1][i].items():
            assert_same_bits(live.state[p][name], t, name)


def test_a_bad_single_scale_is_refused() -> None:
    _, optimizer = trained(momentum_dtype=F32)
    for scale in (torch.tensor(-1.0), torch.tensor(torch.nan), torch.inf, torch.tensor(1)):
        saved = optimizer.state_dict()
        saved["state"][1] = {**saved["state"][1], "exp_avg_scale": scale}
        _, live = trained(0, momentum_dtype="int8")
        with pytest.raises(ValueError, match=r"exp_avg_scale of parameter 1 is .*; expected (a finite|one scale)"):
            live.load_state_dict(saved)
        assert not live.state


def test_a_remainder_of_float16_weights_is_never_made() -> None:
    """The group of the optimizer decides, so a state_dict with master weights loads into one that has none."""
    _, optimizer = trained(master_weights=True)
    _, live = trained(0, dtype=torch.float16, momentum_dtype=F32)
    live.load_state_dict(optimizer.state_dict())
    assert not live.param_groups[0]["master_weights"]
    assert all(entry.keys() == {"exp_avg"} for entry in live.state.values())
