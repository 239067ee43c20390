"""Whose momentum is whose: state_dicts by name, entries of others in the state, and damaged state_dicts, which are
refused with nothing changed or loaded whole."""

from __future__ import annotations

import copy
import pickle
import random
import warnings
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from lion_dist import Lion
from lion_dist.param_groups import describe_groups
from tests.bits import assert_same_bits, bits
from tests.mutations import assert_loaded, mutated

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
def test_what_wrappers_put_into_names_does_not_count(prefixes: tuple[str, str]) -> None:
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
    """As the two of a GAN in one optimizer: it loads what it saved."""
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


def test_torchs_door_for_sharded_models_has_matched_names_already() -> None:
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
        assert_same_bits(other.state[here[name].weight]["exp_avg"], opt.state[there[name].weight]["exp_avg"], name)
    assert other.param_groups[0]["param_names"] == ["b.weight", "a.weight"]


# -- Entries of others


def with_foreign_entries() -> tuple[list[nn.Parameter], Lion]:
    params = [nn.Parameter(torch.ones(n)) for n in (3, 2)]
    frozen = nn.Parameter(torch.ones(4, dtype=torch.uint8), requires_grad=False)
    opt = Lion([*params, frozen], lr=0.25)
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    for p in (*params, frozen):
        opt.state[p]["lookahead_slow_buff"] = p.detach().clone()
        opt.state[p]["step"] = torch.tensor(5.0)
    opt.state[params[0]]["words"] = ["a word", {"name": "another", "ema": torch.full((3,), 0.5)}, ("x", 1, None)]
    opt.state["lookahead_step"] = 6
    opt.state["ema"] = {"decay": 0.9, "of": torch.ones(2), "exp_avg": torch.ones(1)}
    return [*params, frozen], opt


def assert_foreign_entries(opt: Lion, params: list[nn.Parameter], slow: list[Tensor]) -> None:
    for p, expected in zip(params, slow, strict=True):
        assert_same_bits(opt.state[p]["lookahead_slow_buff"], expected)
        assert opt.state[p]["step"] == 5
    first, second, third = opt.state[params[0]]["words"]
    assert (first, second["name"], third) == ("a word", "another", ("x", 1, None))
    assert second["ema"].tolist() == [0.5] * 3
    assert opt.state["lookahead_step"] == 6
    assert opt.state["ema"]["decay"] == 0.9
    assert opt.state["ema"]["of"].tolist() == [1.0, 1.0]
    assert opt.state["ema"]["exp_avg"].tolist() == [1.0]


@pytest.mark.parametrize("door", ["state_dict", "deepcopy", "pickle", "step"])
def test_what_is_not_ours_is_kept(door: str) -> None:
    params, opt = with_foreign_entries()
    slow = [opt.state[p]["lookahead_slow_buff"].clone() for p in params]
    momenta = [opt.state[p]["exp_avg"].clone() for p in params[:2]]
    if door == "state_dict":
        source = opt
        saved = opt.state_dict()
        params = [nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad) for p in params]
        opt = Lion(params)
        opt.load_state_dict(saved)
        opt.load_state_dict(opt.state_dict())
        # Neither optimizer's tensors are the other's.
        for i, p in enumerate(params[:2]):
            assert opt.state[p]["lookahead_slow_buff"] is not saved["state"][i]["lookahead_slow_buff"]
        opt.state[params[0]]["words"][1]["ema"].fill_(0.5)
        source.state[source.param_groups[0]["params"][0]]["words"][1]["ema"].fill_(7.0)
    elif door == "deepcopy":
        params, opt = copy.deepcopy((params, opt))
    elif door == "pickle":
        params, opt = pickle.loads(pickle.dumps((params, opt)))
    else:
        entries = [opt.state[p] for p in params]
        for p in params[:2]:
            p.grad = None
        opt.step()
        assert all(opt.state[p] is entry for p, entry in zip(params, entries, strict=True))
    assert_foreign_entries(opt, params, slow)
    for p, momentum in zip(params[:2], momenta, strict=True):
        assert_same_bits(opt.state[p]["exp_avg"], momentum)
    for p in params[:2]:
        p.grad = torch.ones_like(p)
    opt.step()
    assert_foreign_entries(opt, params, slow)


