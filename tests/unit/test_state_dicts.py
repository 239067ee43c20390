"""Whose momentum is whose: state_dicts by name, entries of others in the state, and damaged state_dicts, which are
refused with nothing changed or loaded whole."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lion_dist import Lion, lion
from lion_dist.lion_state import copy_columns
from lion_dist.param_groups import describe_groups
from tests.asserts import assert_loaded, assert_same_bits
from tests.mutations import mutated
from tests.scenarios.lion_params import snapshot

NAMES = ["a.weight", "a.bias", "b.weight", "b.bias", "c.weight"]


def made(groups: Iterable[list[str]], prefix: str = "", named: bool = True, **kwargs: Any) -> tuple[dict, Lion]:
    """Parameters of one shape by name, and a Lion of them in these groups."""
    params = {name: nn.Parameter(torch.zeros(3)) for names in groups for name in names}
    whole = [
        {"params": [(prefix + name, params[name]) if named else params[name] for name in names], "lr": 0.25 / 2**i}
        for i, names in enumerate(groups)
    ]
    return params, Lion(whole, **kwargs)


def trained(groups: Iterable[list[str]], **kwargs: Any) -> tuple[dict, Lion]:
    """Each parameter's momentum is its name's number."""
    params, opt = made(groups, **kwargs)
    for i, name in enumerate(NAMES, 1):
        params[name].grad = torch.full((3,), 2.0**i)
    opt.step()
    return params, opt


def assert_by_name(params: dict[str, Tensor], opt: Lion) -> None:
    _, expected = trained([NAMES])
    for p, name in zip(expected.param_groups[0]["params"], NAMES, strict=True):
        assert_same_bits(opt.state[params[name]]["exp_avg"], expected.state[p]["exp_avg"], name)


# -- Names


@pytest.mark.parametrize("seed", range(4))
def test_layers_and_groups_in_another_order(seed: int) -> None:
    rng = random.Random(seed)
    groups = [["a.weight", "b.weight", "c.weight"], ["a.bias", "b.bias"]]
    _, opt = trained(groups)
    for names in groups:
        rng.shuffle(names)
    rng.shuffle(groups)
    params, other = made(groups)
    saved = opt.state_dict()
    kept = copy.deepcopy(saved)
    other.load_state_dict(saved)
    assert str(saved) == str(kept)
    assert_by_name(params, other)
    for group, names in zip(other.param_groups, groups, strict=True):
        assert group["param_names"] == names
        assert group["params"] == [params[name] for name in names]
        assert group["lr"] == (0.25 if "c.weight" in names else 0.125)  # a group's values go with it
    again = made([["a.weight", "b.weight", "c.weight"], ["a.bias", "b.bias"]])
    again[1].load_state_dict(other.state_dict())
    assert_by_name(*again)


@pytest.mark.parametrize("prefixes", [("module.", ""), ("", "module."), ("_orig_mod.module.", "_orig_mod.")], ids=str)
def test_prefixes_of_wrappers_do_not_count(prefixes: tuple[str, str]) -> None:
    """DistributedDataParallel, torch.compile, FSDP and activation checkpointing do."""
    _, opt = trained([NAMES], prefix=prefixes[0])
    params, other = made([NAMES[::-1]], prefix=prefixes[1])
    other.load_state_dict(opt.state_dict())
    assert_by_name(params, other)
    assert other.param_groups[0]["param_names"] == [prefixes[1] + name for name in NAMES[::-1]]


@pytest.mark.parametrize("named", [(True, False), (False, True), (False, False)], ids=str)
def test_without_names_on_either_side_by_position(named: tuple[bool, bool]) -> None:
    _, opt = trained([NAMES], named=named[0])
    params, other = made([NAMES[::-1]], named=named[1])
    other.load_state_dict(opt.state_dict())
    for name, p in zip(NAMES, opt.param_groups[0]["params"], strict=True):
        there = params[NAMES[::-1][NAMES.index(name)]]
        assert_same_bits(other.state[there]["exp_avg"], opt.state[p]["exp_avg"])
    if named[1]:
        assert other.param_groups[0]["param_names"] == NAMES[::-1]


@pytest.mark.parametrize("names", [None, [None, None], [0, 1], ["a"], [], "ab"], ids=str)
def test_names_of_an_optimizer_that_are_no_names_do_not_count(names: Any) -> None:
    """It loads what it saved, by position, and whatever names another has."""
    params = [nn.Parameter(torch.zeros(3)) for _ in range(2)]
    opt = Lion([{"params": params, "param_names": names}], lr=0.25)
    for i, p in enumerate(params):
        p.grad = torch.full((3,), i + 1.0)
    opt.step()
    saved = copy.deepcopy(opt.state_dict())
    for others in (names, ["b", "a"]):
        saved["param_groups"][0]["param_names"] = others
        for p in params:
            opt.state[p]["exp_avg"].zero_()
        opt.load_state_dict(saved)
        assert opt.param_groups[0]["param_names"] == names
        for i, p in enumerate(params):
            assert_same_bits(opt.state[p]["exp_avg"], saved["state"][i]["exp_avg"])
    assert len(describe_groups(opt.param_groups)) == 3


def test_several_models_with_the_same_names() -> None:
    """Two models of a GAN may share an optimizer: it loads what it saved."""
    params = [nn.Parameter(torch.zeros(3)) for _ in range(2)]
    opt = Lion([{"params": [("weight", p)]} for p in params], lr=0.25)
    for i, p in enumerate(params):
        p.grad = torch.full((3,), i + 1.0)
    opt.step()
    saved = copy.deepcopy(opt.state_dict())
    opt.load_state_dict(saved)
    for i, p in enumerate(params):
        assert_same_bits(opt.state[p]["exp_avg"], saved["state"][i]["exp_avg"])


def rename(old: str, new: str) -> Callable[[dict[str, Any]], None]:
    def edit(saved: dict[str, Any]) -> None:
        for group in saved["param_groups"]:
            group["param_names"] = [new if name == old else name for name in group["param_names"]]

    return edit


def regroup(saved: dict[str, Any]) -> None:
    first, second = saved["param_groups"]
    for key in ("params", "param_names"):
        first[key], second[key] = [*first[key][:1], *second[key][:1], *first[key][2:]], [first[key][1], second[key][1]]


BAD_NAMES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "another name": (rename("b.weight", "z.weight"), r"lacks parameters \['b.weight'\] .* has \['z.weight'\].*delete"),
    "a name twice": (rename("b.weight", "a.weight"), r"state_dict has several parameters called 'a.weight'"),
    "other groups": (
        regroup,
        r"parameter group 0 .* has no counterpart in the state_dict: 'a.bias' is in its group 0 there",
    ),
    "too few": (lambda d: d["param_groups"][0]["param_names"].pop(), "group 0 must be 3 strings"),
    "numbers": (lambda d: d["param_groups"][0].update(param_names=[1, 2, 3]), "group 0 must be 3 strings"),
    "of one group alone": (lambda d: d["param_groups"][1].pop("param_names"), "group 1 has no param_names"),
    "a group less": (lambda d: d["param_groups"].pop(), r"lacks parameters \['a.bias', 'b.bias'\]"),
}


@pytest.mark.parametrize(("edit", "message"), BAD_NAMES.values(), ids=BAD_NAMES.keys())
def test_names_that_do_not_match_are_refused_by_name(edit: Callable[[dict[str, Any]], Any], message: str) -> None:
    groups = [["a.weight", "b.weight", "c.weight"], ["a.bias", "b.bias"]]
    _, opt = trained(groups)
    saved = copy.deepcopy(opt.state_dict())
    edit(saved)
    params, other = trained(groups[::-1])
    before = snapshot(other)
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(saved)
    assert snapshot(other) == before
    assert_by_name(params, other)


def test_set_optimizer_state_dict_has_matched_names_already() -> None:
    """get_ and set_optimizer_state_dict: parameters in this model's order, and their names as they were saved."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    def model(names: str) -> tuple[nn.ModuleDict, Lion]:
        layers = nn.ModuleDict({name: nn.Linear(3, 3, bias=False) for name in names})
        return layers, Lion(layers.named_parameters(), lr=0.25)

    there, opt = model("ab")
    for i, p in enumerate(there.parameters()):
        p.grad = torch.full_like(p, i + 1.0)
    opt.step()
    here, other = model("ba")
    set_optimizer_state_dict(here, other, get_optimizer_state_dict(there, opt))
    for name in "ab":
        p, q = (layers.get_parameter(f"{name}.weight") for layers in (here, there))
        assert_same_bits(other.state[p]["exp_avg"], opt.state[q]["exp_avg"], name)
    assert other.param_groups[0]["param_names"] == ["b.weight", "a.weight"]


