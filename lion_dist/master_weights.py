"""Master weights from float32 tensors, such as those of the model before it was converted to bfloat16.

Both optimizers first check all that they are given (`find`), and then write it (`put`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .dtensors import is_dtensor, local, placed_like
from .dtypes import dtype_name
from .frozen import is_freed, takes_part
from .fsdp import is_flat_view, misfit
from .hyper_values import shown
from .meshes import of_same_boxes, own_part, uneven_cuts
from .param_groups import Group, names_of, state_columns
from .param_names import without_wrappers
from .update.codecs import split
from .update.state import REMAINDER

NamedTensors = Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]


class MasterWeight(NamedTuple):
    """A parameter, and the weight that it is to have.

    Attributes:
        name: name of the parameter.
        param: the parameter.
        weight: float32, detached, of the shape of this rank's part of the parameter.
        keeps_remainder: whether the parameter is bfloat16 and has, or will have, a remainder.
    """

    name: str
    param: Tensor
    weight: Tensor
    keeps_remainder: bool


def find(groups: Sequence[Group], state: Mapping[Any, Any], named: NamedTensors) -> list[MasterWeight]:
    """Finds the parameters of named float32 tensors. Changes nothing.

    Args:
        groups: the optimizer's parameter groups.
        state: the optimizer's state.
        named: as for `Lion.take_master_weights`.

    Raises:
        ValueError, TypeError: names the first that does not fit.
    """
    pairs = _pairs(named)
    place = _place(groups, [name for name, _ in pairs])
    return [_checked(name, t, *place[name], state) for name, t in pairs]


def put(found: Sequence[MasterWeight], remainder_of: Callable[[Tensor], Tensor]) -> None:
    """Writes master weights.

    Args:
        found: as `find` returned them.
        remainder_of: returns where the remainder of a parameter is kept: a tensor, or a DTensor or BoxTensor that holds
            a part of it.
    """
    for _, p, weight, keeps_remainder in found:
        part = local(p).detach()
        weight = weight.to(part.device)
        if p.dtype == torch.float32:
            part.copy_(weight)
            continue
        rounded, r = split(weight)
        part.copy_(rounded)
        if keeps_remainder:
            own = remainder_of(p)
            local(own).copy_(local(of_same_boxes(placed_like(r, p), own)))
    dtensors = [p for _, p, _, _ in found if is_dtensor(p)]
    torch.autograd.graph.increment_version(dtensors)  # only the versions of their local tensors have risen


def describe(found: Sequence[MasterWeight], checksum: Callable[[Tensor], Tensor]) -> list[str]:
    """Lines about what was found that must be the same on all ranks that hold replicas.

    Args:
        found: as `find` returned them.
        checksum: of the bits of a contiguous tensor.
    """
    return [f"master weight {name}: bits {checksum(weight.contiguous()).item():x}" for name, _, weight, _ in found]


def _pairs(named: NamedTensors) -> list[tuple[str, Tensor]]:
    if isinstance(named, Tensor):
        raise TypeError("expected names and float32 tensors, as from model.named_parameters(), got a tensor")
    pairs = list(named.items() if isinstance(named, Mapping) else named)
    for pair in pairs:
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)):
            raise TypeError(f"expected pairs of a name and a float32 tensor, got {shown(pair)}")
        if not isinstance(pair[1], Tensor):
            raise TypeError(f"{pair[0]!r} must be a float32 tensor, got {shown(pair[1])}")
    return pairs


def _place(groups: Sequence[Group], given: Sequence[str]) -> dict[str, tuple[Tensor, Group]]:
    """The parameter of each given name, and its group."""
    names = [names_of(group) for group in groups]
    if any(own is None for own in names):
        raise ValueError(
            "the optimizer has no names of its parameters: make it from model.named_parameters(), so that the weights "
            "can be matched by name"
        )
    owners = [
        (name, p, group)
        for own, group in zip(names, groups, strict=True)
        for name, p in zip(own or (), group["params"], strict=True)
    ]
    here, wanted = [name for name, _, _ in owners], list(given)
    if not set(wanted) <= set(here):  # one of the models may be wrapped
        here, wanted = without_wrappers(here), without_wrappers(wanted)
    for whose, those in (("this optimizer", here), ("what was given", wanted)):
        if twice := [name for name, n in Counter(those).items() if n > 1 and name in wanted]:
            raise ValueError(f"{whose} has several parameters called {twice[0]!r}, so they cannot be matched by name")
    place = {name: (p, group) for name, (_, p, group) in zip(here, owners, strict=True)}
    if unknown := sorted(set(wanted) - place.keys()):
        raise ValueError(
            f"the optimizer has no parameters called {unknown[:5]} ({len(unknown)} in all): give only its parameters, "
            "without buffers and second names of tied weights, as model.named_parameters() does"
        )
    return {name: place[plain] for name, plain in zip(given, wanted, strict=True)}


def _checked(name: str, t: Tensor, p: Tensor, group: Group, state: Mapping[Any, Any]) -> MasterWeight:
    """This rank's part of a named tensor. Raises ValueError or TypeError where it cannot be p's weight."""
    if t.dtype != torch.float32 or t.layout != torch.strided or t.is_meta:
        kind = f"{t.layout} {dtype_name(t.dtype)}{' on meta' if t.is_meta else ''}"
        raise TypeError(f"{name} is {kind}; expected strided float32")
    remainder = any(column.name == REMAINDER for column in state_columns(p, group))
    if p.dtype != torch.float32 and not remainder:
        raise TypeError(
            f"{name} is a {dtype_name(p.dtype)} parameter without a master weight; expected bfloat16 in a group with "
            "master_weights=True, or float32: leave it out"
        )
    part = _part(name, t.detach(), p)
    if type(part).__torch_dispatch__ is not Tensor.__torch_dispatch__ or is_freed(part) or is_freed(local(p)):
        raise TypeError(f"{name} cannot be read or written: {shown(t)} for {shown(p)}, or memory that was freed")
    return MasterWeight(name, p, part, remainder and (takes_part(p) or REMAINDER in state.get(p, {})))


def _part(name: str, t: Tensor, p: Tensor) -> Tensor:
    """This rank's part of the tensor of a parameter. Nothing is communicated."""
    if is_dtensor(p) and not is_dtensor(t):
        if t.shape != p.shape:
            raise ValueError(f"{name} has shape {tuple(t.shape)}; expected {tuple(p.shape)}")
        return _cut(name, t, p)
    if t.shape != p.shape and not is_flat_view(p):
        raise ValueError(f"{name} has shape {tuple(t.shape)}; expected {tuple(p.shape)}")
    if reason := misfit(t, p, p.shape):
        raise ValueError(
            f"{name} {reason.partition(': load FSDP')[0]}: give each rank its part, such as the parameters of the "
            "float32 model under the same sharding, or load a checkpoint of that model through lion_dist.checkpoint"
        )
    found: Tensor = local(t)
    return found


_PLACED = "give a DTensor placed as the parameter, or load a checkpoint through lion_dist.checkpoint"


def _cut(name: str, t: Tensor, p: Any) -> Tensor:
    """This rank's part of a whole tensor. Raises ValueError, on every rank alike, where a part's place is uncertain."""
    if uneven := uneven_cuts(p):
        raise ValueError(
            f"{name} is whole, and its parameter is sharded twice and unevenly along dimension {min(uneven)}: {_PLACED}"
        )
    return cast(Tensor, local(own_part(t.to(local(p).device), p)))
