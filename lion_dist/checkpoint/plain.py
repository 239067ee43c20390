"""Values that are no tensors, as JSON and back, with nothing that would execute.

None, booleans, numbers, strings, bytes, lists, tuples, dicts, Counters, dtypes, paths, small tensors and small NumPy
arrays come back as what they were (an OrderedDict as a dict, a bytearray as bytes, named tuples and enumerations of
numbers as what they are made of, NumPy's scalars and arrays without dimensions as Python's numbers); anything
else is refused when it is saved. What JSON lacks stands as a dict of one key that begins with "$":

    {"$float": "nan"}  {"$tuple": [...]}  {"$dict": [[key, value], ...]}  {"$counter": {"$dict": ...}}
    {"$dtype": "bfloat16"}  {"$bytes": "AAE="}  {"$path": "runs/1"}
    {"$tensor": {"dtype": "float32", "shape": [2], "values": [0.1, 0.2]}}
    {"$array": {"dtype": "uint32", "shape": [2], "values": [1, 2]}}
"""

from __future__ import annotations

import base64
import math
import sys
from collections import Counter, OrderedDict
from collections.abc import Iterable
from pathlib import Path, PurePath
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
ARRAY_DTYPES = frozenset({
    "bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "float16", "float32", "float64",
})  # fmt: skip
# A checkpoint is read by whoever is given it, so each of these bounds what a small file can cost its reader.
MAX_VALUES = 8192  # of a tensor or array that is written as text; a generator's state has 5056
MAX_BYTES = 1 << 20
MAX_BITS = 4096  # of a whole number; a generator's state has 128
MAX_DEPTH = 100  # of values within values
_MAX_ALIKE = 64  # keys of one dict with the same hash


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def to_plain(value: Any, where: str, depth: int = 0) -> Any:
    """What `json.dumps` takes.

    Raises:
        TypeError: naming ``where``, for what cannot be saved.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        if value.bit_length() > MAX_BITS:
            raise TypeError(f"{where} is a number of {value.bit_length()} bits; a checkpoint holds up to {MAX_BITS}")
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": str(float(value))}
    if depth > MAX_DEPTH:
        raise TypeError(f"{where[:100]} is nested more than {MAX_DEPTH} deep, which a checkpoint cannot hold")
    depth += 1
    if isinstance(value, list):
        return [to_plain(v, f"{where}[{i}]", depth) for i, v in enumerate(value)]
    if isinstance(value, tuple):
        return {"$tuple": [to_plain(v, f"{where}[{i}]", depth) for i, v in enumerate(value)]}
    if type(value) is Counter:  # milestones of MultiStepLR
        return {"$counter": to_plain(dict(value), where, depth)}
    if type(value) in (dict, OrderedDict):
        if all(isinstance(k, str) and not k.startswith("$") for k in value):
            return {k: to_plain(v, f"{where}.{k}", depth) for k, v in value.items()}
        pairs = value.items()
        return {
            "$dict": [
                [to_plain(k, f"a key of {where}", depth), to_plain(v, f"{where}[{k!r}]", depth)] for k, v in pairs
            ]
        }
    if isinstance(value, torch.dtype):
        return {"$dtype": dtype_name(value)}
    if isinstance(value, (bytes, bytearray)) and len(value) <= MAX_BYTES:
        return {"$bytes": base64.b64encode(value).decode()}
    if isinstance(value, PurePath):
        return {"$path": str(value)}
    if isinstance(value, Tensor) and value.numel() <= MAX_VALUES and not value.is_complex():
        flat = value.detach().cpu().reshape(-1)
        values = [to_plain(v, where) for v in (flat.double() if flat.is_floating_point() else flat).tolist()]
        return {"$tensor": {"dtype": dtype_name(value.dtype), "shape": list(value.shape), "values": values}}
    if hasattr(value, "item") and getattr(value, "shape", None) == ():  # NumPy's numbers
        number = value.item()
        if isinstance(number, (bool, int, float, str, bytes)):
            return to_plain(number, where)
    numpy = sys.modules.get("numpy")
    is_array = numpy is not None and isinstance(value, numpy.ndarray)
    if is_array and value.dtype.name in ARRAY_DTYPES and value.size <= MAX_VALUES:
        values = [to_plain(v, where) for v in value.reshape(-1).tolist()]
        return {"$array": {"dtype": value.dtype.name, "shape": list(value.shape), "values": values}}
    raise TypeError(
        f"{where} is a {type(value).__name__}, which a checkpoint cannot hold: None, bool, numbers, str, bytes of up "
        f"to {MAX_BYTES}, list, tuple, dict, torch.dtype, Path, and tensors and NumPy arrays of up to {MAX_VALUES} "
        "numbers can be saved, since loading them runs no code"
    )


def from_plain(value: Any, depth: int = 0) -> Any:
    """What was given to `to_plain`.

    Raises:
        ValueError: it is not what `to_plain` writes.
    """
    if depth > MAX_DEPTH * 2:  # a dict with other keys than strings takes two levels
        raise ValueError(f"a value is nested more than {MAX_DEPTH} deep")
    depth += 1
    if isinstance(value, list):
        return [from_plain(v, depth) for v in value]
    if not isinstance(value, dict):
        return value
    if not any(k.startswith("$") for k in value):
        return {k: from_plain(v, depth) for k, v in value.items()}
    if len(value) == 1:
        ((kind, inner),) = value.items()
        try:
            if kind == "$float" and inner in ("nan", "inf", "-inf"):
                return float(inner)
            if kind == "$tuple" and isinstance(inner, list):
                return tuple(from_plain(v, depth) for v in inner)
            if kind == "$dict" and isinstance(inner, list):
                return _dict([(from_plain(k, depth), from_plain(v, depth)) for k, v in inner])
            if kind == "$counter" and isinstance(counts := from_plain(inner, depth), dict):
                return Counter(counts)
            if kind == "$dtype" and isinstance(inner, str):
                return DTYPES[inner]
            if kind == "$bytes" and isinstance(inner, str) and len(inner) <= 2 * MAX_BYTES:
                return base64.b64decode(inner, validate=True)
            if kind == "$path" and isinstance(inner, str):
                return Path(inner)
            if kind in ("$tensor", "$array") and isinstance(inner, dict):
                return _numbers(kind, **inner)
        except (KeyError, TypeError, ValueError, RuntimeError, OverflowError, ImportError) as error:
            if isinstance(error, RecursionError):
                raise
            raise ValueError(f"{str(value)[:80]} cannot be read: {type(error).__name__}: {error}") from error
    raise ValueError(f"{str(value)[:80]} is nothing that a checkpoint holds")


def _dict(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """Python's hashes of numbers can be foreseen, and a dict of keys that have one hash takes quadratic time."""
    alike = Counter(hash(key) for key, _ in pairs)
    if alike and max(alike.values()) > _MAX_ALIKE:
        raise ValueError(f"more than {_MAX_ALIKE} keys have the same hash")
    return dict(pairs)


