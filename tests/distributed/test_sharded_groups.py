"""ShardedLion's groups and state_dicts: frozen parameters of every kind, names, entries of others, and damaged
state_dicts. What they share with Lion is tested in tests/unit; here, that ranks agree and that nothing hangs."""

from __future__ import annotations

import copy
import warnings
from collections.abc import MutableMapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lion_dist import Lion, ShardedLion
from tests.asserts import assert_loaded, assert_same_bits, bits, momentum_parts
from tests.harness import device_of, run_ranks
from tests.mutations import mutated

SHAPES = {"a.weight": (20, 30), "a.bias": (30,), "b.weight": (20, 30), "b.bias": (30,), "scale": ()}


def strange(device: torch.device, fill: int) -> dict[str, nn.Parameter]:
    """Frozen parameters that cannot be stepped; ``fill`` is in those with memory of their own."""
    tensors = {
        "uint8": torch.full((8, 1), fill, dtype=torch.uint8, device=device),
        "float64": torch.full((3,), fill, dtype=torch.float64, device=device),
        "complex": torch.full((3,), fill, dtype=torch.complex128, device=device),
        "fp8": torch.full((300,), fill, device=device).to(torch.float8_e4m3fn),
        "bool": torch.full((5,), bool(fill), device=device),
        "ordinary": torch.full((4,), float(fill), device=device),
        "sparse": torch.sparse_coo_tensor(torch.tensor([[1]]), torch.ones(1), (3,), check_invariants=True),
        "meta": torch.zeros(3, device="meta"),
        "expanded": torch.full((1,), float(fill), device=device).expand(5),
        "gaps": torch.full((10, 10), float(fill), device=device)[:, :5],
    }
    return {name: nn.Parameter(t, requires_grad=False) for name, t in tensors.items()}


SENT = ("uint8", "float64", "complex", "fp8", "bool", "ordinary")  # as their bytes can be


def feed(params: Any, world_size: int, value: float = 1.0) -> None:
    for p in params:
        p.grad = torch.full_like(p, value)


def check_frozen(stage: int, rank: int, world_size: int, device: torch.device) -> None:
    frozen = strange(device, fill=rank + 1)
    p = nn.Parameter(torch.zeros(300, device=device))
    optimizer = ShardedLion([*frozen.values(), p], lr=0.25, stage=stage)
    first = strange(device, fill=1)
    for name in SENT:
        assert_same_bits(frozen[name].detach().view(torch.uint8), first[name].detach().view(torch.uint8), name)
    assert frozen["gaps"].unique().tolist() == [rank + 1]  # its own still
    for _ in range(2):
        if stage == 2:
            p.sum().backward()
        else:
            feed([p], world_size)
        optimizer.step()
    assert p.tolist() == [-0.5] * 300
    optimizer.check_replicas()
    frozen["uint8"].data[3, 0] += rank
    with pytest.raises(RuntimeError, match=r"parameter 0 on ranks \[1\]"):
        optimizer.check_replicas()
    optimizer.resync()
    optimizer.check_replicas()
    for saved in (optimizer.full_state_dict(), optimizer.state_dict()):
        assert list(saved["state"]) == [len(frozen)]
        optimizer.load_state_dict(saved)
    # A momentum for one that has gaps here: in the run that was saved it was trained.
    gap = list(frozen).index("gaps")
    with pytest.raises(ValueError, match=rf"has state for parameter {gap} \(shape \(10, 5\)\).* cannot shard it"):
        optimizer.load_state_dict({**saved, "state": {**saved["state"], gap: {"exp_avg": torch.zeros(10, 5)}}})
    optimizer.check_replicas()
    later = strange(device, fill=rank + 1)
    optimizer.add_param_group({"params": list(later.values())})
    assert_same_bits(later["fp8"].detach().view(torch.uint8), first["fp8"].detach().view(torch.uint8))
    # What differs on the ranks is named; and what is unfrozen is judged, with nothing changed.
    with pytest.raises(ValueError, match="frozen, a Tensor that is not compared"):
        optimizer.add_param_group({"params": [frozen["gaps"].detach() if rank else torch.zeros(10, device=device)]})
    before = p.detach().clone()
    for name, error, message in (("float64", TypeError, "float64"), ("expanded", ValueError, "share memory")):
        frozen[name].requires_grad_(True)
        with pytest.raises(error, match=message):
            optimizer.step()
        frozen[name].requires_grad_(False)
    assert_same_bits(p.detach(), before)
    # Unfrozen as something that can be stepped, it is made equal, which it never was.
    gaps = frozen["gaps"]
    gaps.data = gaps.data.contiguous()
    gaps.requires_grad_(True)
    if stage == 2:
        (gaps.sum() + p.sum()).backward()
    else:
        feed([gaps, p], world_size)
    optimizer.step()
    assert gaps.unique().tolist() == [0.75]
    optimizer.check_replicas()


