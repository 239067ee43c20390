"""Which parameter of a state_dict is which parameter of an optimizer.

Parameters are matched by name where the state_dict and the optimizer both have names (``param_names`` in their groups),
else by position, as in every optimizer of torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import chain

from ._torch_compat import WRAPPER_PREFIXES
from .fsdp import is_flat_view
from .param_groups import Group, names_of

# Parts of a name that wrappers put into it: DDP, torch.compile, FSDP1 and activation checkpointing.
_WRAPPERS = WRAPPER_PREFIXES | {"module"}
_ADVICE = "To load by position, delete param_names from the state_dict's groups"


def pair_groups(saved: Sequence[Group], groups: Sequence[Group], in_order: bool) -> list[tuple[Group, Group]]:
    """Pairs the groups of a state_dict with those of an optimizer.

    Args:
        saved: groups of the state_dict.
        groups: groups of the optimizer.
        in_order: whether the state_dict says that its parameters are in the order of their names.

    Returns:
        For each group of the optimizer, in order: the saved group, with its parameters in the order of the optimizer's
        group; and the optimizer's group.

    Raises:
        ValueError: the groups have other sizes, or the names do not match.
    """
    if _both_named(saved, groups, in_order):
        saved = _by_name(saved, groups)
    sizes_there, sizes_here = [len(g["params"]) for g in saved], [len(g["params"]) for g in groups]
    if sizes_there != sizes_here:
        raise ValueError(f"the state_dict has parameter groups of sizes {sizes_there}; this optimizer has {sizes_here}")
    return list(zip(saved, groups, strict=True))


def _both_named(saved: Sequence[Group], groups: Sequence[Group], in_order: bool) -> bool:
    """Whether parameters are to be matched by the names of both sides."""
    if any(names_of(group) is None for group in groups):
        return False
    named = ["param_names" in g for g in saved]
    if any(named) and not all(named):
        raise ValueError(f"the state_dict's parameter group {named.index(False)} has no param_names, though others do")
    for i, group in enumerate(saved if any(named) else []):
        if names_of(group) is None:
            raise ValueError(
                f"param_names of the state_dict's group {i} must be {len(group['params'])} strings. {_ADVICE}"
            )
    # torch's functions for sharded models have put the parameters in this optimizer's order already, but have left
    # their names in the order of the optimizer that was saved. Those of torch.distributed.checkpoint.state_dict use
    # names in place of numbers. FSDP1's give the parameters that it has flattened, and drop the key by which
    # `Lion.state_dict` says that names and parameters agree.
    by_torch = any(isinstance(i, str) for g in saved for i in g["params"])
    by_torch |= not in_order and any(is_flat_view(p) for g in groups for p in g["params"])
    return any(named) and not by_torch


def _by_name(saved: Sequence[Group], groups: Sequence[Group]) -> list[Group]:
    """The saved groups in the optimizer's order, each with its parameters in the order and by the names of the
    optimizer's group.

    Raises:
        ValueError: the names are not the same, or are divided into other groups.
    """
    there, here = [list(g["param_names"]) for g in saved], [list(g["param_names"]) for g in groups]
    if set(chain(*there)) != set(chain(*here)):  # one of the models may be wrapped
        plain_there, plain_here = list(map(without_wrappers, there)), list(map(without_wrappers, here))
        if set(chain(*plain_there)) == set(chain(*plain_here)):
            there, here = plain_there, plain_here
    if there == here:
        return list(saved)
    _check_same_names(list(chain(*there)), list(chain(*here)))
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


def without_wrappers(names: Sequence[str]) -> list[str]:
    """Names without the parts that wrappers such as DDP put into them."""
    return [".".join(part for part in name.split(".") if part not in _WRAPPERS) for name in names]


def _check_same_names(there: Sequence[str], here: Sequence[str]) -> None:
    """Raises ValueError unless the names of both sides are unique and the same."""
    for whose, names in (("the state_dict", there), ("this optimizer", here)):
        if twice := [name for name, n in Counter(names).items() if n > 1]:
            raise ValueError(
                f"{whose} has several parameters called {twice[0]!r}, so they cannot be matched by name. {_ADVICE}"
            )
    missing, extra = sorted(set(here) - set(there)), sorted(set(there) - set(here))
    if missing or extra:
        raise ValueError(
            f"the state_dict lacks parameters {missing[:5]} of this optimizer, and has {extra[:5]}, which this "
            f"optimizer does not ({len(missing)} and {len(extra)} in all). {_ADVICE}"
        )
