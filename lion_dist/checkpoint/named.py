"""What a checkpoint holds of a model and its optimizer, by name, as tensors to save from and to load into.

Names are those of the unwrapped model: what DDP, FSDP, torch.compile and activation checkpointing put before them is
left out. Keys are those of ``{"model": ..., "optim": ...}`` in torch's own tutorials:

    model.<name>                    a parameter or persistent buffer
    optim.state.<name>.exp_avg      its momentum
    optim.param_groups.<i>.<key>    a value of group i; of "params" the names

A parameter with several names, as of tied weights, goes by the first of them in the alphabet.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import _get_fqns
from torch.optim import Optimizer

from ..lion import Lion
from ..sharded_lion import ShardedLion
from ..sharding.box_tensor import BoxTensor

MODEL, MOMENTUM, GROUPS = "model.", "optim.state.", "optim.param_groups."
EXP_AVG = ".exp_avg"
_OF_THE_GROUP = ("params", "param_names")  # keys that say which parameters, not how they are stepped


@dataclass(frozen=True)
class Names:
    """``of``: a parameter's name, by its ``id``. ``aliases``: its other names, and that one."""

    of: dict[int, str]
    aliases: dict[str, str]

    @staticmethod
    def read(model: nn.Module) -> Names:
        all_names: dict[int, list[str]] = {}
        for wrapped, p in model.named_parameters(remove_duplicate=False):
            all_names.setdefault(id(p), []).extend(_get_fqns(model, wrapped))
        of = {p: min(names) for p, names in all_names.items()}
        aliases = {name: of[p] for p, names in all_names.items() for name in names if name != of[p]}
        return Names(of, aliases)


class FlatSlice(NamedTuple):
    """``start``: the number of the first element that this rank has of a parameter, in the memory order of a dense
    tensor of this shape and strides."""

    shape: torch.Size
    strides: tuple[int, ...]
    start: int


def flat_slices(model: nn.Module) -> dict[int, FlatSlice]:
    """Of every parameter that FSDP1 has flattened, by its ``id``."""
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    found: dict[int, FlatSlice] = {}
    for module in FSDP.fsdp_modules(model):
        handle = module._handle
        if handle is None:
            continue
        flat = handle.flat_param
        if flat._params is None:
            raise ValueError(
                "FSDP with use_orig_params=False has one parameter a wrapped module, whose momentum no other strategy "
                "could load: wrap the model with use_orig_params=True"
            )
        slices = zip(flat._params, flat._shapes, flat._strides, flat._shard_param_infos, strict=True)
        for p, shape, strides, place in slices:
            found[id(p)] = FlatSlice(shape, tuple(strides), place.intra_param_start_idx or 0)
    return found


class Logical:
    """Shows tensors that lie as a model's parameters do on this rank, in the parameters' own shapes."""

    def __init__(self, model: nn.Module) -> None:
        self._flat = flat_slices(model)

    def __call__(self, p: Tensor, t: Tensor) -> Tensor:
        """``t``, which is p or its momentum: itself where p is whole or a DTensor, else in boxes."""
        if isinstance(t, BoxTensor) or id(p) not in self._flat:
            return t.detach()
        shape, strides, start = self._flat[id(p)]
        if t.numel() == shape.numel():  # nobody else has any of it, or everybody has all
            return t.detach().as_strided(shape, strides)
        runs = [(start, t.detach().reshape(-1))] if t.numel() else []
        return BoxTensor.of_runs(shape, strides, runs, t)


def model_tensors(model: nn.Module, names: Names, logical: Logical) -> Iterator[tuple[str, Tensor, bool]]:
    """(key, tensor, whether it is a buffer, of which every rank has its own).

    Raises:
        TypeError: a module has more state than these.
    """
    for wrapped, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise TypeError(
                f"{wrapped or 'the model'}, a {type(module).__name__}, has an extra state (get_extra_state()), which a "
                "checkpoint cannot hold, since it may be anything: keep it apart, such as in `extra`"
            )
    for p in dict.fromkeys(p for _, p in model.named_parameters(remove_duplicate=False)):
        yield MODEL + names.of[id(p)], logical(p, p), False
    fleeting = {
        id(b)
        for module in model.modules()
        for name, b in module.named_buffers(recurse=False)
        if name in module._non_persistent_buffers_set
    }
    for wrapped, b in model.named_buffers():
        if id(b) not in fleeting:
            (name,) = _get_fqns(model, wrapped)
            yield MODEL + name, b.detach(), True