def made(order: list[list[str]], device: torch.device, **kwargs: Any) -> tuple[dict[str, nn.Parameter], ShardedLion]:
    params = {name: nn.Parameter(torch.ones(SHAPES[name], device=device)) for names in order for name in names}
    groups = [{"params": [(name, params[name]) for name in names]} for names in order]
    return params, ShardedLion(groups, stage=1, **kwargs)


WEIGHTS, REST = ["a.weight", "b.weight"], ["a.bias", "b.bias", "scale"]


def check_names(world_size: int, device: torch.device) -> None:
    params, optimizer = made([WEIGHTS, REST], device, lr=0.25)
    for i, name in enumerate(SHAPES, 1):
        feed([params[name]], world_size, 2.0**i)
    optimizer.step()
    whole = optimizer.full_state_dict()
    _, other = made([REST[::-1], WEIGHTS[::-1]], device, lr=0.5)
    other.load_state_dict(whole)
    expected = {name: 2.0**i * (1 - 0.99) for i, name in enumerate(SHAPES, 1)}
    momenta = other.full_state_dict()
    names = [*REST[::-1], *WEIGHTS[::-1]]
    for i, name in enumerate(names):
        m = momenta["state"][i]["exp_avg"]
        assert m.flatten()[0].item() == pytest.approx(expected[name], rel=1e-5), name
        assert_same_bits(m, whole["state"][[*WEIGHTS, *REST].index(name)]["exp_avg"], name)
    lion_params = {name: nn.Parameter(torch.ones(SHAPES[name])) for name in SHAPES}
    lion = Lion([{"params": [(f"module.{n}", lion_params[n]) for n in group]} for group in (WEIGHTS[::-1], REST)])
    lion.load_state_dict(whole)
    for i, name in enumerate([*WEIGHTS, *REST]):
        assert_same_bits(lion.state[lion_params[name]]["exp_avg"], whole["state"][i]["exp_avg"], name)
    with pytest.raises(ValueError, match="full_state_dict"):
        lion.load_state_dict(optimizer.state_dict())
    smaller = copy.deepcopy(whole)
    for key in ("params", "param_names"):
        smaller["param_groups"][1][key].pop()
    del smaller["state"][4]
    with pytest.raises(ValueError, match=r"lacks parameters \['scale'\]"):
        other.load_state_dict(smaller)


