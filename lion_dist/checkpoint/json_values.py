"""Values that are not tensors, as JSON and back. Reading them runs no code.

None, booleans, numbers, strings, bytes, lists, tuples, dicts, Counters, dtypes, paths, small tensors and small NumPy
arrays come back as they were. A few types come back as simpler ones: an OrderedDict as a dict, a bytearray as bytes, a
named tuple as a tuple, an enumeration of numbers as numbers, a NumPy scalar or 0-d array as a Python number. Every
other type is refused when it is saved. What JSON lacks is written as a dict of one key that begins with "$":

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

from ..dtypes import DTYPES, dtype_name

ARRAY_DTYPES = frozenset({
    "bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "float16", "float32", "float64",
})  # fmt: skip
# Anybody may have written a checkpoint, so these limits bound what a small file can cost its reader.
MAX_VALUES = 8192  # elements of a tensor or array that is written as text; the state of a generator has 5056
MAX_BYTES = 1 << 20  # length of a bytes object
MAX_BITS = 4096  # bits of an integer; the state of a generator has integers of 128
MAX_DEPTH = 100  # levels of values within values
_MAX_SAME_HASH = 64  # keys of one dict that have the same hash


def to_json(value: Any, where: str, depth: int = 0) -> Any:
    """Converts a value to what `json.dumps` takes.

    Args:
        value: the value.
        where: its name in messages.
        depth: number of values that it lies within.

    Raises:
        TypeError: the value cannot be saved.
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
        return [to_json(v, f"{where}[{i}]", depth) for i, v in enumerate(value)]
    if isinstance(value, tuple):
        return {"$tuple": [to_json(v, f"{where}[{i}]", depth) for i, v in enumerate(value)]}
    if type(value) is Counter:  # such as the milestones of MultiStepLR
        return {"$counter": to_json(dict(value), where, depth)}
    if type(value) in (dict, OrderedDict):
        if all(isinstance(k, str) and not k.startswith("$") for k in value):
            return {k: to_json(v, f"{where}.{k}", depth) for k, v in value.items()}
        pairs = value.items()
        return {
            "$dict": [[to_json(k, f"a key of {where}", depth), to_json(v, f"{where}[{k!r}]", depth)] for k, v in pairs]
        }
    return _leaf_to_json(value, where)


def _leaf_to_json(value: Any, where: str) -> Any:
    """`to_json` for types that JSON lacks and that hold no other values."""
    if isinstance(value, torch.dtype):
        return {"$dtype": dtype_name(value)}
    if isinstance(value, (bytes, bytearray)) and len(value) <= MAX_BYTES:
        return {"$bytes": base64.b64encode(value).decode()}
    if isinstance(value, PurePath):
        return {"$path": str(value)}
    if isinstance(value, Tensor) and value.numel() <= MAX_VALUES and not value.is_complex():
        flat = value.detach().cpu().reshape(-1)
        values = [to_json(v, where) for v in (flat.double() if flat.is_floating_point() else flat).tolist()]
        return {"$tensor": {"dtype": dtype_name(value.dtype), "shape": list(value.shape), "values": values}}
    if hasattr(value, "item") and getattr(value, "shape", None) == ():  # a NumPy scalar
        number = value.item()
        if isinstance(number, (bool, int, float, str, bytes)):
            return to_json(number, where)
    numpy = sys.modules.get("numpy")
    is_array = numpy is not None and isinstance(value, numpy.ndarray)
    if is_array and value.dtype.name in ARRAY_DTYPES and value.size <= MAX_VALUES:
        values = [to_json(v, where) for v in value.reshape(-1).tolist()]
        return {"$array": {"dtype": value.dtype.name, "shape": list(value.shape), "values": values}}
    raise TypeError(
        f"{where} is a {type(value).__name__}, which a checkpoint cannot hold: it holds None, bool, numbers, str, "
        f"bytes (up to {MAX_BYTES}), list, tuple, dict, torch.dtype, Path, and tensors and NumPy arrays (up to "
        f"{MAX_VALUES} elements), because loading these runs no code"
    )


