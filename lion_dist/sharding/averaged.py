"""Whether gradients have been averaged over the ranks, as stage 1 takes them to be.

A rank steps its slices by its own gradients alone. So gradients that nobody averaged train each slice on one rank's
data, while all replicas stay alike. After an all-reduce every rank has the same bits.

Sketch: two numbers of a gradient, its norm and its dot product with a fixed vector. Gradients whose sketches are close
differ by rounding at most: bits alone would raise an alarm where ranks of unlike hardware clip an averaged gradient by
factors that differ in the last bit. Gradients that nobody averaged but that differ by less than TOLERANCE of the norm
are not found.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..memory_order import flat, laid_out_like
from .replicas import gathered

_CHUNK = 1 << 22  # elements
TOLERANCE = 1e-3  # of the norm; gradients of different data differ by several per cent and more


class AveragedGradients:
    """Compares the gradients over the ranks of a group, in the first steps that have gradients.

    The host waits for each comparison, so there are few: `STEPS`, and as many again after `again`.

    Attributes:
        left: how many are to come.
    """

    # Not in the first alone: behind weights of zero, most gradients of a first step are zero on every rank.
    STEPS = 2

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.left = self.STEPS

    def again(self) -> None:
        """Begins anew, for parameters that were not compared: DistributedDataParallel averages none that was added or
        unfrozen after it was made. The same call on every rank."""
        self.left = self.STEPS

    def check(self, params: Sequence[Tensor], grads: Sequence[Tensor | None], numbers: Sequence[int]) -> None:
        """Compares gradients, while there are comparisons left; a collective call, then.

        A parameter that has a gradient on some ranks only is compared among those. Zeros on all ranks are no
        evidence: a step without anything else does not count.

        Args:
            params, grads: dense, on one device; the same parameters on every rank.
            numbers: of the parameters, for the error.

        Raises:
            ValueError: on every rank, where a gradient differs.
        """
        if not self.left or not params:
            return
        device = params[0].device
        vector = torch.arange(min(_CHUNK, max(p.numel() for p in params)), dtype=torch.float64, device=device).cos()
        absent = torch.full((2,), -1.0, dtype=torch.float64, device=device)  # no norm is negative
        own = [
            absent if g is None else _sketch(laid_out_like(g, p), vector) for p, g in zip(params, grads, strict=True)
        ]
        unlike, evidence = [], False
        for i, of_ranks in enumerate(gathered(torch.stack(own), self._group).transpose(0, 1).tolist()):
            sketches = {rank: sketch for rank, sketch in enumerate(of_ranks) if sketch[0] != -1.0}
            evidence = evidence or any(norm != 0 for norm, _ in sketches.values())
            first = min(sketches, default=0)
            others = [rank for rank in sketches if not _close(sketches[first], sketches[rank])]
            if others:
                unlike.append((i, first, others))
        if unlike:
            i, first, others = unlike[0]
            raise ValueError(
                f"with stage=1 gradients must be averaged over the ranks before step(), but {len(unlike)} of "
                f"{len(params)} differ: that of parameter {numbers[i]} (shape {tuple(params[i].shape)}) is on ranks "
                f"{others} of the group not what it is on rank {first}. Nothing was changed. Wrap the model in "
                "DistributedDataParallel and call the wrapped model (wrap it anew after unfreezing or adding "
                "parameters, and make the last backward before step() outside no_sync()), or use stage=2, which "
                "averages by itself"
            )
        self.left -= evidence


def _sketch(grad: Tensor, vector: Tensor) -> Tensor:
    """(norm, dot product with the vector, which starts again every _CHUNK elements): float64, shape (2,)."""
    sums = torch.zeros(2, dtype=torch.float64, device=grad.device)
    for chunk in flat(grad).split(_CHUNK):
        x = chunk.double()
        sums += torch.stack([x.dot(x), x.dot(vector[: x.numel()])])
    sums[0].sqrt_()
    return sums


def _close(a: Sequence[float], b: Sequence[float]) -> bool:
    if not (math.isfinite(a[0]) and math.isfinite(b[0])):  # an infinity or NaN of one rank is in every average
        return math.isfinite(a[0]) == math.isfinite(b[0])
    return max(abs(a[0] - b[0]), abs(a[1] - b[1])) <= TOLERANCE * max(a[0], b[0])