def test_an_entry_before_the_first_step_gets_its_momentum() -> None:
    """A wrapper may keep something from the start: the entry stays its own, and is complete once it is saved."""
    p, frozen = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3), requires_grad=False)
    for saved_first in (False, True):
        opt = Lion([p, frozen], lr=0.25)
        entry = opt.state[p]
        entry["count"] = 0
        opt.state[frozen]["count"] = 1
        if saved_first:
            saved = opt.state_dict()
            assert saved["state"][0]["exp_avg"].tolist() == [0.0] * 3
            opt.load_state_dict(saved)
            entry = opt.state[p]
        p.grad = torch.ones(3)
        opt.step()
        assert opt.state[p] is entry
        assert set(entry) == {"count", "exp_avg"}
        assert set(opt.state[frozen]) == {"count"}
        # Taken out, the momentum begins anew.
        del entry["exp_avg"]
        opt.step()
        assert_same_bits(entry["exp_avg"], torch.full((3,), 1.0 - 0.99))
        p.data.zero_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_foreign_tensors_are_cast_as_torchs_optimizers_cast_them(dtype: torch.dtype) -> None:
    foreign = {
        "ema": torch.tensor([1.001, 2.0, 3.0]), "step": torch.tensor(3.0), "count": torch.tensor(2),
        "mask": torch.tensor([True, False, True]), "nest": {"step": torch.tensor(1.0), "x": [torch.ones(2).half()]},
    }  # fmt: skip
    loaded = []
    for cls in (torch.optim.AdamW, Lion):
        p = nn.Parameter(torch.zeros(3, dtype=dtype))
        opt = cls([p])
        p.grad = torch.ones_like(p)
        opt.step()
        opt.state[p].update(copy.deepcopy(foreign))
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
        loaded.append({key: opt.state[p][key] for key in foreign})
    adam, lion = loaded

    def same(a: Any, b: Any) -> None:
        if isinstance(a, Tensor):
            assert_same_bits(a, b)
        elif isinstance(a, dict):
            assert a.keys() == b.keys()
            for key in a:
                same(a[key], b[key])
        else:
            for x, y in zip(a, b, strict=True):
                same(x, y)

    same(lion, adam)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"exp_avg": torch.zeros(3), "exp_avg_sq": 0}, r"\['exp_avg_sq'\] is not Lion's.*another optimizer"),
        ({"momentum_buffer": torch.zeros(3)}, "another optimizer"),
        ({"exp_avg": torch.zeros(3), "hessian": 1}, "another optimizer"),
        ({"lookahead_slow_buff": torch.zeros(3)}, "Lion's has 'exp_avg'.*frozen when this was saved.*before you unfr"),
        ({"m": torch.zeros(3)}, "Lion's has 'exp_avg'"),
        ({"exp_avg": torch.zeros(3, device="meta")}, "without memory"),
        (None, "is a NoneType"),
        ([("exp_avg", torch.zeros(3))], "is a list"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_another_optimizers_is_refused(entry: Any, message: str) -> None:
    p = nn.Parameter(torch.zeros(3))
    opt = Lion([p])
    p.grad = torch.ones(3)
    opt.step()
    before = snapshot(opt)
    saved = opt.state_dict()
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict({**saved, "state": {0: entry}})
    with pytest.raises(ValueError, match="in none of its groups"):
        opt.load_state_dict({**saved, "state": {1: {"exp_avg": torch.zeros(3)}}})
    by_name = Lion([("a.weight", p)])
    for key, params in (("a.weight", [0]), ("b.weight", ["a.weight"])):
        wrong = {**by_name.state_dict(), "state": {key: {"exp_avg": torch.zeros(3)}}}
        wrong["param_groups"][0]["params"] = params
        with pytest.raises(ValueError, match=f"'{key}', which is in none of its groups"):
            by_name.load_state_dict(wrong)
    with pytest.raises(ValueError, match="hold parameter 0 twice"):
        Lion([p, nn.Parameter(torch.zeros(3))]).load_state_dict(
            {**saved, "param_groups": [{**saved["param_groups"][0], "params": [0, 0]}]}
        )
    assert snapshot(opt) == before


class Pair(NamedTuple):
    first: Any
    second: Any


CONTAINERS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "OrderedDict": (lambda t: OrderedDict(x=t, a=1), lambda c: c["x"]),
    "defaultdict": (lambda t: defaultdict(list, x=t), lambda c: c["x"]),
    "named tuple": (lambda t: Pair([t], "word"), lambda c: c.first[0]),
    "deque": (lambda t: deque([None, {"x": t}], maxlen=5), lambda c: c[1]["x"]),
}


@pytest.mark.parametrize("container", CONTAINERS.values(), ids=CONTAINERS.keys())
def test_foreign_tensors_in_any_container_are_copied_and_cast(
    container: tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]],
) -> None:
    make, tensor_of = container
    p = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    opt = Lion([p])
    p.grad = torch.ones_like(p)
    opt.step()
    opt.state[p]["of a wrapper"] = given = make(torch.tensor([1.001, 2.0, 3.0]))
    other = Lion([q := nn.Parameter(p.detach().clone())])
    other.load_state_dict(opt.state_dict())
    loaded = other.state[q]["of a wrapper"]
    assert type(loaded) is type(given)
    assert len(loaded) == len(given)
    assert_same_bits(tensor_of(loaded), torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16))
    assert tensor_of(given).dtype == torch.float32  # the source has its own still
    assert getattr(loaded, "maxlen", 5) == 5
    assert getattr(loaded, "default_factory", list) is list


# -- Damaged state_dicts


def snapshot(opt: torch.optim.Optimizer) -> str:
    """Everything a failed load might have changed, in bits."""

    def frozen(x: Any) -> Any:
        if isinstance(x, Tensor):
            return x.dtype, x.stride(), x.data_ptr(), bits(x).tolist()
        return {k: frozen(v) for k, v in x.items()} if isinstance(x, dict) else x

    groups = [{k: [id(p) for p in v] if k == "params" else frozen(v) for k, v in g.items()} for g in opt.param_groups]
    params = [p for g in opt.param_groups for p in g["params"]]
    state = [(id(key) if isinstance(key, Tensor) else key, frozen(value)) for key, value in opt.state.items()]
    return str((groups, [frozen(p) for p in params], state, opt.defaults))


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
    opt.state["count"] = 3
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
    copied = Lion._copy_momenta

    def lost(self: Lion, checked: dict[str, Any]) -> None:
        copied(self, checked)
        for entry in checked["state"].values():
            if isinstance(entry, dict) and "exp_avg" in entry:
                entry["exp_avg"].value.zero_()

    monkeypatch.setattr(Lion, "_copy_momenta", lost)
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
