"""Entries of state_dicts that torch's own functions have altered on the way, without an error.

- dcp.load casts: it writes 8-bit codes as plain numbers into a momentum that is no int8, and numbers, cut down to
  integers, into codes. The groups still say what was saved.
- FSDP1's full state dicts on the CPU are several tensors in one memory: the remainders overwrite the momentum.
- Flattened state dicts make an empty dict of what was not saved.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .dtensors import is_dtensor, local
from .frozen import is_freed
from .hyper_values import shown, to_dtype
from .meshes import own_part
from .param_groups import Group
from .sharding.box_tensor import BoxTensor
from .update.state import EXP_AVG, EXP_AVG_SCALE, REMAINDER


def has_eight_bits(group: Group) -> bool | None:
    """Whether a saved group's momentum has 8 bits; None if the group does not say. Raises TypeError for no dtype."""
    return to_dtype(group["momentum_dtype"]) == torch.int8 if "momentum_dtype" in group else None


def without_empty(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """An entry without the scales and the remainder that are empty dicts: torch unflattens missing ones so."""
    empty = {key for key in (EXP_AVG_SCALE, REMAINDER) if isinstance(entry.get(key), Mapping) and not entry[key]}
    return {key: value for key, value in entry.items() if key not in empty} if empty else entry


def refuse_altered(i: Any, entry: Mapping[str, Any], eight_bits: bool | None) -> None:
    """Raises ValueError for a momentum that torch has cast or overwritten.

    Args:
        i: key of the entry, for messages.
        entry: the entry of a parameter, as it was given: conversions hide what has happened.
        eight_bits: whether the saved group says that the momentum has 8 bits; None if it does not say.
    """
    m, who = entry.get(EXP_AVG), f"of parameter {shown(i)}"
    parts = readable_parts(m)
    if not isinstance(m, Tensor) or parts is None:
        return
    if m.dtype == torch.int8 and eight_bits is False:
        raise ValueError(
            f"{EXP_AVG} {who} is int8, but its group was saved with a momentum_dtype that is not: torch's dcp.load "
            f"casts, and has made integers of the saved numbers, most of them 0. {_DCP} another momentum_dtype, {_WAY}"
        )
    if m.is_floating_point() and eight_bits and entry.get(EXP_AVG_SCALE) is None and _are_codes(parts):
        raise ValueError(
            f"{EXP_AVG} {who} holds 8-bit codes as numbers, without their scales: its group was saved with "
            f'momentum_dtype="int8", and torch\'s dcp.load casts. {_DCP} momentum_dtype="int8", {_WAY}'
        )
    if _share(m, parts, entry.get(REMAINDER)):
        raise ValueError(
            f"{EXP_AVG} and {REMAINDER} {who} are the same numbers: FSDP1's full state on the CPU (FSDP."
            "optim_state_dict with FULL_STATE_DICT, get_optimizer_state_dict with full_state_dict=True and "
            "cpu_offload=True) is one memory for all state of a parameter, so the momentum is lost. Save "
            "get_optimizer_state_dict without cpu_offload, the sharded state, or through lion_dist.checkpoint"
        )


_DCP = "Load into an optimizer with"
_WAY = (
    "whose state_dict this optimizer then loads and converts, or go through lion_dist.checkpoint. dcp.load may have "
    "written to this optimizer's momenta already: load again before you train"
)


def readable_parts(t: Any) -> list[Tensor] | None:
    """The plain tensors of which this rank's part of a tensor consists; None where there are none to be read."""
    part = local(t)
    found = list(part.parts) if isinstance(part, BoxTensor) else [part]
    return found if all(isinstance(part, Tensor) and is_readable(part) for part in found) else None


def is_readable(t: Tensor) -> bool:
    """Whether t is a plain tensor whose numbers can be read."""
    if type(t).__torch_dispatch__ is not Tensor.__torch_dispatch__ or t.layout != torch.strided:
        return False
    return not t.is_meta and not is_freed(t)


def _are_codes(parts: list[Tensor]) -> bool:
    """Whether all numbers are integers of 8 bits, and some are not 0."""
    alike = all(bool(((t == t.round()) & (t >= -128) & (t <= 127)).all()) for t in parts)
    return alike and any(bool(t.any()) for t in parts)


def _share(m: Tensor, parts: list[Tensor], remainder: Any) -> bool:
    """Whether a momentum and a remainder are the same numbers, and some are not 0, or lie in the same memory."""
    if m.dtype != torch.float32 or not isinstance(remainder, Tensor) or remainder.dtype != torch.float32:
        return False
    # torch cuts only the kinds of state that the optimizer has.
    others = readable_parts(own_part(remainder, m) if is_dtensor(m) else remainder)
    if others is None:
        return False
    if [t.shape for t in parts] != [t.shape for t in others]:
        return False
    pairs = [(a, b) for a, b in zip(parts, others, strict=True) if a.numel()]
    if any(a.device == b.device and a.data_ptr() == b.data_ptr() for a, b in pairs):
        return True
    return all(torch.equal(a, b.to(a.device)) for a, b in pairs) and any(bool(a.any()) for a, _ in pairs)
