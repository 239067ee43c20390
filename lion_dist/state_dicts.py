"""What a state_dict means to Lion; shared by both optimizers.

Parameters are matched by name where the state_dict and the optimizer both have names, else by position, as every
optimizer of torch matches them. A parameter's entry holds ``exp_avg``, and whatever a wrapper keeps beside it.
"""

from __future__ import annotations

import copy
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ._torch_compat import WRAPPER_PREFIXES, value_like_param
from .frozen import is_freed, is_plain, takes_part
from .fsdp import is_dtensor, is_flat_view, misfit
from .param_groups import (
    Group,
    check_steppable,
    complete_group,
    dtype_name,
    names_of,
    normalize_group,
    shown,
    warn_of_unknown_keys,
)
from .update.reference import STORAGE_DTYPES

# Entries of other optimizers' states: a momentum that Lion would misread, or leave out, is beside each.
OTHERS = frozenset({
    "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "exp_avg_diff", "exp_avg_var", "exp_avg_fast", "exp_avg_slow",
    "exp_avg_sq_row", "exp_avg_sq_col", "momentum_buffer", "square_avg", "grad_avg", "acc_delta", "hessian",
    "mu_product", "row_var", "col_var", "variance", "state1", "state2",
})  # fmt: skip

# A key of the state_dict of a Lion under FSDP1: the parameters lie in the order of their names. torch's doors drop it.
IN_ORDER_OF_NAMES = "params_in_order_of_names"

# Parts of a name that wrappers of a model put into it.
_WRAPPERS = WRAPPER_PREFIXES | {"module"}


