"""Checks of state_dicts before they are loaded; shared by both optimizers.

An entry of a state_dict holds, for one parameter, the columns of its state (`param_groups.state_columns`), and whatever
a wrapper keeps beside them. param_names.py matches entries and parameters.
"""

from __future__ import annotations

import copy
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ._torch_compat import value_like_param
from .dtensors import is_dtensor, local
from .dtypes import dtype_name
from .frozen import is_freed, is_plain, takes_part
from .fsdp import is_flat_view, misfit
from .hyper_values import shown
from .param_groups import (
    Group,
    check_steppable,
    complete_group,
    keep_storage,
    names_of,
    normalize_group,
    state_columns,
    warn_of_unknown_keys,
)
from .param_names import pair_groups
from .saved_momentum import in_kept_form, own_entry, shows_float32
from .torch_entries import has_eight_bits, refuse_altered, without_empty
from .update.state import EXP_AVG, EXP_AVG_SCALE, REMAINDER, StateColumn

# Entries that only other optimizers have. Lion would misread the momentum beside one of them, or lose it.
FOREIGN_ENTRIES = frozenset({
    "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "exp_avg_diff", "exp_avg_var", "exp_avg_fast", "exp_avg_slow",
    "exp_avg_sq_row", "exp_avg_sq_col", "momentum_buffer", "square_avg", "grad_avg", "acc_delta", "hessian",
    "mu_product", "row_var", "col_var", "variance", "state1", "state2",
})  # fmt: skip

# A key that `Lion` under FSDP1 adds to its state_dict: parameters are in the order of their names. torch's functions
# for sharded state drop it.
IN_ORDER_OF_NAMES = "params_in_order_of_names"