def _numbers(kind: str, dtype: str, shape: list[int], values: list[Any]) -> Any:
    if not isinstance(dtype, str) or not isinstance(values, list) or not isinstance(shape, list):
        raise ValueError("its dtype is no name, or its shape or values are no lists")
    if not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError("its shape is no list of numbers")
    if len(values) > MAX_VALUES or math.prod(shape) != len(values):
        raise ValueError(f"it has {len(values)} values, of up to {MAX_VALUES}, for its shape")
    found = from_plain(values)
    of = bool if dtype == "bool" else int if dtype.startswith(("int", "uint")) else float
    if not all(type(v) is of for v in found):
        raise ValueError(f"its values are not those of {dtype[:40]!r}")
    if kind == "$tensor":
        return torch.tensor(found, dtype=DTYPES[dtype]).reshape(shape)
    if dtype not in ARRAY_DTYPES:
        raise ValueError(f"an array is of {dtype[:40]!r}")
    import numpy

    return numpy.array(found, dtype=dtype).reshape(shape)


def too_deep(value: Any) -> bool:
    """Whether JSON values are nested deeper than `from_plain` reads. Takes no stack of its own."""
    level: Iterable[Any] = [value] if isinstance(value, (dict, list)) else []
    for _ in range(2 * MAX_DEPTH + 2):
        level = [
            inner
            for of in level
            for inner in (of.values() if isinstance(of, dict) else of)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return False
    return True
