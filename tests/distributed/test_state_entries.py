"""``optimizer.state`` of ShardedLion, walked and written as torch, Lightning, Composer and loops of others do it."""

from __future__ import annotations

import copy
import io
import pickle
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from lion_dist.sharding.box_tensor import BoxTensor
from lion_dist.update.state import EXP_AVG, REMAINDER
from tests.asserts import assert_same_bits
from tests.harness import device_of, run_ranks
from tests.scenarios.modes import Mode, Modes, sizes, values

GROUPS: list[dict[str, Any]] = [{"params": [5, 2, 4, 0], "weight_decay": 0.1}, {"params": [1, 3, 6, 7], "lr": 3e-4}]
LARGE = 5  # with a head and a tail


def trained(rank: int, world_size: int, dtype: torch.dtype = torch.float32, **options: Any) -> Modes:
    modes = Modes(rank, world_size, values(sizes(world_size), dtype, device_of(rank, world_size)), GROUPS, **options)
    modes.step(0)
    return modes


def apply_to_collection(data: Any, dtype: Any, function: Callable[[Any], Any]) -> Any:
    """The cases of lightning_utilities' function that an optimizer's state comes to."""
    if isinstance(data, dtype):
        return function(data)
    kind: Any = type(data)
    if isinstance(data, Mapping):
        out = OrderedDict((key, apply_to_collection(value, dtype, function)) for key, value in data.items())
        return kind(data.default_factory, out) if isinstance(data, defaultdict) else kind(out)
    return data


def parts(t: Tensor) -> list[Tensor]:
    return list(t.parts) if isinstance(t, BoxTensor) else [t]


def walk_all(mode: Mode, device: torch.device) -> None:
    """Walks that move everything to the CPU and back leave the same optimizer, which makes the same steps."""
    state = mode.optimizer.state

    def there_and_back(t: Tensor) -> Tensor:
        return t.to("cpu", copy=True).to(device)

    for entry in state.values():  # Composer, and loops of reinforcement learning
        for key, value in entry.items():
            if isinstance(value, Tensor):
                entry[key] = there_and_back(value)
    for p, entry in state.items():  # Lightning
        state[p] = apply_to_collection(entry, Tensor, there_and_back)
    moved = apply_to_collection(state, Tensor, there_and_back)
    copies = [moved, copy.deepcopy(state), *(tree_map_only(Tensor, torch.clone, each) for each in (state, dict(state)))]
    for found in copies:
        for entry, own in zip(found.values(), state.values(), strict=True):
            assert type(entry) is dict
            assert list(entry) == list(own)
            for key, t in own.items():
                for a, b in zip(parts(entry[key]), parts(t), strict=True):
                    assert_same_bits(a, b, key)
                    assert a.numel() == 0 or a.data_ptr() != b.data_ptr()
    assert len(tree_leaves(state)) == sum(map(len, state.values()))
    for entry in (copy.copy(state[mode.params[LARGE]]), copy.deepcopy(state[mode.params[LARGE]])):
        assert type(entry) is dict
    assert copy.deepcopy(mode.optimizer.state_dict()).keys() == {"state", "param_groups"}


def measured(mode: Mode, numbers: list[dict[str, Tensor]]) -> None:
    """What is computed on entries is what the same code computes on this rank's part of the whole state."""
    for p, whole in zip(mode.params, numbers, strict=True):
        m = mode.optimizer.state[p][EXP_AVG]
        own = torch.cat([*(whole[EXP_AVG][box.slices()].reshape(-1) for box in m.boxes), torch.empty(0)]).to(m.device)
        for function in REDUCTIONS:
            assert_same_bits(function(m), function(own) if own.numel() else torch.zeros_like(function(m)), str(m))
        for f in ELEMENTWISE:
            found = f(m)
            assert isinstance(found, BoxTensor)
            assert found.boxes == m.boxes
            assert_same_bits(torch.cat([*(t.reshape(-1) for t in found.parts), f(own)[:0]]), f(own), str(found))
        same = whole[EXP_AVG].to(m.device)
        assert all(torch.equal(*pair) for pair in ((m, m.clone()), (m, same), (same, m)))
        other = same + 1
        assert torch.equal(m, other) == torch.equal(other, m) == (own.numel() == 0)
        assert not torch.equal(m, other.reshape(1, *other.shape))


