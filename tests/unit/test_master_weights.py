"""Master weights on one device: the bits of a float32 run, weights taken from float32 tensors, and weights that other
code changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lion_dist import Lion
from lion_dist.update.codecs import join
from tests.asserts import assert_same_bits
from tests.marks import needs_interpreter
from tests.scenarios.precision import BF16, F32, I16, gradient_of, rounded_half_away, weights_of

SHAPES = {"matrix": (13, 7), "row": (1, 129), "gain": (127,), "scalar": (), "empty": (0, 3), "kernel": (4, 3, 3, 5)}
LR = 3e-4


def parameters(dtype: torch.dtype) -> dict[str, nn.Parameter]:
    named = {
        name: nn.Parameter(rounded_half_away(w) if dtype == BF16 else w)
        for name, w in ((name, weights_of(shape, i)) for i, (name, shape) in enumerate(SHAPES.items()))
    }
    kernel = named["kernel"].detach().to(memory_format=torch.channels_last)
    return {**named, "kernel": nn.Parameter(kernel)}


def lion(named: dict[str, nn.Parameter], **options: Any) -> Lion:
    """Two groups, of which one decays."""
    decays = {"matrix", "row", "kernel"}
    groups = [
        {"params": [(n, p) for n, p in named.items() if n in decays], "weight_decay": 0.3},
        {"params": [(n, p) for n, p in named.items() if n not in decays], "lr": 1e-3, "maximize": True},
    ]
    return Lion(groups, lr=LR, **options)


def feed(named: dict[str, nn.Parameter], step: int) -> None:
    for i, p in enumerate(named.values()):
        p.grad = gradient_of(tuple(p.shape), i, step).to(p.dtype)


def assert_same_weights(optimizer: Lion, named: dict[str, nn.Parameter], expected: dict[str, nn.Parameter]) -> None:
    for name, p in named.items():
        assert_same_bits(p.detach(), rounded_half_away(expected[name]), name)
        whole = join(p.detach(), optimizer.state[p]["remainder"])
        assert_same_bits(whole, expected[name].detach(), f"{name}, master weight")


@pytest.mark.parametrize("momentum", [BF16, F32, "int8"], ids=str)
@pytest.mark.parametrize("steps", [62, pytest.param(200, marks=pytest.mark.exhaustive)])
def test_the_weights_of_a_float32_run_rounded_half_away(steps: int, momentum: torch.dtype | str) -> None:
    named, expected = parameters(BF16), parameters(F32)
    optimizer = lion(named, master_weights=True, momentum_dtype=momentum)
    optimizer.take_master_weights(expected)
    reference = lion(expected, momentum_dtype=momentum)
    assert_same_weights(optimizer, named, expected)
    for step in range(steps):
        for params in (named, expected):
            feed(params, step)
        optimizer.step()
        reference.step()
    assert_same_weights(optimizer, named, expected)
    assert named["matrix"].isnan().any()
    assert not torch.equal(named["row"], expected["row"].to(BF16)), "no tie that torch's rounding would have changed"


def test_without_a_remainder_the_weights_are_those_of_bfloat16() -> None:
    """A first step starts from the bfloat16 weights themselves."""
    named = parameters(BF16)
    optimizer = lion(named, master_weights=True)
    expected = {name: nn.Parameter(p.detach().float()) for name, p in named.items()}
    reference = lion(expected, momentum_dtype=BF16)
    for step in range(5):
        for params in (named, expected):
            feed(params, step)
        optimizer.step()
        reference.step()
    assert_same_weights(optimizer, named, expected)


WRAPPED: list[Callable[[str], str]] = [str, "module.{}".format, "_orig_mod.module.{}".format]


@pytest.mark.parametrize("rename", WRAPPED)
@pytest.mark.parametrize("pairs", [False, True])
def test_names_may_be_those_of_a_wrapped_model(rename: Callable[[str], str], pairs: bool) -> None:
    named, weights = parameters(BF16), parameters(F32)
    optimizer = lion(named, master_weights=True)
    given: Any = {rename(name): w for name, w in weights.items()}
    optimizer.take_master_weights(iter(given.items()) if pairs else given)
    assert_same_weights(optimizer, named, weights)


def test_what_is_not_listed_stays() -> None:
    named, weights = parameters(BF16), parameters(F32)
    optimizer = lion(named, master_weights=True)
    feed(named, 0)
    optimizer.step()
    before = {name: join(p.detach(), optimizer.state[p]["remainder"]) for name, p in named.items()}
    momenta = {name: optimizer.state[p]["exp_avg"].clone() for name, p in named.items()}
    optimizer.take_master_weights({"gain": weights["gain"]})
    for name, p in named.items():
        now = join(p.detach(), optimizer.state[p]["remainder"])
        assert_same_bits(now, weights[name].detach() if name == "gain" else before[name], name)
        assert_same_bits(optimizer.state[p]["exp_avg"], momenta[name], f"momentum of {name}")


def test_float32_and_frozen_parameters() -> None:
    named: dict[str, nn.Parameter] = {name: nn.Parameter(torch.zeros(9, dtype=BF16)) for name in ("a", "frozen")}
    named["whole"] = nn.Parameter(torch.zeros(9))
    named["frozen"].requires_grad_(False)
    weights = {name: weights_of((9,), i) for i, name in enumerate(named)}
    optimizer = Lion(named.items(), master_weights=True)
    optimizer.take_master_weights(weights)
    assert_same_bits(named["whole"].detach(), weights["whole"])
    assert_same_bits(named["frozen"].detach(), rounded_half_away(weights["frozen"]))
    assert_same_bits(join(named["a"].detach(), optimizer.state[named["a"]]["remainder"]), weights["a"])
    assert set(optimizer.state[named["whole"]]) == {"exp_avg"}
    assert named["frozen"] not in optimizer.state


def of_dtypes() -> dict[str, nn.Parameter]:
    named = {name: nn.Parameter(torch.ones(3, 4, dtype=BF16)) for name in ("a", "b", "plain")}
    return {**named, "half": nn.Parameter(torch.ones(3, 4, dtype=torch.float16))}


GOOD = torch.full((3, 4), 0.3)
BAD: list[tuple[Any, type[Exception], str]] = [
    ({"a": GOOD, "c": GOOD}, ValueError, r"no parameters called \['c'\] \(1 in all\): give only its parameters"),
    ({"a": GOOD, "b": GOOD[:2]}, ValueError, r"b has shape \(2, 4\); expected \(3, 4\)"),
    ({"a": GOOD, "b": GOOD.to(BF16)}, TypeError, r"b is torch.strided bfloat16; expected strided float32"),
    ({"a": GOOD, "b": GOOD.double()}, TypeError, r"b is torch.strided float64; expected strided float32"),
    ({"a": GOOD, "b": GOOD.to("meta")}, TypeError, r"b is torch.strided float32 on meta; expected"),
    ({"a": GOOD, "b": GOOD.to_sparse()}, TypeError, r"b is torch.sparse_coo float32; expected"),
    ({"a": GOOD, "b": [0.5]}, TypeError, r"'b' must be a float32 tensor, got"),
    ({"a": GOOD, "plain": GOOD}, TypeError, r"plain is a bfloat16 parameter without a master weight.*leave it out"),
    ({"a": GOOD, "half": GOOD}, TypeError, r"half is a float16 parameter without a master weight"),
    ([("a", GOOD), ("a", GOOD)], ValueError, r"what was given has several parameters called 'a'"),
    ([("a", GOOD), ("module.a", GOOD)], ValueError, r"what was given has several parameters called 'a'"),
    ([("a", GOOD), GOOD], TypeError, r"expected pairs of a name and a float32 tensor, got a Tensor"),
    (GOOD, TypeError, r"expected names and float32 tensors, .* got a tensor"),
]


@pytest.mark.parametrize(("given", "error", "message"), BAD, ids=[message[:24] for _, _, message in BAD])
def test_what_does_not_fit_changes_nothing(given: Any, error: type[Exception], message: str) -> None:
    named = of_dtypes()
    groups: list[dict[str, Any]] = [
        {"params": [(n, named[n]) for n in ("a", "b")]},
        {"params": [(n, named[n]) for n in ("plain", "half")], "master_weights": False},
    ]
    optimizer = Lion(groups, master_weights=True)
    with pytest.raises(error, match=message):
        optimizer.take_master_weights(given)
    assert not optimizer.state
    for name, p in named.items():
        assert_same_bits(p.detach(), torch.ones_like(p), name)


@pytest.mark.parametrize("given", [{}, {"a": GOOD}])
def test_names_are_needed(given: dict[str, Tensor]) -> None:
    optimizer = Lion(of_dtypes().values(), master_weights=False)
    with pytest.raises(ValueError, match=r"has no names of its parameters: make it from model.named_parameters\(\)"):
        optimizer.take_master_weights(given)


# Weights that other code changes ----------------------------------------------------------------------


def swapped(named: dict[str, nn.Parameter], values: Iterable[Tensor]) -> None:
    for p, value in zip(named.values(), values, strict=True):
        p.data = value.clone()


def copied(named: dict[str, nn.Parameter], values: Iterable[Tensor]) -> None:
    with torch.no_grad():
        for p, value in zip(named.values(), values, strict=True):
            p.copy_(value)


def loaded(named: dict[str, nn.Parameter], values: Iterable[Tensor]) -> None:
    module = nn.Module()
    for name, p in named.items():
        module.register_parameter(name, p)
    module.load_state_dict(dict(zip(named, values, strict=True)))


@pytest.mark.parametrize("change", [swapped, copied, loaded])
def test_an_average_of_weights_swapped_in_and_out_leaves_the_run_as_it_was(change: Callable[..., None]) -> None:
    named, other = parameters(BF16), parameters(BF16)
    optimizer, undisturbed = (lion(params, master_weights=True) for params in (named, other))
    for step in range(6):
        for params in (named, other):
            feed(params, step)
        optimizer.step()
        undisturbed.step()
        own = [p.detach().clone() for p in named.values()]
        change(named, [(0.5 * p).detach() for p in named.values()])
        change(named, own)
    for name, p in named.items():
        assert_same_bits(p.detach(), other[name].detach(), name)
        assert_same_bits(optimizer.state[p]["remainder"], undisturbed.state[other[name]]["remainder"], name)


@pytest.mark.parametrize("change", [swapped, copied, loaded])
def test_new_weights_keep_a_remainder_of_at_most_half_a_unit(change: Callable[..., None]) -> None:
    named = {"a": nn.Parameter(rounded_half_away(weights_of((40, 7), 3)))}
    optimizer = Lion(named.items(), lr=LR, master_weights=True)
    feed(named, 0)
    optimizer.step()
    r = optimizer.state[named["a"]]["remainder"].clone()
    values = torch.randn(40, 7, generator=torch.Generator().manual_seed(4)).to(BF16)
    values[::3] = 0.0
    values[::6] = -0.0
    change(named, [values])
    whole = join(named["a"].detach(), optimizer.state[named["a"]]["remainder"])
    assert_same_bits(optimizer.state[named["a"]]["remainder"], r)
    assert r.dtype == I16
    assert r.any()
    assert not whole.isnan().any()
    # A bfloat16 unit is 2**-7 of the power of two below a number; twice as much where the number is such a power.
    assert ((whole - values.float()).abs() <= values.float().abs() * 2.0**-8 + (values == 0) * 2.0**-130).all()
    named["a"].grad = torch.zeros_like(named["a"])
    optimizer.step()
    assert not named["a"].isnan().any()


@pytest.mark.parametrize("use_triton", [False, pytest.param(True, marks=needs_interpreter)])
def test_parameters_that_gain_or_lose_their_remainder(use_triton: bool) -> None:
    """The dtype decides: bfloat16 has one, float32 has none, and float16 is refused."""
    p = nn.Parameter(torch.ones(130))
    optimizer = Lion([p], lr=2.0**-12, use_triton=use_triton, master_weights=True)

    def train(dtype: torch.dtype, steps: int) -> None:
        p.grad = None
        p.data = p.data.to(dtype)
        p.grad = torch.ones_like(p)
        for _ in range(steps):
            optimizer.step()

    train(F32, 4)
    assert p.unique().tolist() == [1 - 2.0**-10]
    train(BF16, 4)  # from 1.0, to which that rounds
    assert join(p.detach(), optimizer.state[p]["remainder"]).unique().tolist() == [1 - 2.0**-10]
    train(F32, 4)
    assert p.unique().tolist() == [1 - 2.0**-10]
    with pytest.raises(TypeError, match=r"master_weights=True.*float16"):
        train(torch.float16, 1)