def momenta(optimizer: Optimizer, names: Names, logical: Logical) -> dict[str, Tensor]:
    """By key. Makes the state that Lion has not made yet.

    Raises:
        ValueError: a parameter of the optimizer's is not in the model.
        TypeError: it is another optimizer.
    """
    if isinstance(optimizer, Lion):
        optimizer.init_state()
    elif not isinstance(optimizer, ShardedLion):
        raise TypeError(f"expected lion_dist's Lion or ShardedLion, got {type(optimizer).__name__}")
    params = [p for group in optimizer.param_groups for p in group["params"]]
    strangers = [i for i, p in enumerate(params) if id(p) not in names.of]
    if strangers:
        raise ValueError(
            f"parameters {strangers[:5]} of the optimizer are not in the model: give the model that holds all of the "
            "optimizer's parameters, wrapped as it is in training"
        )
    found = {}
    for p in params:
        entry = optimizer.state.get(p)
        if entry:
            found[MOMENTUM + names.of[id(p)] + EXP_AVG] = logical(p, entry["exp_avg"])
    return found


def groups_by_name(optimizer: Optimizer, names: Names) -> list[dict[str, Any]]:
    """The optimizer's groups with names for parameters, and numbers for what may be a tensor of one element."""
    groups = []
    for group in optimizer.param_groups:
        values = {k: _number_of(v) for k, v in group.items() if k not in _OF_THE_GROUP}
        groups.append({**values, "params": [names.of[id(p)] for p in group["params"]]})
    return groups


def _number_of(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def state_to_load(optimizer: Optimizer, names: Names, saved: Sequence[dict[str, Any]], *, cast: bool) -> dict[str, Any]:
    """What the optimizer's load_state_dict takes: its own momenta, and the groups of a checkpoint put in its order.

    Args:
        saved: of `groups_by_name`.
        cast: whether this optimizer's ``momentum_dtype`` counts, and not the saved one.

    Raises:
        ValueError: the groups do not hold the same parameters.
    """
    mine = groups_by_name(optimizer, names)
    left = list(saved)
    groups, number = [], 0
    for i, (group, live) in enumerate(zip(mine, optimizer.param_groups, strict=True)):
        match = next((s for s in left if sorted(s["params"]) == sorted(group["params"])), None)
        if match is None:
            raise ValueError(_explain(i, group["params"], saved))
        left.remove(match)
        values = {k: _as(live.get(k), v) for k, v in match.items()}
        if cast:
            values["momentum_dtype"] = live["momentum_dtype"]
        values["params"] = list(range(number, number + len(group["params"])))
        number += len(group["params"])
        groups.append(values)
    if left:
        raise ValueError(f"the checkpoint has {len(saved)} parameter groups, the optimizer {len(mine)}")
    params = [p for group in optimizer.param_groups for p in group["params"]]
    entries = {i: dict(optimizer.state[p]) for i, p in enumerate(params) if optimizer.state.get(p)}
    return {"state": entries, "param_groups": groups}


def _as(live: Any, value: Any) -> Any:
    """A saved number as what stands here: a tensor where an lr is one."""
    if isinstance(live, Tensor) and live.numel() == 1 and isinstance(value, (int, float)):
        return torch.full_like(live, value)
    return value


def _explain(i: int, params: Sequence[str], saved: Sequence[dict[str, Any]]) -> str:
    place = {name: j for j, group in enumerate(saved) for name in group["params"]}
    missing = [name for name in params if name not in place]
    if missing:
        return f"{missing[0]}, of the optimizer's group {i}, is in no parameter group of the checkpoint"
    there = sorted({place[name] for name in params})
    return (
        f"the optimizer's group {i} of {len(params)} parameters ({', '.join(params[:3])}, ...) is no group of the "
        f"checkpoint, where they are in groups {there} of {[len(group['params']) for group in saved]} parameters: make "
        "the optimizer with the same groups"
    )