REDUCTIONS: list[Callable[[Tensor], Tensor]] = [
    lambda t: t.norm(),
    lambda t: torch.linalg.vector_norm(t, 1),
    lambda t: t.norm(dtype=torch.float64),
    lambda t: t.sum(),
    lambda t: t.abs().amax() if any(p.numel() for p in parts(t)) else t.sum(),
    lambda t: (t > 0).sum(),
    lambda t: t.isnan().any(),
    lambda t: t.count_nonzero(),
    lambda t: torch.nn.utils.get_total_norm([t], foreach=False),  # torch's choice for plain tensors rounds otherwise
]
ELEMENTWISE: list[Callable[[Tensor], Tensor]] = [
    lambda t: t.float(),
    lambda t: t.abs(),
    lambda t: t.double() * 2,
    lambda t: 0.5 * t - t / 3,
    lambda t: t.square().sqrt().clamp(max=1e-3),
    lambda t: t == 0,
    lambda t: torch.where(t > 0, t, -t),
    lambda t: t.clone().mul_(0.5).add_(t, alpha=2),
    lambda t: t.clone().copy_(torch.tensor([2.0])),  # which is broadcast
    lambda t: t.clone().copy_(2.0),  # type: ignore[arg-type]
    lambda t: t * torch.tensor(3.0, device=t.device),
    lambda t: (t > 0).to(torch.int32) << 1,  # aten.__lshift__, which is not in place
]


def written(mode: Mode) -> None:
    """What is assigned arrives on every rank, whatever it is assigned to; nothing else changes."""
    before = mode.whole_state()
    state = mode.optimizer.state
    for i, p in enumerate(mode.params):
        if i % 6 == 0:
            state[p][EXP_AVG] = state[p][EXP_AVG] * 0.5
            continue
        if i % 6 == 1:
            state[p][EXP_AVG].mul_(0.5)
            continue
        if i == LARGE:
            state[p][EXP_AVG].data = before[i][EXP_AVG] * 2
            state[p][EXP_AVG].data = state[p][EXP_AVG].data.cpu() * 0.25
            continue
        new = {**state[p], EXP_AVG: (before[i][EXP_AVG] * 0.5).to(p.device), "seen": i}
        if i % 6 == 2:
            state[p] = new
        elif i % 6 == 3:
            state.update([(p, new)])
        else:
            state |= {p: new}
        assert state[p].pop("seen") == i
    for got, old in zip(mode.whole_state(), before, strict=True):
        assert_same_bits(got[EXP_AVG], old[EXP_AVG] * 0.5, "halved")
    for p, old in zip(mode.params, before, strict=True):
        state[p][EXP_AVG] = old[EXP_AVG]  # whole, from the CPU


def body_walks(rank: int, world_size: int) -> None:
    device = device_of(rank, world_size)
    modes = trained(rank, world_size)
    for mode in modes.modes:
        walk_all(mode, device)
        measured(mode, mode.whole_state())
        written(mode)
    modes.step(1)
    modes.check("walked")
    eight = trained(rank, world_size, torch.bfloat16, master_weights=True, momentum_dtype="int8")
    for mode in eight.modes:
        walk_all(mode, device)
    eight.step(1)
    eight.check("walked in 8 bits")


@pytest.mark.parametrize("world_size", [2, 3])
def test_walks(world_size: int, tmp_path: Path) -> None:
    run_ranks(body_walks, world_size, tmp_path)


