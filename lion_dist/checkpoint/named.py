"""What a checkpoint holds of a model and its optimizer, by name, as tensors to save from and to load into.

Names are those of the unwrapped model: what DDP, FSDP, torch.compile and activation checkpointing put before them is
left out. Keys are those of ``{"model": ..., "optim": ...}`` in torch's own tutorials:

    model.<name>                    a parameter, a persistent buffer, or a module's extra state (get_extra_state())
    optim.state.<name>.exp_avg      the momentum of a parameter
    optim.state.<name>.<key>        another entry of the parameter's in optimizer.state, which a wrapper keeps there
    optim.beside.<key>              an entry of optimizer.state whose key is no parameter
    optim.param_groups.<i>.<key>    a value of group i; of "params" the names

A parameter with several names, as of tied weights, goes by the first of them in the alphabet. Each other
name has a value, "tied.<name>", which is the first: so a stage of a pipeline that has it by another name finds it.

Parameter groups are matched by the names of their parameters: see `union.unite` for a save, `match_groups` for a load.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .._torch_compat import EXTRA_STATE, non_persistent_buffers
from .._torch_compat_distributed import flat_param_slices, unwrapped_names
from ..fsdp import is_dtensor, local
from ..lion import Lion
from ..sharded_lion import ShardedLion
from ..sharding.box_tensor import BoxTensor
from ..state_dicts import OTHERS
from .manifest import BLOCK_BYTES
from .plain import to_plain

MODEL, STATE, BESIDE, GROUPS = "model.", "optim.state.", "optim.beside.", "optim.param_groups."
EXP_AVG = "exp_avg"
MAX_ENTRIES = 16  # of a parameter in optimizer.state; it bounds what a load may allocate, as does `entry_limit`
MAX_BESIDE = 256  # entries of optimizer.state whose keys are no parameters
OF_THE_GROUP = ("params", "param_names")  # keys that say which parameters, not how they are stepped


@dataclass(frozen=True)
class Names:
    """``of``: a parameter's name, by its ``id``. ``aliases``: its other names, and that one."""

    of: dict[int, str]
    aliases: dict[str, str]

    @staticmethod
    def read(model: nn.Module) -> Names:
        all_names: dict[int, list[str]] = {}
        for wrapped, p in model.named_parameters(remove_duplicate=False):
            all_names.setdefault(id(p), []).extend(unwrapped_names(model, wrapped))
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
    return {id(p): FlatSlice(shape, tuple(strides), start) for p, shape, strides, start in flat_param_slices(model)}


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

    def like(self, p: Tensor, t: Tensor) -> Tensor | None:
        """``t``, of ``optimizer.state``, in the shape of the whole parameter, if it is sharded as p is: a tensor in p's
        shape, or in that of this rank's part of p. None: it is something else. Where the ranks find differently,
        `union.unite` refuses the save."""
        if isinstance(t, BoxTensor) or is_dtensor(t):
            return t.detach() if t.shape == p.shape else None
        if is_dtensor(p):
            of: Any = p
            if t.shape != local(p).shape:
                return None
            from torch.distributed.tensor import DTensor

            return DTensor.from_local(
                t.detach(), of.device_mesh, of.placements, run_check=False, shape=of.shape, stride=of.stride()
            )
        return self(p, t) if t.shape == p.shape else None

    def shape(self, p: Tensor) -> tuple[int, ...]:
        """The shape of the whole parameter."""
        return tuple(self._flat[id(p)].shape if id(p) in self._flat else p.shape)

    def is_sharded(self, p: Tensor) -> bool:
        """Whether other ranks may hold other parts of the parameter."""
        return id(p) in self._flat or is_dtensor(p)


@dataclass(frozen=True)
class ModelState:
    """What a model holds on this rank, by key.

    Attributes:
        params: parameters, in their own shapes.
        buffers: persistent buffers, of which every rank has its own.
        extra: modules that have an extra state.
    """

    params: dict[str, Tensor]
    buffers: dict[str, Tensor]
    extra: dict[str, nn.Module]

    @staticmethod
    def read(model: nn.Module, names: Names, logical: Logical) -> ModelState:
        params = {}
        for p in dict.fromkeys(p for _, p in model.named_parameters(remove_duplicate=False)):
            params[MODEL + names.of[id(p)]] = logical(p, _plain(MODEL + names.of[id(p)], p))
        fleeting = {
            id(b)
            for module in model.modules()
            for name, b in module.named_buffers(recurse=False)
            if name in non_persistent_buffers(module)
        }
        buffers, extra = {}, {}
        for wrapped, b in model.named_buffers():
            if id(b) not in fleeting:
                (name,) = unwrapped_names(model, wrapped)
                buffers[MODEL + name] = _plain(MODEL + name, b).detach()
        for wrapped, module in model.named_modules():
            if type(module).get_extra_state is not nn.Module.get_extra_state:
                (name,) = unwrapped_names(model, f"{wrapped}.{EXTRA_STATE}" if wrapped else EXTRA_STATE)
                extra[MODEL + name] = module
        return ModelState(params, buffers, extra)