def check_entries_of_others(rank: int, world_size: int, device: torch.device) -> None:
    params, optimizer = made([WEIGHTS, REST], device, lr=0.25)
    first = params["a.weight"]
    feed(params.values(), world_size)
    optimizer.step()
    optimizer.state[first]["lookahead_slow_buff"] = first.detach().clone()
    optimizer.state[first]["words"] = ["a word", {"ema": torch.full((3,), 0.5, device=device)}]
    state: Any = optimizer.state
    state["lookahead_step"] = 6
    expected = first.detach().cpu().clone()

    def check(optimizer: ShardedLion | Lion, p: Tensor) -> None:
        assert_same_bits(optimizer.state[p]["lookahead_slow_buff"].cpu(), expected)
        word, nest = optimizer.state[p]["words"]
        assert word == "a word"
        assert nest["ema"].tolist() == [0.5] * 3
        state: Any = optimizer.state
        assert state["lookahead_step"] == 6
        assert set(optimizer.state[p]) == {"exp_avg", "lookahead_slow_buff", "words"}

    momentum = optimizer.full_state_dict()["state"][0]["exp_avg"]
    for saved in (optimizer.state_dict(), optimizer.full_state_dict()):
        assert list(saved["state"]) == [0, 1, 2, 3, 4, "lookahead_step"]
        assert {type(entry) for i, entry in saved["state"].items() if i != "lookahead_step"} == {dict}
        optimizer.load_state_dict(saved)
        check(optimizer, first)
        assert_same_bits(optimizer.full_state_dict()["state"][0]["exp_avg"], momentum)
    slow = saved["state"][0]["lookahead_slow_buff"]
    assert slow.device.type == "cpu"
    assert (
        slow.untyped_storage().data_ptr() != optimizer.state[first]["lookahead_slow_buff"].untyped_storage().data_ptr()
    )
    optimizer.step()
    optimizer.load_state_dict(saved)
    # Into other momenta, and into Lion; a refused load leaves them.
    others, other = made([WEIGHTS, REST], device, momentum_dtype="bfloat16")
    other.load_state_dict(
        {**saved, "param_groups": [{**g, "momentum_dtype": "bfloat16"} for g in saved["param_groups"]]}
    )
    first_of_other = others["a.weight"]
    other.add_param_group({"params": [("late", nn.Parameter(torch.ones(3, device=device)))]})
    bad = {i: {**e, "exp_avg_sq": 1} if i == 4 else e for i, e in saved["state"].items()}
    with pytest.raises(ValueError, match="another optimizer"):
        optimizer.load_state_dict({**saved, "state": bad})
    for holder, p in ((other, first_of_other), (optimizer, first)):
        assert holder.state[p]["lookahead_slow_buff"].device == device
        check(holder, p)
    assert other.state[first_of_other]["exp_avg"].dtype == torch.bfloat16

    # What Composer and Lightning do at setup, and what an entry refuses.
    entry = optimizer.state[first]
    assert isinstance(entry, MutableMapping)
    for key, value in entry.items():
        if isinstance(value, Tensor):
            entry[key] = value.to(device)
    entry["exp_avg"] = torch.full(first.shape, 3.0, device=device)
    assert optimizer.full_state_dict()["state"][0]["exp_avg"].unique().tolist() == [3.0]
    with pytest.raises(ValueError, match=r"must be a tensor of shape \(20, 30\)"):
        entry["exp_avg"] = torch.zeros(3, device=device)
    with pytest.raises(TypeError, match="cannot be deleted"):
        del entry["exp_avg"]
    del entry["words"]
    assert list(entry) == ["exp_avg", "lookahead_slow_buff"]
    # One that is kept for a frozen parameter goes with it once it is unfrozen.
    frozen = nn.Parameter(torch.ones(5, device=device), requires_grad=False)
    optimizer.add_param_group({"params": [("frozen", frozen)]})
    optimizer.state[frozen]["ema"] = 1
    assert optimizer.state_dict()["state"][5] == {"ema": 1}
    frozen.requires_grad_(True)
    feed([*params.values(), frozen], world_size)
    optimizer.step()
    assert set(optimizer.state[frozen]) == {"exp_avg", "ema"}


