"""Which parameters an optimizer steps, and which of the others it can read.

A parameter *takes part* if it requires a gradient or has one. A frozen parameter without a gradient may be anything:
quantized, sparse, overlapping, on another device, a tensor subclass. It is checked only once it takes part.

A *plain* tensor is one whose bytes can be read, whatever they mean.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .memory_order import is_dense


def takes_part(p: Tensor) -> bool:
    """Whether an optimizer steps p, now or once p has a gradient."""
    return p.requires_grad or p.grad is not None


def is_plain(t: Tensor) -> bool:
    """Whether t is dense and has memory of its own. Meta, sparse, quantized and lazy tensors do not, nor do subclasses
    with a ``__torch_dispatch__`` of their own."""
    if type(t).__torch_dispatch__ is not Tensor.__torch_dispatch__ or is_lazy(t):
        return False
    if t.is_meta or t.layout != torch.strided or t.is_quantized or not is_dense(t):
        return False
    return not is_freed(t)


def is_freed(t: Tensor) -> bool:
    """Whether the storage of a strided tensor has been resized to nothing, as FSDP1 does. Reading such a tensor would
    end the process."""
    return t.numel() > 0 and t.untyped_storage().nbytes() == 0