# -- Damaged state_dicts


def of_every_kind(named: bool) -> Lion:
    shapes = {"a.weight": (2, 3), "a.bias": (3,), "b.weight": (3, 3), "b.bias": (3,), "scale": ()}
    params = {name: nn.Parameter(torch.ones(shape)) for name, shape in shapes.items()}
    split = [[n for n in shapes if n.endswith("weight")], [n for n in shapes if not n.endswith("weight")]]
    opt = Lion(
        [{"params": [(name, params[name]) if named else params[name] for name in names]} for names in split],
        lr=2.0**-4, weight_decay=0.5, decoupled_weight_decay=named,
    )  # fmt: skip
    feed(opt)
    opt.step()
    opt.state[params["a.bias"]]["slow"] = torch.ones(3)
    state: Any = opt.state
    state["count"] = 3
    return opt


def feed(opt: torch.optim.Optimizer) -> None:
    for p in (p for group in opt.param_groups for p in group["params"]):
        p.grad = torch.ones_like(p)


def load_damaged(seeds: range) -> tuple[int, int]:
    """How many were refused and loaded; every other outcome fails."""
    refused = loaded = 0
    for seed in seeds:
        opt = of_every_kind(named=seed % 2 == 0)
        damaged = mutated(opt.state_dict(), seed)
        before = snapshot(opt)
        try:
            opt.load_state_dict(damaged)
        except (ValueError, TypeError):
            refused += 1
            assert snapshot(opt) == before, seed
            opt.step()
            continue
        except Exception as error:
            raise AssertionError(f"seed {seed}") from error
        loaded += 1
        try:
            assert_loaded(opt, damaged, lambda p: opt.state.get(p, {}).get("exp_avg"))  # noqa: B023
            feed(opt)
            opt.step()
            opt.load_state_dict(opt.state_dict())
            opt.step()
        except Exception as error:
            raise AssertionError(f"seed {seed} was loaded wrong, or failed then") from error
    return refused, loaded


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "seeds", [range(100), pytest.param(range(100, 2600), marks=pytest.mark.exhaustive)], ids=["100", "2500"]
)
def test_damaged_state_dicts_are_refused_whole_or_loaded(seeds: range) -> None:
    refused, loaded = load_damaged(seeds)
    assert min(refused, loaded) > len(seeds) / 10, (refused, loaded)


@pytest.mark.filterwarnings("ignore")
def test_a_wrong_load_of_a_damaged_state_dict_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    copied = copy_columns

    def lost(checked: dict[str, Any], *rest: Any) -> None:
        copied(checked, *rest)
        for entry in checked["state"].values():
            if isinstance(entry, dict) and "exp_avg" in entry:
                entry["exp_avg"].value.zero_()

    monkeypatch.setattr(lion, "copy_columns", lost)
    with pytest.raises(AssertionError, match="was loaded wrong"):
        load_damaged(range(20))


def test_warnings_made_errors_change_nothing_either() -> None:
    opt = of_every_kind(named=False)
    saved = copy.deepcopy(opt.state_dict())
    saved["param_groups"][0].update(lr=0.5, learning_rate=3)
    before = snapshot(opt)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="learning_rate"):
            opt.load_state_dict(saved)
    assert snapshot(opt) == before