def check_hyper_parameters(world_size: int, device: torch.device) -> None:
    p, q = (nn.Parameter(torch.full((4,), 1024.0, device=device)) for _ in range(2))
    groups: list[dict[str, Any]] = [{"params": [p]}, {"params": [q], "lr": 0.0, "weight_deacy": 1}]
    decay: Any = Decimal("0.5")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = ShardedLion(
            groups, lr=np.float32(0.125), betas=np.array([0.5, 0.75]), weight_decay=decay, stage=1,
            decoupled_weight_decay=True, momentum_dtype="bfloat16",
        )  # fmt: skip
    assert ["weight_decay" in str(w.message) and w.filename == __file__ for w in caught] == [True]
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.125, (0.5, 0.75), 0.5)
    optimizer.param_groups[1]["lr"] = 0.0625
    for w in (p, q):
        w.grad = torch.zeros_like(w)
    optimizer.step()
    assert p.tolist() == [512.0] * 4
    assert q.tolist() == [768.0] * 4  # decay divided by the constructor's lr
    assert optimizer.state[p]["exp_avg"].dtype == torch.bfloat16
    with pytest.raises(TypeError, match="maximize must be True or False"):
        ShardedLion([p], stage=1, maximize="no")  # type: ignore[arg-type]
    halves = nn.Parameter(torch.full((300,), 0.02, dtype=torch.bfloat16, device=device))
    optimizer = ShardedLion([halves], lr=1e-6, stage=1)
    halves.grad = torch.ones_like(halves)
    with pytest.warns(UserWarning, match="below half a unit in the last place of 100%"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


def snapshot(optimizer: ShardedLion) -> str:
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    params = [(id(p), bits(p).tolist()) for g in optimizer.param_groups for p in g["params"]]
    shards = [bits(part).tolist() for part in momentum_parts(optimizer)]
    entries = [(str(type(entry)), len(entry) if isinstance(entry, MutableMapping) else entry)
               for entry in optimizer.state.values()]  # fmt: skip
    return str((groups, params, shards, entries))


def check_damaged(seeds: range, world_size: int, device: torch.device) -> tuple[int, int]:
    refused = loaded = 0
    for seed in seeds:
        params, optimizer = made([["a.bias"], ["scale", "b.bias"]], device, lr=0.25)
        feed(params.values(), world_size)
        optimizer.step()
        optimizer.state[params["scale"]]["slow"] = torch.ones(())
        state: Any = optimizer.state
        state["count"] = 3
        damaged = mutated(optimizer.full_state_dict(), seed)
        before = snapshot(optimizer)
        try:
            optimizer.load_state_dict(damaged)
        except (ValueError, TypeError):
            refused += 1
            assert snapshot(optimizer) == before, seed
        except Exception as error:
            raise AssertionError(f"seed {seed}") from error
        else:
            loaded += 1
            try:
                whole = optimizer.full_state_dict()["state"]
                ids = {id(p): i for i, p in enumerate(p for g in optimizer.param_groups for p in g["params"])}
                assert_loaded(optimizer, damaged, lambda p: whole.get(ids[id(p)], {}).get("exp_avg"))  # noqa: B023
                optimizer.load_state_dict(optimizer.full_state_dict())
            except Exception as error:
                raise AssertionError(f"seed {seed} was loaded wrong, or failed then") from error
        feed(params.values(), world_size)
        optimizer.step()
    return refused, loaded


def body(rank: int, world_size: int) -> None:
    device = device_of(rank, world_size)
    for stage in (1, 2):
        check_frozen(stage, rank, world_size, device)
    check_names(world_size, device)
    check_entries_of_others(rank, world_size, device)
    check_hyper_parameters(world_size, device)
    check_damaged(range(30), world_size, device)


def test_groups_and_state_dicts_on_two_ranks(tmp_path: Path) -> None:
    run_ranks(body, 2, tmp_path)


def body_damaged(rank: int, world_size: int) -> tuple[int, int]:
    return check_damaged(range(2500), world_size, device_of(rank, world_size))


@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
def test_damaged_state_dicts(tmp_path: Path) -> None:
    ((refused, loaded),) = run_ranks(body_damaged, 1, tmp_path, deadline=1700)
    assert min(refused, loaded) > 250
