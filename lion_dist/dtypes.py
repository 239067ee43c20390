"""Names of dtypes, as checkpoints, state_dicts and constructor arguments write them: "float32", "bfloat16", ..."""

from __future__ import annotations

import torch

# Every dtype that a checkpoint can hold, by name.
DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name)
    for name in (
        "bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "float16", "bfloat16",
        "float32", "float64", "complex32", "complex64", "complex128", "float8_e4m3fn", "float8_e5m2",
    )
}  # fmt: skip


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype without its module, such as "float32"."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype | None:
    """The dtype of this name, which may begin with "torch."; None if there is none of this name."""
    return DTYPES.get(name.removeprefix("torch."))
