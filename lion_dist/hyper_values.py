"""Hyper-parameters as users give them, checked and converted to the form in which groups store them.

The functions raise TypeError for a value of a wrong type, and ValueError for one that is out of range.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from .dtypes import dtype_of
from .frozen import is_plain
from .update.reference import STORAGE_DTYPES


def shown(value: Any) -> str:
    """Describes a value in a message. Tensors, and containers that may hold them, are described by their type, because
    printing a tensor without memory ends the process."""
    plain = (str, int, float, complex, type(None), torch.dtype)
    if isinstance(value, plain) or (type(value) in (list, tuple) and all(isinstance(v, plain) for v in value)):
        return repr(value) if len(repr(value)) < 100 else repr(value)[:100] + "..."
    return f"a {type(value).__name__}"


def to_float(value: Any, name: str) -> float:
    """Converts a number of any kind to a float.

    Args:
        value: a number of Python or NumPy, a Fraction, a Decimal, or a tensor or array of one element.
        name: its name in messages.

    Raises:
        TypeError: the value is not a real number.
        ValueError: the value is a tensor or array of another size, or too large for a float.
    """
    if type(value) is float:
        return value
    given = value
    if isinstance(value, Tensor) or type(value).__module__ == "numpy":
        shape = tuple(value.shape)
        if math.prod(shape) != 1:
            raise ValueError(f"{name} must be a number or a tensor of one element, got shape {shape}")
        if isinstance(value, Tensor) and not is_plain(value):
            raise TypeError(f"{name} must be a number or a tensor of one element, got {shown(value)}")
        value = value.item()
    if not hasattr(type(value), "__float__") or isinstance(value, complex):
        raise TypeError(f"{name} must be a number or a tensor of one element, got {shown(given)}")
    try:
        return float(value)
    except OverflowError as error:
        raise ValueError(f"{name} must be finite, got a number too large for a float") from error


def to_lr(value: Any, hint: str = "") -> float | Tensor:
    """Checks a learning rate: finite and >= 0. A tensor stays a tensor; the host waits for its value.

    Args:
        value: a number of any kind, or a tensor of one element.
        hint: is added to the message of a ValueError.
    """
    number = to_float(value, "lr")
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"lr must be finite and >= 0, got {number}{hint}")
    return value if isinstance(value, Tensor) else number


def to_betas(value: Any) -> tuple[float, float]:
    """Converts an iterable of two numbers in [0, 1)."""
    if type(value) is tuple and len(value) == 2 and type(value[0]) is float and type(value[1]) is float:
        pair: tuple[float, ...] = value
    else:
        if isinstance(value, (str, bytes, Mapping, Set)):
            raise TypeError(f"betas must be two numbers in [0, 1), got {shown(value)}")
        try:
            pair = tuple(islice(iter(value), 3))
            pair = tuple(to_float(beta, "a beta") for beta in pair)
        except (TypeError, RuntimeError) as error:  # RuntimeError: a tensor subclass that cannot be iterated over
            raise TypeError(f"betas must be two numbers in [0, 1), got {shown(value)}") from error
    if len(pair) != 2 or not (0 <= pair[0] < 1 and 0 <= pair[1] < 1):
        raise ValueError(f"betas must be two numbers in [0, 1), got {shown(value)}")
    return pair[0], pair[1]


def to_weight_decay(value: Any) -> float:
    """Converts a weight decay: finite and >= 0."""
    number = to_float(value, "weight_decay")
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"weight_decay must be finite and >= 0, got {number}")
    return number


def to_max_norm(value: Any) -> float:
    """Converts the largest norm that clipped gradients may have: > 0, and infinite where they are only measured."""
    number = to_float(value, "max_norm")
    if not number > 0:
        raise ValueError(f"max_norm must be > 0, got {number}")
    return number


def to_flag(value: Any, name: str) -> bool:
    """Converts a bool of Python or NumPy; ``name`` is its name in messages."""
    if type(value).__name__ not in ("bool", "bool_"):  # NumPy's are called bool_ (1.x) and bool (2.x)
        raise TypeError(f"{name} must be True or False, got {shown(value)}")
    return bool(value)


def to_count(value: Any, name: str) -> int:
    """Converts a number of steps: an integer >= 0 of any kind."""
    number = to_float(value, name)
    if not (number >= 0 and number.is_integer() and number < 2**53):
        raise ValueError(f"{name} must be an integer >= 0, got {number}")
    return int(number)


def to_dtype(value: Any) -> torch.dtype | None:
    """Converts a momentum_dtype, which may be a name ("bfloat16" or "torch.bfloat16").

    Raises:
        TypeError: a momentum cannot have this dtype.
    """
    dtype = dtype_of(value) if isinstance(value, str) else value
    if value is not None and not (isinstance(dtype, torch.dtype) and dtype in (*STORAGE_DTYPES, torch.int8)):
        raise TypeError(f"momentum_dtype must be None, float32, bfloat16, float16 or int8, got {shown(value)}")
    return dtype