def with_named_dtypes(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A shallow copy of a state_dict in which groups call their momentum_dtype "float32" and the like: torch's
    gathering of a sharded optimizer's state takes no dtype."""
    groups = [{**g, "momentum_dtype": dtype_name(g["momentum_dtype"])} for g in state_dict["param_groups"]]
    return {**state_dict, "param_groups": groups}


class KeptAsIs:
    """Carries a value through torch's load_state_dict, which would cast a tensor to the parameter's dtype, and make
    a generator's repr of a string."""

    def __init__(self, value: Any) -> None:
        self.value = value


class Misfit(KeptAsIs):
    """Carries a momentum that does not fit its parameter, which was changed while it was frozen, and keeps it."""


def unwrap(entry: Any) -> None:
    """Puts the values of an entry that are in `KeptAsIs` into their places."""
    if isinstance(entry, dict):
        for key, value in entry.items():
            if isinstance(value, KeptAsIs):
                entry[key] = value.value


def check_is_dict(state_dict: Any) -> None:
    """Raises ValueError for what cannot be a state_dict at all, before torch asks it for a copy."""
    if not isinstance(state_dict, dict):
        raise ValueError(
            f'expected an optimizer state_dict with keys "state" and "param_groups", got a {type(state_dict).__name__}'
        )


def check_and_wrap_state(
    state_dict: Any,
    groups: Sequence[Group],
    defaults: Group,
    state: Mapping[Any, Any],
    subclasses: tuple[type, ...] = (),
) -> dict[str, Any]:
    """A copy of a state_dict as torch's load_state_dict is to have it, once the whole of it is known to fit.

    Args:
        groups, defaults, state: the optimizer's own. Tensors that are the state's own are taken for loaded already.
        subclasses: of Tensor, that a momentum may be beside a plain tensor or, where its parameter is one, a DTensor.

    Returns:
        Groups in the order of the optimizer's, with every hyper-parameter in the form in which it is stored, and the
        parameters of each in that order. Of the state, the entries of parameters, each value of which is in
        `KeptAsIs`: ``exp_avg`` as it was given, of everything else a copy that torch's own rule has cast and moved;
        and what is no parameter's, as it was given.

    Raises:
        ValueError, TypeError: naming the first thing that does not fit. Nothing has been changed then.
    """
    check_is_dict(state_dict)
    if not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError('expected an optimizer state_dict with keys "state" and "param_groups"')
    saved_groups, saved_state = state_dict["param_groups"], state_dict["state"]
    if not isinstance(saved_state, dict) or not all(
        isinstance(g, dict) and {"params", "lr"} <= g.keys() and isinstance(g["params"], (list, tuple))
        for g in (saved_groups if isinstance(saved_groups, (list, tuple)) else [None])
    ):
        raise ValueError('expected "state" to be a dict and "param_groups" a list of dicts with "params" and "lr"')
    given_groups = saved_groups
    saved_groups = [
        _completed(*pair, defaults) for pair in _paired(saved_groups, groups, IN_ORDER_OF_NAMES in state_dict)
    ]
    params = [p for g in groups for p in g["params"]]
    ids = [i for g in saved_groups for i in g["params"]]
    if twice := [i for i, n in Counter(ids).items() if n > 1]:
        raise ValueError(f"the state_dict's groups hold parameter {shown(twice[0])} twice")
    param_of = dict(zip(ids, params, strict=True))
    # A string may be a key of somebody else's; not one of these, and no other where parameters have strings for keys.
    names = {name for g in (*given_groups, *groups) for name in names_of(g) or ()}
    if any(isinstance(i, str) for i in ids):
        names.update(i for i in saved_state if isinstance(i, str))
    checked: dict[Any, Any] = {}
    for i, entry in saved_state.items():
        if i in param_of:
            p = param_of[i]
            fits = _check_entry(i, entry, p, subclasses)
            own = state.get(p, {})
            checked[i] = {k: KeptAsIs(_copy_for(p, i, k, v, own, saved_groups)) for k, v in entry.items()}
            if not fits:
                m = entry["exp_avg"]
                checked[i]["exp_avg"] = Misfit(m if own.get("exp_avg") is m else m.detach().clone())
        elif isinstance(i, (int, Tensor)) or (i in names and isinstance(entry, Mapping) and "exp_avg" in entry):
            raise ValueError(f"the state_dict has state for parameter {shown(i)}, which is in none of its groups")
        else:
            checked[i] = entry
    for i, saved in enumerate(saved_groups):
        warn_of_unknown_keys(saved, [*groups, *saved_groups[:i]])
    return {**state_dict, "state": checked, "param_groups": saved_groups}


def _completed(saved: Group, live: Group, defaults: Group) -> Group:
    group = dict(saved)
    complete_group(group, live, defaults)
    normalize_group(group)
    if "param_names" in live:
        group["param_names"] = live["param_names"]
    return group


def _check_entry(i: Any, entry: Any, p: Tensor, subclasses: tuple[type, ...]) -> bool:
    """Whether the momentum in an entry of a state_dict fits p, if there is one. A frozen parameter may have become
    anything since its last step (another dtype, another shape), so `Lion` keeps what was its momentum; not
    `ShardedLion`, which has to shard it.

    Raises:
        ValueError, TypeError: the optimizer cannot take the entry for p.
    """
    if not isinstance(entry, Mapping):
        raise ValueError(f"state of parameter {shown(i)} is a {type(entry).__name__}; expected a dict with 'exp_avg'")
    foreign = OTHERS & entry.keys()
    if foreign or (entry and "exp_avg" not in entry and takes_part(p)):
        expected = f"and {sorted(foreign)} is not Lion's" if foreign else "and Lion's has 'exp_avg'"
        frozen = (
            "" if foreign else " Or was the parameter frozen when this was saved? Then load before you unfreeze it."
        )
        raise ValueError(
            f"state of parameter {shown(i)} has entries {sorted(map(str, entry))}, {expected}. Is this another "
            f"optimizer's state_dict?{frozen}"
        )
    if "exp_avg" not in entry:
        return True
    m = entry["exp_avg"]
    try:
        _check_momentum(i, m, p, subclasses)
    except (TypeError, ValueError):
        if takes_part(p) or subclasses or not (isinstance(m, Tensor) and is_plain(m)):
            raise
        return False
    return True


def _check_momentum(i: Any, m: Any, p: Tensor, subclasses: tuple[type, ...]) -> None:
    """Raises ValueError or TypeError where m cannot be the momentum of p."""
    check_steppable(p, f"the state_dict has a momentum for parameter {shown(i)}, which")
    if isinstance(m, Tensor) and (reason := misfit(m, p)):
        raise ValueError(f"exp_avg of parameter {shown(i)} {reason}")
    if not isinstance(m, Tensor) or m.shape != p.shape or m.dtype not in STORAGE_DTYPES or m.layout != torch.strided:
        got = f"{tuple(m.shape)} {m.dtype} {m.layout}" if isinstance(m, Tensor) else type(m).__name__
        raise ValueError(
            f"exp_avg of parameter {shown(i)} is {got}; expected shape {tuple(p.shape)} in float32, bfloat16 or "
            "float16. Is this the state_dict of another model?"
        )
    if not (is_dtensor(m) or isinstance(m, subclasses)):
        if type(m).__torch_dispatch__ is not Tensor.__torch_dispatch__:
            raise ValueError(
                f"exp_avg of parameter {shown(i)} is a {type(m).__name__}; expected a plain tensor. Of a ShardedLion, "
                "save full_state_dict(), which Lion loads"
            )
        if m.is_meta or is_freed(m):
            raise ValueError(f"exp_avg of parameter {shown(i)} is a tensor without memory, on {m.device}")


def _copy_for(p: Tensor, i: Any, key: Any, value: Any, own: Mapping[str, Any], groups: Sequence[Group]) -> Any:
    """``value`` itself if it is the momentum or this optimizer's own; else a copy of its containers and tensors, these
    on the parameter's device and in the dtype that every optimizer of torch would load them in."""
    if key == "exp_avg" or own.get(key) is value:
        return value

    def loaded(t: Tensor, key: Any) -> Tensor:
        plain = type(t).__torch_dispatch__ is Tensor.__torch_dispatch__ and t.layout == torch.strided and not t.is_meta
        if plain and is_freed(t):
            raise RuntimeError("a tensor without memory")
        moved = value_like_param(p, t, i, groups, key)
        return moved.clone() if moved is t else moved

    try:
        return map_tensors(loaded, value, key)
    except RuntimeError as error:  # a conversion that torch cannot make; a nest without end
        raise ValueError(f"{shown(key)} of the state of parameter {shown(i)} cannot be loaded: {error}") from error


def map_tensors(function: Callable[[Tensor, Any], Tensor], value: Any, key: Any = None) -> Any:
    """``value`` with ``function(tensor, key)`` in place of its tensors, in new containers of the same types: dicts of
    any kind, lists, tuples, named tuples and deques. Anything else is itself. The key is that of the dict which holds
    the tensor."""
    if isinstance(value, Tensor):
        return function(value, key)
    if isinstance(value, dict):
        mapped = copy.copy(value)  # with its default_factory and the like
        for k, v in value.items():
            mapped[k] = map_tensors(function, v, k)
        return mapped
    kind = type(value)
    if kind in (list, tuple):
        return kind(map_tensors(function, v) for v in value)
    if isinstance(value, tuple) and hasattr(kind, "_make"):
        return kind._make(map_tensors(function, v) for v in value)
    if kind is deque:
        return deque((map_tensors(function, v) for v in value), value.maxlen)
    return value


# Names ---------------------------------------------------------------------------------------------


def _paired(saved: Sequence[Group], groups: Sequence[Group], in_order: bool) -> list[tuple[Group, Group]]:
    """Each group of the optimizer, preceded by the saved group that goes into it, its parameters in the same order.

    Args:
        in_order: the state_dict says that its parameters are in the order of their names.
    """
    if _both_named(saved, groups, in_order):
        saved = _by_name(saved, groups)
    sizes_there, sizes_here = [len(g["params"]) for g in saved], [len(g["params"]) for g in groups]
    if sizes_there != sizes_here:
        raise ValueError(f"the state_dict has parameter groups of sizes {sizes_there}; this optimizer has {sizes_here}")
    return list(zip(saved, groups, strict=True))


def _both_named(saved: Sequence[Group], groups: Sequence[Group], in_order: bool) -> bool:
    """Whether the names of both sides say which parameter is which."""
    if any(names_of(group) is None for group in groups):
        return False
    named = ["param_names" in g for g in saved]
    if any(named) and not all(named):
        raise ValueError(f"the state_dict's parameter group {named.index(False)} has no param_names, though others do")
    for i, group in enumerate(saved if any(named) else []):
        if names_of(group) is None:
            raise ValueError(
                f"param_names of the state_dict's group {i} must be {len(group['params'])} strings. To load by "
                "position, delete param_names from the state_dict's groups"
            )
    # torch's doors for sharded models have put the parameters in this optimizer's order already, and left their names
    # in the order of the optimizer that was saved: torch.distributed.checkpoint.state_dict calls parameters by their
    # names in place of numbers, and FSDP1's gives the parameters that it has flattened, and drops the key by which
    # `Lion.state_dict` says that names and parameters agree.
    by_torch = any(isinstance(i, str) for g in saved for i in g["params"])
    by_torch |= not in_order and any(is_flat_view(p) for g in groups for p in g["params"])
    return any(named) and not by_torch


def _unwrapped(names: Sequence[str]) -> list[str]:
    return [".".join(part for part in name.split(".") if part not in _WRAPPERS) for name in names]


def _by_name(saved: Sequence[Group], groups: Sequence[Group]) -> list[Group]:
    """The saved groups in the optimizer's order, each with its parameters in the order and by the names of the
    optimizer's.

    Raises:
        ValueError: the names are not the same, or are divided among the groups otherwise.
    """
    there, here = [list(g["param_names"]) for g in saved], [list(g["param_names"]) for g in groups]
    if set(chain(*there)) != set(chain(*here)):  # one of the models may have been wrapped, as by DDP or torch.compile
        plain_there, plain_here = list(map(_unwrapped, there)), list(map(_unwrapped, here))
        if set(chain(*plain_there)) == set(chain(*plain_here)):
            there, here = plain_there, plain_here
    if there == here:
        return list(saved)
    flat_there, flat_here = list(chain(*there)), list(chain(*here))
    advice = "To load by position, delete param_names from the state_dict's groups"
    for whose, names in (("the state_dict", flat_there), ("this optimizer", flat_here)):
        if twice := [name for name, n in Counter(names).items() if n > 1]:
            raise ValueError(f"{whose} has several parameters called {twice[0]!r}, so names tell nothing. {advice}")
    missing, extra = sorted(set(flat_here) - set(flat_there)), sorted(set(flat_there) - set(flat_here))
    if missing or extra:
        raise ValueError(
            f"the state_dict lacks parameters {missing[:5]} of this optimizer, and has {extra[:5]}, which this "
            f"optimizer does not ({len(missing)} and {len(extra)} in all). {advice}"
        )
    found = []
    left = list(range(len(saved)))
    for i, wanted in enumerate(here):
        j = next((j for j in left if sorted(there[j]) == sorted(wanted)), None)
        if j is None:
            name = wanted[0] if wanted else ""
            place = next((j for j, names in enumerate(there) if name in names), 0)
            raise ValueError(
                f"parameter group {i} of this optimizer, {wanted[:5]}, has no counterpart in the state_dict: {name!r} "
                f"is in its group {place} there, {there[place][:5]}. Make the optimizer with the groups that were saved"
            )
        left.remove(j)
        id_of = dict(zip(there[j], saved[j]["params"], strict=True))
        found.append({**saved[j], "params": [id_of[name] for name in wanted], "param_names": groups[i]["param_names"]})
    if left:
        raise ValueError(f"the state_dict has {len(saved)} parameter groups; this optimizer has {len(groups)}")
    return found
