"""Values that are no tensors, as JSON and back, with nothing that would execute.

None, booleans, numbers, strings, lists, tuples, dicts, Counters, dtypes and small tensors come back as what they were
(an OrderedDict as a dict, named tuples and enumerations of numbers as what they are made of); anything else is refused
when it is saved. What JSON lacks stands as a dict of one key that begins with "$":

    {"$float": "nan"}  {"$tuple": [...]}  {"$dict": [[key, value], ...]}  {"$counter": {"$dict": ...}}
    {"$dtype": "bfloat16"}
    {"$tensor": {"dtype": "float32", "shape": [2], "values": [0.1, 0.2]}}
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from typing import Any

import torch
from torch import Tensor

# What a tensor may be of. Its bytes stand in the machine's own order, little-endian on all that torch runs on.
DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name)
    for name in (
        "bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "float16", "bfloat16",
        "float32", "float64", "complex32", "complex64", "complex128", "float8_e4m3fn", "float8_e5m2",
    )
}  # fmt: skip
MAX_VALUES = 8192  # of a tensor that is written as text; a generator's state has 5056


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def to_plain(value: Any, where: str) -> Any:
    """What `json.dumps` takes.

    Raises:
        TypeError: naming ``where``, for what cannot be saved.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": str(float(value))}
    if isinstance(value, list):
        return [to_plain(v, f"{where}[{i}]") for i, v in enumerate(value)]
    if isinstance(value, tuple):
        return {"$tuple": [to_plain(v, f"{where}[{i}]") for i, v in enumerate(value)]}
    if type(value) is Counter:  # milestones of MultiStepLR
        return {"$counter": to_plain(dict(value), where)}
    if type(value) in (dict, OrderedDict):
        if all(isinstance(k, str) and not k.startswith("$") for k in value):
            return {k: to_plain(v, f"{where}.{k}") for k, v in value.items()}
        return {"$dict": [[to_plain(k, f"a key of {where}"), to_plain(v, f"{where}[{k!r}]")] for k, v in value.items()]}
    if isinstance(value, torch.dtype):
        return {"$dtype": dtype_name(value)}
    if isinstance(value, Tensor) and value.numel() <= MAX_VALUES and not value.is_complex():
        flat = value.detach().cpu().reshape(-1)
        values = [to_plain(v, where) for v in (flat.double() if flat.is_floating_point() else flat).tolist()]
        return {"$tensor": {"dtype": dtype_name(value.dtype), "shape": list(value.shape), "values": values}}
    if hasattr(value, "item") and getattr(value, "shape", None) == ():  # NumPy's numbers
        return to_plain(value.item(), where)
    raise TypeError(
        f"{where} is a {type(value).__name__}, which a checkpoint cannot hold: None, bool, numbers, str, list, tuple, "
        f"dict, torch.dtype and tensors of up to {MAX_VALUES} elements can be saved, since loading them runs no code"
    )


def from_plain(value: Any) -> Any:
    """What was given to `to_plain`.

    Raises:
        ValueError: it is not what `to_plain` writes.
    """
    if isinstance(value, list):
        return [from_plain(v) for v in value]
    if not isinstance(value, dict):
        return value
    if not any(k.startswith("$") for k in value):
        return {k: from_plain(v) for k, v in value.items()}
    if len(value) == 1:
        ((kind, inner),) = value.items()
        try:
            if kind == "$float" and isinstance(inner, str):
                return float(inner)
            if kind == "$tuple" and isinstance(inner, list):
                return tuple(from_plain(v) for v in inner)
            if kind == "$dict" and isinstance(inner, list):
                return {from_plain(k): from_plain(v) for k, v in inner}
            if kind == "$counter" and isinstance(counts := from_plain(inner), dict):
                return Counter(counts)
            if kind == "$dtype":
                return DTYPES[inner]
            if kind == "$tensor" and len(inner["values"]) <= MAX_VALUES:
                return torch.tensor(from_plain(inner["values"]), dtype=DTYPES[inner["dtype"]]).reshape(inner["shape"])
        except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise ValueError(f"{str(value)[:80]} cannot be read: {type(error).__name__}: {error}") from error
    raise ValueError(f"{str(value)[:80]} is nothing that a checkpoint holds")
