"""Clipping that a step is to multiply in, and the gradients that it was computed from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.utils.weak import TensorWeakRef

from ._torch_compat import version_of


@dataclass(frozen=True)
class Clipping:
    """
    max_norm: as given to the last clip_grad_norm_().
    scale: float32, shape (): what every gradient is multiplied by.
    fits: whether the gradients are still those that it was computed from.
    """

    max_norm: float
    scale: Tensor
    fits: Callable[[], bool]


def same_gradients(params: Sequence[Tensor]) -> Callable[[], bool]:
    """Tells, whenever it is called, whether ``p.grad`` of the parameters are what they are now, unchanged."""
    refs = [None if p.grad is None else TensorWeakRef(p.grad) for p in params]
    versions = [0 if p.grad is None else version_of(p.grad) for p in params]

    def holds() -> bool:
        return all(
            (ref is None and p.grad is None)
            or (ref is not None and p.grad is not None and ref() is p.grad and version_of(p.grad) == version)
            for ref, p, version in zip(refs, params, versions, strict=True)
        )

    return holds