def _plain(key: str, t: Tensor) -> Tensor:
    """``t``; raises TypeError if its elements do not lie in memory one by one."""
    if t.is_meta or t.layout != torch.strided:
        kind = "on the meta device" if t.is_meta else f"of layout {t.layout}"
        raise TypeError(
            f"{key} is {kind}; a checkpoint holds dense tensors with values alone: materialize it (to_empty(), "
            "to_dense()), or take it out of the model"
        )
    return t


def unwrapped(optimizer: Any) -> Any:
    """The optimizer within Accelerate's wrapper of it; any other as it is."""
    while type(optimizer).__module__.split(".")[0] == "accelerate" and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def check_optimizer(optimizer: Any) -> None:
    """Raises TypeError for any but None, `Lion` and `ShardedLion`."""
    if optimizer is not None and not isinstance(optimizer, (Lion, ShardedLion)):
        raise TypeError(f"expected lion_dist's Lion or ShardedLion, got {type(optimizer).__name__}")


def parameters(optimizer: Optimizer, names: Names) -> dict[str, Tensor]:
    """The optimizer's parameters by name.

    Raises:
        ValueError: one is not in the model.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    strangers = [i for i, p in enumerate(params) if id(p) not in names.of]
    if strangers:
        raise ValueError(
            f"parameters {strangers[:5]} of the optimizer are not in the model: give the model that holds all of the "
            "optimizer's parameters, wrapped as it is in training"
        )
    return {names.of[id(p)]: p for p in params}


def state_of(optimizer: Optimizer, names: Names, logical: Logical) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What ``optimizer.state`` holds, by key: tensors that are sharded as their parameters are, and all else.

    Raises:
        ValueError: a parameter of the optimizer's is not in the model.
        TypeError: an entry cannot be saved.
    """
    tensors: dict[str, Tensor] = {}
    others: dict[str, Any] = {}
    for name, p in parameters(optimizer, names).items():
        entry = optimizer.state.get(p) or {}
        if len(entry) > MAX_ENTRIES:
            raise TypeError(f"optimizer.state has {len(entry)} entries for {name}; a checkpoint holds {MAX_ENTRIES}")
        for key, value in entry.items():
            where = STATE + name + "." + _text(key, f"the state of {name}")
            check_entry(name, key)
            if isinstance(value, Tensor) and (whole := logical.like(p, value)) is not None:
                tensors[where] = whole
            else:
                others[where] = _small(value, where, logical.is_sharded(p), entry_limit(logical.shape(p)))
    beside = {key: value for key, value in optimizer.state.items() if not isinstance(key, Tensor)}
    if len(beside) > MAX_BESIDE:
        raise TypeError(
            f"optimizer.state has {len(beside)} keys that are no parameters; a checkpoint holds {MAX_BESIDE}"
        )
    for key, value in beside.items():
        where = BESIDE + _text(key, "the optimizer's state")
        others[where] = _small(value, where, False, entry_limit(()))
    return tensors, others


def entry_limit(shape: Sequence[int]) -> int:
    """Bytes that a tensor in the state of a parameter of this shape may have, if it has another shape."""
    return min(BLOCK_BYTES, max(1 << 16, 8 * prod(shape)))


def _text(key: Any, where: str) -> str:
    if not isinstance(key, str):
        raise TypeError(f"{where} has an entry {key!r}; a checkpoint holds entries whose keys are strings")
    return key


def _small(value: Any, where: str, sharded: bool, limit: int) -> Any:
    if not isinstance(value, Tensor):
        to_plain(value, where)  # raises for what cannot be saved
        return value
    if type(value) is not Tensor or (sharded and value.numel() > 1) or value.nbytes > limit:
        raise TypeError(
            f"{where} is a {type(value).__name__} of shape {tuple(value.shape)} and {value.nbytes} bytes, which a "
            "checkpoint cannot hold: a tensor in optimizer.state must have the shape of the parameter (where that is "
            f"sharded, of this rank's part of it), or be small (up to {limit} bytes here; of one element where the "
            "parameter is sharded)"
        )
    return value.detach()