def with_named_dtypes(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A shallow copy of a state_dict in which ``momentum_dtype`` is a name such as "float32", because torch cannot
    gather groups that hold a dtype."""
    groups = []
    for group in state_dict["param_groups"]:
        dtype = group["momentum_dtype"]
        groups.append({**group, "momentum_dtype": None if dtype is None else dtype_name(dtype)})
    return {**state_dict, "param_groups": groups}


class KeptAsIs:
    """Carries a value through torch's load_state_dict unchanged. torch would cast a tensor to the parameter's dtype,
    and turn a string into the representation of a generator."""

    def __init__(self, value: Any) -> None:
        self.value = value


class Misfit(KeptAsIs):
    """Carries a tensor of the state of a frozen parameter that it no longer fits. It is kept as it is."""


def unwrap(entry: Any) -> None:
    """Replaces the `KeptAsIs` in an entry by their values, in place."""
    if isinstance(entry, dict):
        for key, value in entry.items():
            if isinstance(value, KeptAsIs):
                entry[key] = value.value


def check_is_dict(state_dict: Any) -> None:
    """Raises ValueError for anything but a dict, before torch tries to copy it."""
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
    """Checks a whole state_dict, and prepares it for torch's load_state_dict.

    Args:
        state_dict: the state_dict.
        groups, defaults, state: those of the optimizer. Tensors that are in ``state`` already count as loaded.
        subclasses: types of tensors that a column may be, beside a plain tensor and, where its parameter is one, a
            DTensor. If there are any, whole tensors are cut as their parameters are.

    Returns:
        A copy. Groups, and parameters in each, are in the order of the optimizer's, and hyper-parameters in the form in
        which they are stored. In the entry of each parameter, every value is in a `KeptAsIs`: columns as they were
        given, but for momenta that are kept in another form (saved_momentum.py); everything else as a copy that was
        cast and moved by torch's own rule. Entries that belong to no parameter are as they were given. A missing
        remainder counts as zeros; one that the parameter has no use for is left out.

    Raises:
        ValueError, TypeError: names the first thing that does not fit. Nothing has been changed.
    """
    given_groups, saved_state = _check_form(state_dict)
    pairs = pair_groups(given_groups, groups, IN_ORDER_OF_NAMES in state_dict)
    saved_groups = [_completed(saved, live, defaults) for saved, live in pairs]
    ids = [i for saved in saved_groups for i in saved["params"]]
    if twice := [i for i, n in Counter(ids).items() if n > 1]:
        raise ValueError(f"the state_dict's groups hold parameter {shown(twice[0])} twice")
    place = {
        i: (p, saved, has_eight_bits(given))
        for saved, live, (given, _) in zip(saved_groups, groups, pairs, strict=True)
        for i, p in zip(saved["params"], live["params"], strict=True)
    }
    # Strings may be keys of other code's entries, unless they name a parameter or parameters have strings for keys.
    names = {name for group in (*given_groups, *groups) for name in names_of(group) or ()}
    if any(isinstance(i, str) for i in ids):
        names.update(i for i in saved_state if isinstance(i, str))
    checked: dict[Any, Any] = {}
    float32 = shows_float32(groups)
    for i, entry in saved_state.items():
        if i in place:
            p, saved, eight_bits = place[i]
            columns, own = state_columns(p, saved), state.get(p, {})
            _check_entry(i, entry, p, columns)
            entry = without_empty(entry)
            if subclasses and is_dtensor(p):
                entry = own_entry(entry, p, {column.name for column in columns})
            refuse_altered(i, entry, eight_bits)
            casts = float32 and is_flat_view(p) and p.dtype == torch.bfloat16
            entry = in_kept_form(i, entry, p, columns, own, casts)
            checked[i] = _wrapped(i, entry, p, columns, subclasses, own, saved_groups)
        elif isinstance(i, (int, Tensor)) or (i in names and isinstance(entry, Mapping) and EXP_AVG in entry):
            raise ValueError(f"the state_dict has state for parameter {shown(i)}, which is in none of its groups")
        else:
            checked[i] = entry
    for i, saved in enumerate(saved_groups):
        warn_of_unknown_keys(saved, [*groups, *saved_groups[:i]])
    return {**state_dict, "state": checked, "param_groups": saved_groups}


def _check_form(state_dict: Any) -> tuple[Sequence[Group], dict[Any, Any]]:
    """The groups and the state of a state_dict."""
    check_is_dict(state_dict)
    if not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError('expected an optimizer state_dict with keys "state" and "param_groups"')
    groups, state = state_dict["param_groups"], state_dict["state"]
    if not isinstance(state, dict) or not all(
        isinstance(g, dict) and {"params", "lr"} <= g.keys() and isinstance(g["params"], (list, tuple))
        for g in (groups if isinstance(groups, (list, tuple)) else [None])
    ):
        raise ValueError('expected "state" to be a dict and "param_groups" a list of dicts with "params" and "lr"')
    return groups, state


def _completed(saved: Group, live: Group, defaults: Group) -> Group:
    group = dict(saved)
    complete_group(group, live, defaults)
    keep_storage(group, live)
    normalize_group(group)
    if "param_names" in live:
        group["param_names"] = live["param_names"]
    return group


def _wrapped(
    i: Any,
    entry: Mapping[str, Any],
    p: Tensor,
    columns: Sequence[StateColumn],
    subclasses: tuple[type, ...],
    own: Mapping[str, Any],
    groups: Sequence[Group],
) -> dict[str, KeptAsIs]:
    """Checks the values in the entry of a parameter, and wraps them.

    Args:
        i: key of the entry.
        entry: the entry.
        p: the parameter.
        columns: the columns of its state.
        subclasses: as for `check_and_wrap_state`.
        own: the optimizer's present entry.
        groups: all groups of the state_dict.
    """
    wrapped: dict[str, KeptAsIs] = {}
    names = {column.name: column for column in columns}
    for key, value in entry.items():
        if key not in names and key not in (EXP_AVG_SCALE, REMAINDER):
            wrapped[key] = KeptAsIs(value if own.get(key) is value else _copy_for(p, i, key, value, groups))
        elif key in names and _fits(i, names[key], value, p, subclasses):
            wrapped[key] = KeptAsIs(value)
        else:
            wrapped[key] = Misfit(value if own.get(key) is value else value.detach().clone())
    return wrapped


def _check_entry(i: Any, entry: Any, p: Tensor, columns: Sequence[StateColumn]) -> None:
    """Raises ValueError for an entry of another optimizer, and for one that lacks a column if p is stepped."""
    if not isinstance(entry, Mapping):
        raise ValueError(f"state of parameter {shown(i)} is a {type(entry).__name__}; expected a dict with {EXP_AVG!r}")
    foreign = FOREIGN_ENTRIES & entry.keys()
    # Momenta of numbers have no scales, and weights that were loaded without remainders have remainders of zeros.
    needed = [column for column in columns if column.name != EXP_AVG_SCALE and not column.of_param]
    missing = any(column.name not in entry for column in needed)
    if foreign or (entry and missing and takes_part(p)):
        names = " and ".join(repr(column.name) for column in columns)
        expected = f"and {sorted(foreign)} is not Lion's" if foreign else f"and Lion's has {names}"
        frozen = (
            "" if foreign else " Or was the parameter frozen when this was saved? Then load before you unfreeze it."
        )
        raise ValueError(
            f"state of parameter {shown(i)} has entries {sorted(map(str, entry))}, {expected}. Is this another "
            f"optimizer's state_dict?{frozen}"
        )


def _fits(i: Any, column: StateColumn, t: Any, p: Tensor, subclasses: tuple[type, ...]) -> bool:
    """Whether a tensor fits a column of p's state.

    A frozen parameter may have another shape and dtype now than at its last step. `Lion` keeps its state then, and the
    result is False. `ShardedLion`, which passes ``subclasses``, would have to shard it, and raises.

    Raises:
        ValueError, TypeError: the tensor does not fit, and cannot be kept.
    """
    try:
        _check_column(i, column, t, p, subclasses)
    except (TypeError, ValueError):
        if takes_part(p) or subclasses or not (isinstance(t, Tensor) and is_plain(t)):
            raise
        return False
    return True


def _check_column(i: Any, column: StateColumn, t: Any, p: Tensor, subclasses: tuple[type, ...]) -> None:
    """Raises ValueError or TypeError where t cannot be this column of p's state."""
    check_steppable(p, f"the state_dict has state for parameter {shown(i)}, which")
    who, dtypes = f"{column.name} of parameter {shown(i)}", column.loadable
    # Blocks are counted in this rank's part.
    shape = column.shape(p.shape if column.block == 1 else local(p).shape)
    placed = column.block == 1 and isinstance(t, Tensor) and not isinstance(t, subclasses)
    if placed and (reason := misfit(t, p, shape)):
        raise ValueError(f"{who} {reason}")
    if not isinstance(t, Tensor) or t.shape != shape or t.dtype not in dtypes or t.layout != torch.strided:
        got = f"{tuple(t.shape)} {t.dtype} {t.layout}" if isinstance(t, Tensor) else type(t).__name__
        raise ValueError(
            f"{who} is {got}; expected shape {tuple(shape)} in {' or '.join(map(dtype_name, dtypes))}. Is this the "
            "state_dict of another model?"
        )
    if not (is_dtensor(t) or isinstance(t, subclasses)):
        if type(t).__torch_dispatch__ is not Tensor.__torch_dispatch__:
            raise ValueError(
                f"{who} is a {type(t).__name__}; expected a plain tensor. With ShardedLion, save full_state_dict(), "
                "which Lion loads"
            )
        if t.is_meta or is_freed(t):
            raise ValueError(f"{who} is a tensor without memory, on {t.device}")


def _copy_for(p: Tensor, i: Any, key: Any, value: Any, groups: Sequence[Group]) -> Any:
    """A copy of a value's containers and tensors, these on the device and in the dtype that every optimizer of torch
    would load them in.

    Args:
        p: the parameter.
        i: key of its entry.
        key: key of the value in the entry.
        value: the value.
        groups: all groups of the state_dict.
    """

    def loaded(t: Tensor, key: Any) -> Tensor:
        plain = type(t).__torch_dispatch__ is Tensor.__torch_dispatch__ and t.layout == torch.strided and not t.is_meta
        if plain and is_freed(t):
            raise RuntimeError("a tensor without memory")
        moved = value_like_param(p, t, i, groups, key)
        return moved.clone() if moved is t else moved

    try:
        return map_tensors(loaded, value, key)
    except RuntimeError as error:  # torch cannot convert a tensor, or containers are nested without end
        raise ValueError(f"{shown(key)} of the state of parameter {shown(i)} cannot be loaded: {error}") from error


def map_tensors(function: Callable[[Tensor, Any], Tensor], value: Any, key: Any = None) -> Any:
    """Applies a function to the tensors within a value.

    Args:
        function: is called with each tensor and the key of the dict that holds it, and returns the new tensor.
        value: a tensor or container. Containers are dicts of any kind, lists, tuples, named tuples and deques.
        key: key of the dict that holds the value.

    Returns:
        The value, with new containers of the same types. Anything else within it is the same object.
    """
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
