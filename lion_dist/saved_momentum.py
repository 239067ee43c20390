"""The momentum and the remainder in an entry of a state_dict, converted to the form in which the optimizer keeps them.

A saved momentum has one of three forms: numbers; numbers that are to be multiplied by a 0-dimensional scale (which
`Lion` shows for sharded parameters whose momentum has 8 bits; the scale is 1 then); or int8 codes with a scale for each
block. An optimizer keeps numbers, or codes with scales. `ShardedLion` may be given either as `BoxTensor`s, which each
rank converts if they are its own part. Remainders are int16, or the same integers as float32.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .dtensors import local
from .dtypes import dtype_name
from .fsdp import is_flat_view, misfit
from .hyper_values import shown
from .meshes import local_box, own_part
from .momentum_codes import BLOCK, cast, decoded, decoded_run, encoded, encoded_run, in_order_of, scales_of
from .param_groups import Group, state_columns
from .sharding.box_tensor import BoxTensor
from .sharding.boxes import memory_order
from .torch_entries import is_readable
from .update.state import EXP_AVG, EXP_AVG_SCALE, REMAINDER, StateColumn

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def shows_float32(groups: Sequence[Group]) -> bool:
    """Whether `Lion` shows the momenta of bfloat16 parameters that FSDP1 has flattened in float32.

    FSDP1 gathers all state of a flat parameter in one dtype, and remainders are shown in float32. A rank does not know
    which parameters share a flat parameter, so that one remainder decides for all of them. On a load these momenta get
    the dtype that new ones would have.
    """
    return any(
        is_flat_view(p) and any(column.name == REMAINDER for column in state_columns(p, group))
        for group in groups
        for p in group["params"]
    )


def in_kept_form(
    i: Any,
    entry: Mapping[str, Any],
    p: Tensor,
    columns: Sequence[StateColumn],
    own: Mapping[str, Any],
    casts: bool = False,
) -> Mapping[str, Any]:
    """Converts the momentum and the remainder of an entry. Leaves out a remainder that the parameter has no use for.

    Args:
        i: key of the entry, for messages.
        entry: the entry of a parameter.
        p: the parameter.
        columns: the columns of the state that the optimizer will keep.
        own: the optimizer's present entry.
        casts: whether numbers get the column's dtype, even if the column keeps the one in which they were saved.

    Returns:
        A copy of the entry, or the entry itself where its momentum does not have the shape and sharding of the
        parameter: it is to be refused then.

    Raises:
        ValueError: scales are missing, damaged, or do not fit; remainders are no integers of 16 bits; or a BoxTensor is
            not this rank's part.
    """
    kept = {column.name: column for column in columns}
    m, scale = entry.get(EXP_AVG), entry.get(EXP_AVG_SCALE)
    if not isinstance(m, Tensor) or not _fits(m, p):
        return entry
    rest = {k: v for k, v in entry.items() if k not in (EXP_AVG, EXP_AVG_SCALE) and (k != REMAINDER or k in kept)}
    who = f"of parameter {shown(i)}"
    if m.dtype == torch.int8:
        found = _from_codes(who, m, _checked_scales(who, m, scale, p), p, kept[EXP_AVG].dtype)
    elif m.dtype in _FLOATS:
        if casts and scale is None and kept[EXP_AVG].dtype != torch.int8:
            m = cast(m, kept[EXP_AVG].dtype)
        found = _from_numbers(who, m, scale, p, kept[EXP_AVG].dtype, own)
    else:
        raise ValueError(
            f"{EXP_AVG} {who} is {dtype_name(m.dtype)}; expected float32, bfloat16, float16, or int8 with "
            f"{EXP_AVG_SCALE}. Is this the state_dict of another model?"
        )
    if REMAINDER in rest:
        rest[REMAINDER] = _integers(who, rest[REMAINDER], p)
    return {**found, **rest}


def own_entry(entry: Mapping[str, Any], p: Tensor, columns: Container[str]) -> dict[str, Any]:
    """An entry with this rank's part of each tensor that is whole, where its parameter is a DTensor.

    Codes of the whole parameter are decoded: blocks are those of what a rank holds.

    Args:
        entry: the entry.
        p: the parameter, a DTensor.
        columns: names of the columns of its state.
    """
    found = dict(entry)
    m, scale = found.get(EXP_AVG), found.get(EXP_AVG_SCALE)
    if type(m) is type(scale) is Tensor and m.dtype == torch.int8 and m.shape == p.shape and is_readable(m):
        found[EXP_AVG] = decoded(m, _checked_scales("of a whole parameter", m, scale, m), m)
        found[EXP_AVG_SCALE] = torch.ones((), dtype=torch.float32, device=m.device)
    # A parameter may have no dimensions. Then other entries of this shape may be numbers that a wrapper keeps.
    return {key: own_part(t, p) if p.dim() or key in columns else t for key, t in found.items()}


def _fits(m: Tensor, p: Tensor) -> bool:
    """Whether a momentum can be read, and has the shape and sharding of p on this rank."""
    if m.shape != p.shape or m.layout != torch.strided or m.is_meta:
        return False
    if isinstance(m, BoxTensor):
        return True
    return not misfit(m, p, p.shape) and is_readable(local(m))


def _integers(who: str, remainder: Any, p: Tensor) -> Any:
    """Remainders that are shown as float32, as int16; anything else as it is."""
    if not isinstance(remainder, Tensor) or remainder.dtype != torch.float32 or not _fits(remainder, p):
        return remainder
    part = local(remainder)
    for numbers in part.parts if isinstance(part, BoxTensor) else [part]:
        damaged = ~((numbers == numbers.round()) & (numbers >= -(2**15)) & (numbers < 2**15))
        if damaged.any():
            raise ValueError(
                f"{REMAINDER} {who} has the number {numbers[damaged][0].item()}; expected int16, or integers of 16 "
                "bits in float32. The state_dict is damaged"
            )
    return remainder.to(torch.int16)


def _checked_scales(who: str, codes: Tensor, scale: Any, p: Tensor) -> Tensor:
    """The scales of codes. Raises ValueError where they are not one finite number >= 0 for each block."""
    if scale is None:
        raise ValueError(
            f"{EXP_AVG} {who} is int8, but its scales, {EXP_AVG_SCALE!r}, are missing. Of a flattened state_dict "
            "(flatten_optimizer_state_dict=True) torch passes on only the kinds of state that this optimizer has, and "
            "so no scales to a momentum that is not int8: save and load the nested form, without that option"
        )
    boxed = isinstance(codes, BoxTensor)
    expected = (scales_of(local(p).numel()),)
    good = isinstance(scale, BoxTensor) if boxed else isinstance(scale, Tensor) and is_readable(scale)
    if not good or scale.shape != expected or scale.dtype != torch.float32:
        got = f"{tuple(scale.shape)} {scale.dtype}" if isinstance(scale, Tensor) else type(scale).__name__
        raise ValueError(
            f"{EXP_AVG_SCALE} {who} is {got}; expected a {'BoxTensor' if boxed else 'plain tensor'} of shape "
            f"{expected} in float32, one scale for each {BLOCK} elements of {EXP_AVG}"
        )
    for part in scale.parts if boxed else [scale]:
        damaged = ~(part.isfinite() & (part >= 0))
        if damaged.any():
            raise ValueError(
                f"{EXP_AVG_SCALE} {who} has the scale {part[damaged][0].item()}; expected finite numbers >= 0. The "
                "state_dict is damaged"
            )
    found: Tensor = scale
    return found


def _from_codes(who: str, codes: Tensor, scale: Tensor, p: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """The momentum of codes, which have been checked, in the form of ``dtype``."""
    if isinstance(codes, BoxTensor) or isinstance(scale, BoxTensor):
        assert isinstance(codes, BoxTensor)
        assert isinstance(scale, BoxTensor)
        if dtype == torch.int8:
            return {EXP_AVG: codes, EXP_AVG_SCALE: scale}
        return {EXP_AVG: _decoded_boxes(who, codes, scale, p, dtype)}
    if dtype != torch.int8:
        return {EXP_AVG: cast(decoded(codes, scale, p), dtype)}
    if not in_order_of(p, codes):
        codes, scale = encoded(decoded(codes, scale, p), p)
    return {EXP_AVG: codes, EXP_AVG_SCALE: scale}


def _from_numbers(
    who: str, m: Tensor, scale: Any, p: Tensor, dtype: torch.dtype, own: Mapping[str, Any]
) -> dict[str, Tensor]:
    """A momentum of numbers in the form of ``dtype``. Numbers that have no scale stay in the dtype they have."""
    if scale is not None:
        factor = _factor(who, scale)
        to = torch.float32 if dtype == torch.int8 else dtype
        if isinstance(m, BoxTensor):
            m = m.map(lambda part: cast(part.float() * factor, to), torch.empty(0, dtype=to, device=m.device))
        else:
            m = cast(m if factor == 1 else m.float() * factor, to)
    if dtype != torch.int8:
        return {EXP_AVG: m}
    codes, scale = _encoded_boxes(who, m, p, own) if isinstance(m, BoxTensor) else encoded(m, p)
    return {EXP_AVG: codes, EXP_AVG_SCALE: scale}


def _factor(who: str, scale: Any) -> float:
    """The number that all of a momentum is to be multiplied by."""
    if not isinstance(scale, (int, float)) and not (
        isinstance(scale, Tensor) and is_readable(scale) and not scale.dim() and scale.is_floating_point()
    ):
        got = f"of shape {tuple(scale.shape)}" if isinstance(scale, Tensor) else f"a {type(scale).__name__}"
        raise ValueError(
            f"{EXP_AVG_SCALE} {who} is {got}, and its {EXP_AVG} is no int8; expected one scale of shape (), or none"
        )
    factor = float(scale)
    if not (math.isfinite(factor) and factor >= 0):
        raise ValueError(f"{EXP_AVG_SCALE} {who} is {factor}; expected a finite number >= 0. The state_dict is damaged")
    return factor


# BoxTensors -----------------------------------------------------------------------------------------

_Runs = Sequence[tuple[int, int]]  # first element and length of each


def _runs(scale: BoxTensor, p: Tensor) -> _Runs:
    """The runs of the elements that this rank holds of p, in memory order, to which its scales belong."""
    starts = [(box.offsets[0] * BLOCK, box.sizes[0] * BLOCK) for box in scale.boxes]
    return [(start, min(length, local(p).numel() - start)) for start, length in starts]


def _boxes_of(p: Tensor, runs: _Runs, numbers: Sequence[Tensor], dtype: torch.dtype, device: torch.device) -> BoxTensor:
    part = local(p)
    pairs = [(start, cast(t, dtype)) for (start, _), t in zip(runs, numbers, strict=True)]
    found = BoxTensor.of_runs(part.shape, part.stride(), pairs, torch.empty(0, dtype=dtype, device=device))
    return found.within(p.shape, local_box(p).offsets)


def _split(t: BoxTensor, p: Tensor, runs: _Runs) -> tuple[Tensor, ...]:
    """The elements of each run. ``t`` has the boxes of these runs."""
    order = memory_order(local(p).stride())
    parts = [part.permute(order).reshape(-1) for part in t.parts]
    whole: Tensor = torch.cat([*parts, torch.empty(0, dtype=t.dtype, device=t.device)])
    return tuple(torch.split(whole, [n for _, n in runs]))


def _decoded_boxes(who: str, codes: BoxTensor, scale: BoxTensor, p: Tensor, dtype: torch.dtype) -> BoxTensor:
    if not local(p).numel():
        return codes.map(lambda part: part.to(dtype), torch.empty(0, dtype=dtype, device=codes.device))
    runs = _runs(scale, p)
    if sum(n for _, n in runs) != sum(box.numel for box in codes.boxes):
        raise ValueError(f"{EXP_AVG} and {EXP_AVG_SCALE} {who} are BoxTensors of different parts of it. {_ADVICE}")
    numbers = [decoded_run(c, s) for c, s in zip(_split(codes, p, runs), scale.parts, strict=True)]
    found = _boxes_of(p, runs, numbers, dtype, codes.device)
    if found.boxes != codes.boxes:
        raise ValueError(f"{EXP_AVG} and {EXP_AVG_SCALE} {who} are BoxTensors of different parts of it. {_ADVICE}")
    return found


def _encoded_boxes(who: str, m: BoxTensor, p: Tensor, own: Mapping[str, Any]) -> tuple[BoxTensor, BoxTensor]:
    codes, scale = own.get(EXP_AVG), own.get(EXP_AVG_SCALE)
    if not isinstance(codes, BoxTensor) or not isinstance(scale, BoxTensor) or m.boxes != codes.boxes:
        raise ValueError(
            f"{EXP_AVG} {who} is a BoxTensor of another cut (other ranks or parameters) than this ShardedLion's, so "
            f"it cannot become 8-bit codes. {_ADVICE}"
        )
    if not local(p).numel():
        return codes.map(torch.zeros_like), scale.map(torch.zeros_like)
    runs = _runs(scale, p)
    pairs = [encoded_run(t) for t in _split(m, p, runs)]
    starts = [box.offsets[0] for box in scale.boxes]
    scales = [(start, s) for start, (_, s) in zip(starts, pairs, strict=True)]
    return (
        _boxes_of(p, runs, [c for c, _ in pairs], torch.int8, m.device),
        BoxTensor.of_runs(scale.shape, (1,), scales, torch.empty(0, dtype=torch.float32, device=m.device)),
    )


_ADVICE = "Load a full_state_dict(), or go through lion_dist.checkpoint"
