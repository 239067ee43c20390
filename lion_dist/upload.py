"""Numbers of the host, made a tensor on the device without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def upload(numbers: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A new tensor from Python numbers (or nested sequences of them), without a host synchronisation. The
    pinned staging memory is not reused before the copy has run (torch's host allocator sees to it)."""
    if device.type != "cuda":
        return torch.tensor(numbers, dtype=dtype, device=device)
    return torch.tensor(numbers, dtype=dtype, pin_memory=True).to(device, non_blocking=True)
