"""What `Lion` shows of its state in a state_dict, and how a state_dict becomes its state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .dtensors import is_dtensor, local, placed_like
from .fsdp import is_flat_view, new_state
from .momentum_codes import decoded
from .param_groups import Group, state_columns
from .saved_momentum import shows_float32
from .state_dicts import KeptAsIs, Misfit
from .update.state import EXP_AVG, EXP_AVG_SCALE, REMAINDER, StateColumn


def as_shown(packed: dict[str, Any], groups: Sequence[Group]) -> dict[str, Any]:
    """A shallow copy of a state_dict in which torch can gather, shard and lay out anew all that belongs to parameters.

    An 8-bit momentum of a sharded parameter is shown as float32, sharded as that, with a scale of shape () that is 1:
    its own scales belong to blocks of this rank's part, which neither torch nor a run on other ranks could use. A
    remainder is shown as float32 too, because neither NCCL nor gloo sends int16, and under FSDP1 the momentum beside it
    as well (see `saved_momentum.shows_float32`). A replicated 8-bit momentum that is not row-major (channels-last) is
    shown as float32 with such a scale as well (`order_free`). Nothing is lost: the same cut and memory order load the
    same bits.

    Args:
        packed: a state_dict.
        groups: the optimizer's groups.
    """
    state = dict(packed["state"])
    float32 = shows_float32(groups)
    for saved, live in zip(packed["param_groups"], groups, strict=True):
        for i, p in zip(saved["params"], live["params"], strict=True):
            if i not in state:
                continue
            if is_dtensor(p) or is_flat_view(p):
                state[i] = _shown(state[i], p, float32 and is_flat_view(p) and p.dtype == torch.bfloat16)
            elif _has_codes(state[i], p):
                state[i] = order_free(state[i])
    return {**packed, "state": state}


def _shown(entry: Mapping[str, Any], p: Tensor, float32: bool) -> dict[str, Any]:
    """An entry of a sharded parameter; ``float32``: whether its momentum is shown in this dtype."""
    shown = dict(entry)
    if _has_codes(entry, p):
        shown[EXP_AVG] = decoded(entry[EXP_AVG], entry[EXP_AVG_SCALE], p)
        shown[EXP_AVG_SCALE] = torch.ones((), dtype=torch.float32, device=local(p).device)
    for name in (EXP_AVG, REMAINDER) if float32 else (REMAINDER,):
        if name in shown:
            shown[name] = placed_like(local(shown[name]).float(), shown[name])
    return shown


def order_free(entry: dict[str, Any], of_part: bool = False) -> dict[str, Any]:
    """An entry of a replicated parameter whose momentum can be read whatever the memory order of the parameter is.

    torch.distributed.checkpoint copies elements by their logical indices, and scales by their numbers, which count
    blocks in memory order: into codes of another memory order it would bring the scales of other blocks, in silence.
    So codes that are not row-major are shown decoded, with one scale, whose shape () does not fit other scales.

    Args:
        entry: any that has an 8-bit momentum, or none.
        of_part: whether the entry is that of a part of a parameter, whose blocks are not those of the whole.

    Returns:
        A copy, or the entry itself where it has no such momentum or a row-major one.
    """
    codes, scale = entry.get(EXP_AVG), entry.get(EXP_AVG_SCALE)
    if not isinstance(codes, Tensor) or codes.dtype != torch.int8 or scale is None:
        return entry
    if codes.is_contiguous() and not of_part:
        return entry
    one = torch.ones((), dtype=torch.float32, device=codes.device)
    return {**entry, EXP_AVG: decoded(codes, scale, codes), EXP_AVG_SCALE: one}


def _has_codes(entry: Mapping[str, Any], p: Tensor) -> bool:
    """Whether an entry holds an 8-bit momentum of p. A frozen parameter may have changed since its last step."""
    codes = entry.get(EXP_AVG) if EXP_AVG_SCALE in entry else None
    return isinstance(codes, Tensor) and codes.dtype == torch.int8 and codes.shape == p.shape


def copy_columns(checked: dict[str, Any], groups: Sequence[Group], state: Mapping[Any, Any]) -> None:
    """Puts copies in place of the state's tensors in a checked state_dict, as they will lie in the state.

    Args:
        checked: as `check_and_wrap_state` returned it.
        groups, state: those of the optimizer.
    """
    # By column: entry, parameter, source, column.
    copies: dict[str, list[tuple[dict[str, Any], Tensor, Tensor, StateColumn]]] = {}
    for group, live in zip(checked["param_groups"], groups, strict=True):
        for i, p in zip(group["params"], live["params"], strict=True):
            entry = checked["state"].get(i, {})
            for column in state_columns(p, group):
                given = entry.get(column.name)
                if isinstance(given, Misfit):
                    continue
                if given is not None:
                    t = given.value
                    dtype = column.loaded_dtype(t.dtype)
                    own = state.get(p, {}).get(column.name)
                    if t is own and t.dtype == dtype and local(t).device == local(p).device:
                        continue  # loaded in place, as lion_dist.checkpoint does
                elif checked["state"] and p.requires_grad and is_flat_view(p) and not p.numel():
                    # FSDP1 hands over nothing for what this rank has nothing of; other ranks have, and so state.
                    t, dtype = p.detach(), column.dtype
                else:
                    continue
                entry = checked["state"].setdefault(i, entry)
                copies.setdefault(column.name, []).append((entry, p, t, replace(column, dtype=dtype)))
    for name, of_column in copies.items():
        made = new_state([p for _, p, _, _ in of_column], [column for *_, column in of_column])
        for t, (entry, _, source, _) in zip(made, of_column, strict=True):
            local(t).copy_(local(source))
            entry[name] = KeptAsIs(t)
