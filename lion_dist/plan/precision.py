"""Bytes of an element in each precision: what is kept of it, and what a step moves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..update.codecs import BLOCK

SIGNS = 0.25  # the two bits of an element
AVERAGE = 4  # an average of gradients that were reduced in 16 bits is float32
_REMAINDER = 2
_SCALE = 4 / BLOCK
_SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int8: "int8"}


@dataclass(frozen=True)
class Precision:
    """The dtype of the weights, which their gradients have too, and what the optimizer keeps.

    Attributes:
        weights: dtype of the weights and their gradients.
        momentum: dtype of the momentum.
        master_weights: whether bfloat16 weights have a remainder each.
    """

    weights: torch.dtype
    momentum: torch.dtype
    master_weights: bool = False

    @property
    def name(self) -> str:
        master = " + master weights" if self.master_weights else ""
        momentum = f", {_SHORT[self.momentum]} momentum" if self.momentum != self.weights else ""
        return _SHORT[self.weights] + master + momentum

    @property
    def weight_bytes(self) -> float:
        return self.weights.itemsize

    @property
    def momentum_bytes(self) -> float:
        return self.momentum.itemsize + (_SCALE if self.momentum == torch.int8 else 0)

    @property
    def remainder_bytes(self) -> float:
        return _REMAINDER if self.master_weights else 0

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of both optimizers."""
        return {"momentum_dtype": self.momentum, "master_weights": self.master_weights}

    def step_bytes(self, gradient: float) -> float:
        """Bytes of memory that a step moves: weight, remainder and momentum read and written, and the gradient read.

        Args:
            gradient: bytes of an element of the gradient.
        """
        return gradient + 2 * (self.weight_bytes + self.remainder_bytes + self.momentum_bytes)

    def pack_bytes(self, gradient: float) -> float:
        """The same for the first half of a step with signs: a momentum read and written, a gradient read, a sign
        written."""
        return gradient + 2 * self.momentum_bytes + SIGNS

    @property
    def apply_bytes(self) -> float:
        """The same for its second half: a sign read, weight and remainder read and written."""
        return SIGNS + 2 * (self.weight_bytes + self.remainder_bytes)


_FP32, _BF16, _INT8 = torch.float32, torch.bfloat16, torch.int8
PRECISIONS = (
    Precision(_FP32, _FP32),
    Precision(_FP32, _INT8),
    Precision(_BF16, _BF16),
    Precision(_BF16, _INT8),
    Precision(_BF16, _BF16, master_weights=True),
    Precision(_BF16, _INT8, master_weights=True),
)
