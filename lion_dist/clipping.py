"""Clipping of gradients: the factor that the next step multiplies in, and the gradients that it belongs to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.utils.weak import TensorWeakRef

from .dtensors import changes_of


@dataclass(frozen=True)
class Clipping:
    """The result of clip_grad_norm_(), which the next step() uses.

    Attributes:
        max_norm: the argument of the last clip_grad_norm_().
        scale: float32, shape (): the factor for every gradient.
        fits: says whether this rank's gradients are still those that were clipped.
    """

    max_norm: float
    scale: Tensor
    fits: Callable[[], bool]


def same_gradients(params: Sequence[Tensor]) -> Callable[[], bool]:
    """Returns a function that says whether every ``p.grad`` is still the tensor that it is now, unchanged."""
    refs = [None if p.grad is None else TensorWeakRef(p.grad) for p in params]
    versions = [0 if p.grad is None else changes_of(p.grad) for p in params]

    def holds() -> bool:
        return all(
            (ref is None and p.grad is None)
            or (ref is not None and p.grad is not None and ref() is p.grad and changes_of(p.grad) == version)
            for ref, p, version in zip(refs, params, versions, strict=True)
        )

    return holds