def split_key(rest: str, names: dict[str, Any]) -> tuple[str, str] | None:
    """The name and the entry of "<name>.<entry>", for one of these names; None for any other."""
    at = rest.rfind(".")
    while at > 0:
        if rest[:at] in names:
            return rest[:at], rest[at + 1 :]
        at = rest.rfind(".", 0, at)
    return None


def check_entry(name: str, key: str) -> None:
    """Raises ValueError for an entry that says that the state is another optimizer's."""
    if key in OTHERS:
        raise ValueError(
            f"the state of {name} has an entry {key!r}, so it is another optimizer's and not Lion's: "
            "lion_dist.checkpoint.convert has what can be converted"
        )


# Groups ---------------------------------------------------------------------------------------------


def groups_by_name(optimizer: Optimizer, names: Names) -> list[dict[str, Any]]:
    """The optimizer's groups with names for parameters, and numbers for what may be a tensor of one element."""
    groups = []
    for group in optimizer.param_groups:
        values = {k: _number_of(v) for k, v in group.items() if k not in OF_THE_GROUP}
        groups.append({**values, "params": [names.of[id(p)] for p in group["params"]]})
    return groups


def _number_of(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def difference(group: dict[str, Any], other: dict[str, Any]) -> str:
    """A key whose values differ in two groups, or "". Which parameters they have does not count, nor do labels: a
    string may be another in every group of a rank."""
    for key in sorted(group.keys() | other.keys(), key=lambda key: (key == "init_lr", str(key))):
        a, b = group.get(key), other.get(key)
        if key in OF_THE_GROUP or (isinstance(a, str) and isinstance(b, str)):
            continue
        if to_plain(a, key) != to_plain(b, key):
            return str(key)
    return ""


def match_groups(mine: Sequence[dict[str, Any]], saved: Sequence[dict[str, Any]]) -> list[int | None]:
    """For each group of an optimizer the number of the checkpoint's group whose values it takes: that of its
    parameters. None for a group without parameters, which keeps its own.

    The parameters of a group may lie in several groups of the checkpoint, as those of a whole model do if stages of a
    pipeline saved them, provided that these have the same values. Two groups of one optimizer never lie in one group
    of the checkpoint, since their values would become the same.

    Raises:
        ValueError: naming the group, where this is not so.
    """
    place: dict[str, int] = {}
    for j, group in enumerate(saved):
        for name in group["params"]:
            if place.setdefault(name, j) != j:
                raise ValueError(f"{name} is in the parameter groups {place[name]} and {j} of the checkpoint")
    found: list[int | None] = []
    taken: dict[int, int] = {}
    for i, group in enumerate(mine):
        params = group["params"]
        missing = [name for name in params if name not in place]
        if missing:
            raise ValueError(
                f"{missing[0]}, of the optimizer's group {i}, is in no parameter group of the checkpoint, nor are "
                f"{len(missing) - 1} others of that group: make the optimizer of the parameters that it had when it "
                "was saved, such as those that were trained then, and give it the others by add_param_group() after "
                "the load"
            )
        there = sorted({place[name] for name in params})
        why = ""
        for j in there:
            key = difference(saved[there[0]], saved[j])
            if key:
                why = f"whose values of {key!r} differ"
            elif taken.setdefault(j, i) != i:
                why = f"as are those of the optimizer's group {taken[j]}"
            if why:
                sizes = [len(saved[j]["params"]) for j in there]
                raise ValueError(
                    f"the optimizer's group {i} of {len(params)} parameters ({', '.join(params[:3])}, ...) is no group "
                    f"of the checkpoint, where they are in groups {there} of {sizes} parameters, {why}: make the "
                    "optimizer with the same groups"
                )
        found.append(there[0] if there else None)
    return found


def values_of(saved: dict[str, Any], live: dict[str, Any]) -> dict[str, Any]:
    """The values of a checkpoint's group for a live one: a tensor where its lr is one."""
    return {k: _as(live.get(k), v) for k, v in saved.items() if k not in OF_THE_GROUP}


def _as(live: Any, value: Any) -> Any:
    if isinstance(live, Tensor) and live.numel() == 1 and type(value) in (int, float):
        return torch.full_like(live, value)
    return value
