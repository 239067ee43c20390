"""load_state_dict(): entries that other code keeps beside Lion's own."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from lion_dist import Lion
from tests.asserts import assert_same_bits
from tests.scenarios.lion_params import snapshot


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
    state: Any = opt.state
    state["lookahead_step"] = 6
    state["ema"] = {"decay": 0.9, "of": torch.ones(2), "exp_avg": torch.ones(1)}
    return [*params, frozen], opt


def assert_foreign_entries(opt: Lion, params: list[nn.Parameter], slow: list[Tensor]) -> None:
    for p, expected in zip(params, slow, strict=True):
        assert_same_bits(opt.state[p]["lookahead_slow_buff"], expected)
        assert opt.state[p]["step"] == 5
    first, second, third = opt.state[params[0]]["words"]
    assert (first, second["name"], third) == ("a word", "another", ("x", 1, None))
    assert second["ema"].tolist() == [0.5] * 3
    state: Any = opt.state
    assert state["lookahead_step"] == 6
    assert state["ema"]["decay"] == 0.9
    assert state["ema"]["of"].tolist() == [1.0, 1.0]
    assert state["ema"]["exp_avg"].tolist() == [1.0]


@pytest.mark.parametrize("door", ["state_dict", "deepcopy", "pickle", "step"])
def test_entries_of_other_code_are_kept(door: str) -> None:
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
def test_entries_of_another_optimizer_are_refused(entry: Any, message: str) -> None:
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
