"""Parameter groups by the names of their parameters, and which saved group belongs to which live one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .json_values import to_json
from .keys import GROUPS
from .manifest import check_name
from .names import Names

PARAM_KEYS = ("params", "param_names")  # keys that say which parameters a group has, and not how they are stepped
_KEY = re.compile(re.escape(GROUPS) + r"(0|[1-9][0-9]{0,5})\.(.+)")


def named_groups(optimizer: Optimizer, names: Names) -> list[dict[str, Any]]:
    """The optimizer's groups, with the names of parameters under "params" and numbers in place of tensors of one
    element."""
    groups = []
    for group in optimizer.param_groups:
        values = {k: _as_number(v) for k, v in group.items() if k not in PARAM_KEYS}
        groups.append({**values, "params": [names.of(p) for p in group["params"]]})
    return groups


def saved_groups(objects: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The groups of a checkpoint, as `named_groups` makes them, from its values by key.

    Raises:
        ValueError: the groups are damaged.
    """
    groups: dict[int, dict[str, Any]] = {}
    for key, value in objects.items():
        if key.startswith(GROUPS):
            match = _KEY.fullmatch(key)
            if not match:
                raise ValueError(f"{key!r} names no value of a parameter group")
            groups.setdefault(int(match[1]), {})[match[2]] = value
    for i, group in groups.items():
        names = group.get("params")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"parameter group {i} of the checkpoint has no list of names")
        for name in names:
            check_name(name)
    return [groups[number] for number in sorted(groups)]


def _as_number(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def difference(group: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """A key whose values differ in two groups; "" if there is none.

    Parameters are not compared, nor are strings: a label may differ from rank to rank.
    """
    for key in sorted(group.keys() | other.keys(), key=lambda key: (key == "init_lr", str(key))):
        a, b = group.get(key), other.get(key)
        if key in PARAM_KEYS or (isinstance(a, str) and isinstance(b, str)):
            continue
        if to_json(a, key) != to_json(b, key):
            return str(key)
    return ""


def match_groups(live: Sequence[dict[str, Any]], saved: Sequence[dict[str, Any]]) -> list[int | None]:
    """Finds the checkpoint's group for each group of an optimizer, by the names of its parameters.

    The parameters of a live group may be spread over several saved groups, if these have the same values: so it is if
    pipeline stages saved the parts of a model that one process now holds. Two live groups never match one saved group,
    because their values would become the same.

    Args:
        live: the optimizer's groups, from `named_groups`.
        saved: the checkpoint's groups, from `saved_groups`.

    Returns:
        The index of a saved group for each live group. None for a live group without parameters, which keeps its
        values.

    Raises:
        ValueError: the groups do not match; names the first live group that does not.
    """
    place: dict[str, int] = {}
    for j, group in enumerate(saved):
        for name in group["params"]:
            if place.setdefault(name, j) != j:
                raise ValueError(f"{name} is in the parameter groups {place[name]} and {j} of the checkpoint")
    matches: list[int | None] = []
    taken: dict[int, int] = {}
    for i, group in enumerate(live):
        params = group["params"]
        missing = [name for name in params if name not in place]
        if missing:
            raise ValueError(
                f"{missing[0]}, of the optimizer's group {i}, is in no parameter group of the checkpoint, nor are "
                f"{len(missing) - 1} others of that group: make the optimizer with the parameters that it had when it "
                "was saved, such as those that were trained then, and add the others by add_param_group() after the "
                "load"
            )
        there = sorted({place[name] for name in params})
        reason = ""
        for j in there:
            key = difference(saved[there[0]], saved[j])
            if key:
                reason = f"whose values of {key!r} differ"
            elif taken.setdefault(j, i) != i:
                reason = f"as are those of the optimizer's group {taken[j]}"
            if reason:
                sizes = [len(saved[j]["params"]) for j in there]
                raise ValueError(
                    f"the optimizer's group {i} of {len(params)} parameters ({', '.join(params[:3])}, ...) is not a "
                    f"group of the checkpoint, where they are in groups {there} of {sizes} parameters, {reason}: "
                    "make the optimizer with the same groups"
                )
        matches.append(there[0] if there else None)
    return matches


def values_for(saved: Mapping[str, Any], live: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a saved group for a live one: a number becomes a tensor where the live value is one."""
    return {k: _like(live.get(k), v) for k, v in saved.items() if k not in PARAM_KEYS}


def _like(live: Any, value: Any) -> Any:
    if isinstance(live, Tensor) and live.numel() == 1 and type(value) in (int, float):
        return torch.full_like(live, value)
    return value