def body_refusals(rank: int, world_size: int) -> None:
    """What does not fit is refused by name, before anything is changed."""
    device = device_of(rank, world_size)
    modes = trained(rank, world_size, torch.bfloat16, master_weights=True, momentum_dtype=torch.float32)
    params, signs = modes.modes[:2]
    state: Any = params.optimizer.state
    p = params.params[LARGE]
    entry, own = state[p], state[p][EXP_AVG]
    other = BoxTensor(own.shape, own.boxes[1:], own.parts[1:], own.dtype, own.device)
    whole = torch.zeros(own.shape, device=device)
    before = [mode.whole_state() for mode in (params, signs)]

    def assign(key: str, value: Any, to: Any = entry) -> Callable[[], None]:
        return lambda: to.__setitem__(key, value)

    first, second = other, torch.zeros(own.shape, dtype=torch.int64)
    bad: list[tuple[Callable[[], object], type, str]] = [
        (assign(EXP_AVG, other), ValueError, "another cut"),
        (assign(EXP_AVG, whole[1:]), ValueError, r"exp_avg must be a tensor of shape"),
        (assign(EXP_AVG, whole.to("meta")), ValueError, "meta"),
        (assign(EXP_AVG, 0.0), ValueError, "got float"),
        (lambda: setattr(own, "data", whole.double()), ValueError, r"must be dense, .* got a tensor .* torch\.float64"),
        (lambda: setattr(own, "data", whole.to("meta")), ValueError, "must be dense, .* on meta"),
        (lambda: setattr(own, "data", 0), TypeError, "must be a tensor, got int"),
        (assign(REMAINDER, whole), TypeError, "remainder is kept in torch.int16"),
        (
            assign(REMAINDER, entry[REMAINDER], signs.optimizer.state[signs.params[LARGE]]),
            TypeError,
            "into a whole tensor",
        ),
        # A whole entry, of which only one column is bad.
        (lambda: state.__setitem__(p, {**entry, EXP_AVG: first}), ValueError, "another cut"),
        (lambda: state.__setitem__(p, {EXP_AVG: own * 0, REMAINDER: second}), TypeError, "remainder is kept in"),
        (lambda: state.__setitem__(p, {EXP_AVG: own * 0}), ValueError, "must be a mapping with remainder, got one"),
        (lambda: state.update({p: {}}), ValueError, "must be a mapping with exp_avg, remainder"),
        (lambda: state.__setitem__(p, 3), ValueError, "must be a mapping with .*, got int"),
        # What would be lost in silence.
        (lambda: entry.pop(EXP_AVG), TypeError, "cannot be deleted"),
        (lambda: state.pop(p), TypeError, "assign zeros"),
        (lambda: state.__delitem__(p), TypeError, "assign zeros"),
        (state.popitem, TypeError, "assign zeros"),
        (state.clear, TypeError, "assign zeros"),
        # Computations that need other ranks.
        (lambda: own.sum(0), NotImplementedError, r"only reduce it over all dimensions.*full_state_dict"),
        (lambda: own[0], NotImplementedError, r"does not support aten\.select.*full_state_dict"),
        (lambda: own + other, ValueError, "another cut"),
        (lambda: own * whole[0], ValueError, r"whole tensors of shape .*, got shape \(3,\)"),
        (lambda: whole.mul_(own), TypeError, "cannot change a whole tensor"),
        (lambda: torch.mul(own, 2, out=whole), NotImplementedError, r"does not support aten\.mul\.out"),
        # Memory of the whole tensor, which there is not.
        (own.share_memory_, NotImplementedError, "no memory of its own .*full_state_dict"),
        (lambda: own.apply_(abs), NotImplementedError, "no memory of its own"),
        (own.__dlpack__, NotImplementedError, "no memory of its own"),
        (
            lambda: own.copy_(torch.zeros(2 * own.shape[0], *own.shape[1:])),
            RuntimeError,
            "must match the existing size",
        ),
        # Saves of one rank.
        (lambda: pickle.dumps(entry), TypeError, "consolidate_state_dict"),
        (lambda: torch.save(params.optimizer.state_dict(), io.BytesIO()), TypeError, "full_state_dict"),
    ]
    for call, kind, message in bad:
        with pytest.raises(kind, match=message):
            call()
    # Another rank's momentum. The first rank cannot know, and goes on.
    with pytest.raises(TypeError, match="broadcast cannot be received") if rank else nullcontext():
        dist.broadcast(own, 0)
    for mode, expected in zip((params, signs), before, strict=True):
        for got, old in zip(mode.whole_state(), expected, strict=True):
            for name, t in old.items():
                assert_same_bits(got[name], t, name)
    replacements: list[Any] = [defaultdict(dict), copy.deepcopy(state)]  # as one resets other optimizers, or rolls back
    for other_state in replacements:
        for call in (params.optimizer.step, params.optimizer.state_dict, params.optimizer.full_state_dict):
            params.optimizer.state = other_state
            with pytest.raises(ValueError, match=rf"was replaced by a {type(other_state).__name__}, which the shard"):
                call()
            params.optimizer.state = state
    state["rounds"] = 3
    assert state.pop("rounds") == 3
    modes.step(1)
    modes.check("refused")


def test_refusals(tmp_path: Path) -> None:
    run_ranks(body_refusals, 2, tmp_path)