def from_json(value: Any, depth: int = 0) -> Any:
    """Converts what `to_json` returned back to the value.

    Args:
        value: parsed JSON.
        depth: number of values that it lies within.

    Raises:
        ValueError: the value is not one that `to_json` returns.
    """
    if depth > MAX_DEPTH * 2:  # a dict whose keys are not all strings takes two levels
        raise ValueError(f"a value is nested more than {MAX_DEPTH} deep")
    depth += 1
    if isinstance(value, list):
        return [from_json(v, depth) for v in value]
    if not isinstance(value, dict):
        return value
    if not any(k.startswith("$") for k in value):
        return {k: from_json(v, depth) for k, v in value.items()}
    if len(value) == 1:
        ((kind, inner),) = value.items()
        try:
            if kind == "$float" and inner in ("nan", "inf", "-inf"):
                return float(inner)
            if kind == "$tuple" and isinstance(inner, list):
                return tuple(from_json(v, depth) for v in inner)
            if kind == "$dict" and isinstance(inner, list):
                return _dict([(from_json(k, depth), from_json(v, depth)) for k, v in inner])
            if kind == "$counter" and isinstance(counts := from_json(inner, depth), dict):
                return Counter(counts)
            if kind == "$dtype" and isinstance(inner, str):
                return DTYPES[inner]
            if kind == "$bytes" and isinstance(inner, str) and len(inner) <= 2 * MAX_BYTES:
                return base64.b64decode(inner, validate=True)
            if kind == "$path" and isinstance(inner, str):
                return Path(inner)
            if kind in ("$tensor", "$array") and isinstance(inner, dict):
                return _elements(kind, **inner)
        except (KeyError, TypeError, ValueError, RuntimeError, OverflowError, ImportError) as error:
            if isinstance(error, RecursionError):
                raise
            raise ValueError(f"{str(value)[:80]} cannot be read: {type(error).__name__}: {error}") from error
    raise ValueError(f"{str(value)[:80]} is nothing that a checkpoint holds")


def _dict(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """A dict, unless many keys have the same hash: building it would take quadratic time, and Python's hashes of
    numbers are easy to foresee."""
    same_hash = Counter(hash(key) for key, _ in pairs)
    if same_hash and max(same_hash.values()) > _MAX_SAME_HASH:
        raise ValueError(f"more than {_MAX_SAME_HASH} keys have the same hash")
    return dict(pairs)


def _elements(kind: str, dtype: str, shape: list[int], values: list[Any]) -> Any:
    """The tensor or array of these elements."""
    if not isinstance(dtype, str) or not isinstance(values, list) or not isinstance(shape, list):
        raise ValueError("expected a string for dtype and lists for shape and values")
    if not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError("expected a shape of integers that are not negative")
    if len(values) > MAX_VALUES or math.prod(shape) != len(values):
        raise ValueError(
            f"expected as many values as the shape has elements, and up to {MAX_VALUES}; got {len(values)}"
        )
    elements = from_json(values)
    element_type = bool if dtype == "bool" else int if dtype.startswith(("int", "uint")) else float
    if not all(type(v) is element_type for v in elements):
        raise ValueError(f"expected values of dtype {dtype[:40]!r}")
    if kind == "$tensor":
        return torch.tensor(elements, dtype=DTYPES[dtype], device="cpu").reshape(shape)
    if dtype not in ARRAY_DTYPES:
        raise ValueError(f"{dtype[:40]!r} is not the dtype of an array")
    import numpy

    return numpy.array(elements, dtype=dtype).reshape(shape)


def too_deep(value: Any) -> bool:
    """Whether JSON values are nested deeper than `from_json` reads. The check itself does not recurse."""
    level: Iterable[Any] = [value] if isinstance(value, (dict, list)) else []
    for _ in range(2 * MAX_DEPTH + 2):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return False
    return True
