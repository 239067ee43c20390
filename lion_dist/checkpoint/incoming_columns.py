"""How stored weights, remainders and momenta reach those here, which may be kept in other forms.

    stored weight            here float32   bfloat16 with remainder        bfloat16
    float32                  as it is       split: nothing is lost         cast, halves to even
    master weight, float32   as it is       split: nothing is lost         cast: the weights that were saved
    bfloat16                 cast           as it is, the remainder is 0   as it is
    bfloat16 and remainder   joined         as it is                       cast: the bfloat16 weights

The last are saved by torch's own functions, through Writer. "cast" is refused without cast=True, as are other changes
of dtype. A float momentum loads into an 8-bit momentum without cast=True, and an 8-bit momentum into a float one: the
optimizer that loads decides which of the two it has. A momentum that becomes float32 needs no cast=True either.
Codes stay as they are where the blocks that share a scale are the same here; otherwise they are decoded and encoded
again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from ..param_groups import Group, remainder_column
from ..update import codecs
from ..update.codecs import BLOCK
from ..update.state import EXP_AVG, EXP_AVG_SCALE, REMAINDER
from .contents import Contents
from .conversions import as_float32, as_int16, decoded, remainders, rounded, scaled
from .keys import MODEL, STATE

CONVERTED = (EXP_AVG, EXP_AVG_SCALE, REMAINDER)  # entries that are handled here


@dataclass
class Routes:
    """Where the columns of one parameter's state come from.

    Attributes:
        read: key of the stored tensor that is read into an entry of optimizer.state, by entry.
        dtypes: dtypes of these entries, where they are missing here and have to be made.
        encoded: whether the momentum is read in float32, and then encoded into codes and scales.
    """

    read: dict[str, str] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    encoded: bool = False

    @property
    def filled(self) -> set[str]:
        """The entries that the load fills."""
        return {*self.read, EXP_AVG_SCALE} if self.encoded else set(self.read)


# Weights --------------------------------------------------------------------------------------------


def has_remainder(contents: Contents, name: str, p: Tensor, group: Group, own: Container[str]) -> bool:
    """Whether a parameter has a remainder here once it is loaded.

    Args:
        contents: the checkpoint.
        name, p, group: the parameter.
        own: its present entries in optimizer.state.
    """
    if remainder_column(p, group) is None:
        return False
    return p.requires_grad or REMAINDER in own or STATE + name + "." + EXP_AVG in contents.tensors


def check_weight(
    contents: Contents, name: str, dtype: torch.dtype, shape: tuple[int, ...], remainder: bool, listed: bool
) -> None:
    """Checks that a parameter can be loaded, and sets its conversion.

    Args:
        contents: the checkpoint.
        name: name of the parameter.
        dtype, shape: of the whole parameter here.
        remainder: as from `has_remainder`.
        listed: whether it is among the parameters of the optimizer, or there is none; for the message.

    Raises:
        ValueError: it cannot be loaded.
    """
    key = MODEL + name
    stored = contents.tensor(key, shape).torch_dtype
    master = contents.is_master(name)
    if dtype == torch.bfloat16 and stored != dtype and stored.is_floating_point and (remainder or master):
        if contents.cast or (remainder and stored == torch.float32):
            contents.convert(key, rounded)
            return
        if master:
            if not listed:
                raise ValueError(
                    f"{key} holds master weights (float32) in the checkpoint and is bfloat16 here, and not among the "
                    "optimizer's parameters, which alone have master weights: make the optimizer with all parameters "
                    "that it had when it was saved, the frozen ones too"
                )
            raise ValueError(
                f"{key} holds master weights (float32) in the checkpoint and is bfloat16 here, without master weights: "
                "make the optimizer with master_weights=True, or pass cast=True to load the bfloat16 weights alone"
            )
    contents.check_tensor(key, dtype, shape)


def check_joined(contents: Contents, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> str | None:
    """Finds out whether a float32 weight here was saved in two halves, and if so sets the conversion of the upper one.

    Args:
        contents: the checkpoint.
        name: name of the parameter.
        dtype, shape: of the whole parameter here.

    Returns:
        The key of the remainders, which are to be joined with the weight once this is read; None if there are none.

    Raises:
        ValueError: what is stored cannot be used.
    """
    weight, key = contents.tensor(MODEL + name, shape).torch_dtype, STATE + name + "." + REMAINDER
    if dtype != torch.float32 or weight != torch.bfloat16 or key not in contents.tensors:
        return None
    _check_remainder(contents, key, shape)
    contents.convert(MODEL + name, as_float32)
    contents.convert(key, as_int16)
    return key


def joining(parts: Sequence[Tensor]) -> tuple[list[Tensor], Callable[[], None]]:
    """Memory to read the lower halves of float32 weights into, whose upper halves are read already.

    Args:
        parts: the weights: this rank's plain tensors.

    Returns:
        int16 tensors of the same shapes to read into; and a function to call then.
    """
    remainders = [torch.empty_like(part, dtype=torch.int16) for part in parts]

    def join() -> None:
        for part, r in zip(parts, remainders, strict=True):
            part.copy_(codecs.join(codecs.split(part)[0], r))

    return remainders, join


def route_remainder(
    routes: Routes, contents: Contents, name: str, keys: Mapping[str, str], shape: tuple[int, ...], remainder: bool
) -> None:
    """Finds where a remainder comes from. Without a route it becomes 0. Not for weights of `check_joined`.

    Args:
        routes: is completed.
        contents: the checkpoint.
        name: name of the parameter.
        keys: the stored entries of its state.
        shape: shape of the whole parameter.
        remainder: as from `has_remainder`.

    Raises:
        ValueError: what is stored cannot be used.
    """
    weight, key = contents.tensors[MODEL + name].torch_dtype, keys.get(REMAINDER)
    if key is not None and weight == torch.bfloat16:  # saved by torch's functions, through Writer
        _check_remainder(contents, key, shape)
        if remainder:
            routes.read[REMAINDER] = key
            contents.convert(key, as_int16)
        elif not contents.cast:
            raise ValueError(
                f"{key} belongs to master weights, which this optimizer does not keep for the parameter: make the "
                "optimizer with master_weights=True and bfloat16 parameters, or pass cast=True to load the bfloat16 "
                "weights alone"
            )
    elif remainder and weight != torch.bfloat16:
        routes.read[REMAINDER] = STATE + name + "." + REMAINDER
        contents.convert(routes.read[REMAINDER], remainders, MODEL + name)


def _check_remainder(contents: Contents, key: str, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless remainders are int16 or, as under FSDP, the same integers in float32."""
    dtype = contents.tensor(key, shape).torch_dtype
    if dtype == torch.int16:
        return
    if dtype != torch.float32:
        raise ValueError(f"{key} is {contents.tensors[key].dtype} in the checkpoint; expected int16, or float32")

    def check(values: Tensor) -> None:
        bad = values[~((values == values.round()) & (values >= -(2**15)) & (values < 2**15))]
        if len(bad):
            raise ValueError(f"{key} has {bad[0].item()} in the checkpoint; expected integers of 16 bits")

    contents.scan(key, check)


# Momenta --------------------------------------------------------------------------------------------


def stored_scale(contents: Contents, keys: Mapping[str, str], shape: tuple[int, ...]) -> Tensor | None:
    """The scales of a stored momentum.

    Args:
        contents: the checkpoint.
        keys: the stored entries of the parameter's state.
        shape: shape of the whole parameter.

    Returns:
        float32 on the CPU: shape (ceil(numel / 128),) for codes; shape () for a float momentum that is to be multiplied
        by it; None for a float momentum alone.

    Raises:
        ValueError: the momentum has another dtype, or its scales are missing, misshapen, negative or not finite.
    """
    entry = contents.tensors[keys[EXP_AVG]]
    key = keys.get(EXP_AVG_SCALE)
    if entry.torch_dtype != torch.int8 and not entry.torch_dtype.is_floating_point:
        raise ValueError(f"{keys[EXP_AVG]} is {entry.dtype} in the checkpoint; expected a float dtype, or int8 codes")
    blocks = (-(-prod(shape) // BLOCK),) if entry.torch_dtype == torch.int8 else ()
    if key is None:
        if entry.torch_dtype == torch.int8:
            raise ValueError(
                f"{keys[EXP_AVG]} is int8 in the checkpoint, which has no {EXP_AVG_SCALE} for the parameter; expected "
                f"float32 scales of shape {blocks}"
            )
        return None
    stored = contents.tensors.get(key)
    if stored is None or stored.torch_dtype != torch.float32 or stored.shape != blocks:
        found = "not a tensor" if stored is None else f"{stored.dtype} of shape {stored.shape}"
        raise ValueError(
            f"{key} is {found} in the checkpoint; expected float32 of shape {blocks}, for a momentum in {entry.dtype}"
        )
    scale = contents.fetch(key, 4 * prod(blocks))
    bad = ((scale < 0) | ~(scale < math.inf)).reshape(-1).nonzero()
    if len(bad):
        first = int(bad[0])
        raise ValueError(
            f"{key} has {scale.reshape(-1)[first].item()} at position {first} in the checkpoint; scales must be finite "
            "and not negative: the checkpoint is not one that lion_dist saves"
        )
    return scale


def route_codes(
    routes: Routes, contents: Contents, keys: Mapping[str, str], scale: Tensor | None, whole_blocks: bool
) -> None:
    """Finds how an 8-bit momentum here is loaded.

    Args:
        routes: is completed.
        contents: the checkpoint.
        keys: the stored entries of the parameter's state.
        scale: from `stored_scale`.
        whole_blocks: as from `optimizer_state.has_whole_blocks`.
    """
    key = routes.read[EXP_AVG] = keys[EXP_AVG]
    if contents.tensors[key].torch_dtype == torch.int8 and whole_blocks:
        routes.read[EXP_AVG_SCALE] = keys[EXP_AVG_SCALE]
    else:
        routes.encoded = True
        set_conversion(contents, key, scale)


def set_conversion(contents: Contents, key: str, scale: Tensor | None) -> None:
    """Makes the load convert a stored momentum to float32, given its scales from `stored_scale`."""
    if scale is None:
        contents.convert(key, as_float32)
    else:
        contents.convert(key, decoded(scale) if scale.dim() else scaled(scale))
