"""Check that gradients have been averaged over the ranks, as stage 1 expects.

A rank steps its slices by its own gradients alone. If they were not averaged, each slice is trained on one rank's data,
and no comparison of replicas can notice it, since they stay equal. After an all-reduce every rank has the same bits.

Sketch: two numbers computed from a gradient, its norm and its dot product with a fixed vector. Gradients with close
    sketches are taken to differ by rounding at most. Bits are not compared, because ranks with different hardware may
    clip an averaged gradient by factors that differ in the last bit. The price: gradients that were not averaged pass
    if they differ by less than TOLERANCE of the norm.
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
TOLERANCE = 1e-3  # fraction of the norm; gradients of different data differ by several per cent and more


class AveragedGradients:
    """Compares gradients over the ranks of a group, in the first steps that have gradients.

    The host waits for each comparison, so only `STEPS` are made, and as many again after `again`.

    Args:
        group: the ranks.

    Attributes:
        left: number of comparisons that are still to be made.
    """

    # One comparison would not do: behind weights of zero, most gradients of the first step are zero on every rank.
    STEPS = 2

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.left = self.STEPS

    def again(self) -> None:
        """Makes the next steps compare gradients again. Call this on every rank when there are other parameters:
        DistributedDataParallel does not average those that were added or unfrozen after it was made."""
        self.left = self.STEPS

    def check(self, params: Sequence[Tensor], grads: Sequence[Tensor | None], numbers: Sequence[int]) -> None:
        """Compares gradients if there are comparisons left; a collective call in that case.

        A parameter that has a gradient on some ranks only is compared among those. Zeros prove nothing, so a step with
        zeros alone on all ranks does not count as a comparison.

        Args:
            params: the same parameters on every rank, dense, on one device.
            grads: their gradients, dense.
            numbers: number of each parameter in the optimizer, for the error message.

        Raises:
            ValueError: on every rank, if a gradient differs between ranks.
        """
        if not self.left or not params:
            return
        laid = [None if g is None else flat(laid_out_like(g, p)) for p, g in zip(params, grads, strict=True)]
        unlike, evidence = compare(laid, params[0].device, self._group)
        if unlike:
            i, first, others = unlike[0]
            raise ValueError(
                f"{len(unlike)} of {len(params)} gradients differ between the ranks: that of parameter {numbers[i]} "
                f"(shape {tuple(params[i].shape)}) on ranks {others} of the group is not that on rank {first}. With "
                "stage=1 gradients must be averaged over the ranks before step(). Nothing was changed. Wrap the model "
                "in DistributedDataParallel and call the wrapped model (wrap it again after unfreezing or adding "
                "parameters, and make the last backward before step() outside no_sync()), or use stage=2, which "
                "averages gradients itself"
            )
        self.left -= evidence


def compare(
    grads: Sequence[Tensor | None], device: torch.device, group: dist.ProcessGroup
) -> tuple[list[tuple[int, int, list[int]]], bool]:
    """Compares gradients over the ranks of a group; a collective call, for which the host waits.

    Args:
        grads: at least one, 1-D, on one device; the same numbers of elements on every rank.
        device: the device.
        group: the ranks.

    Returns:
        For each gradient that differs its index, the first rank that has it, and the ranks where it is another one than
        there; and whether any rank has a gradient other than 0.
    """
    length = min(_CHUNK, max((g.numel() for g in grads if g is not None), default=0))
    vector = torch.arange(length, dtype=torch.float64, device=device).cos()
    absent = torch.full((2,), -1.0, dtype=torch.float64, device=device)  # no norm is negative
    own = [absent if g is None else _sketch(g, vector) for g in grads]
    unlike, evidence = [], False
    for i, of_ranks in enumerate(gathered(torch.stack(own), group).transpose(0, 1).tolist()):
        sketches = {rank: sketch for rank, sketch in enumerate(of_ranks) if sketch[0] != -1.0}
        evidence = evidence or any(norm != 0 for norm, _ in sketches.values())
        first = min(sketches, default=0)
        others = [rank for rank in sketches if not _close(sketches[first], sketches[rank])]
        if others:
            unlike.append((i, first, others))
    return unlike, evidence


def _sketch(grad: Tensor, vector: Tensor) -> Tensor:
    """Norm, and dot product with the vector, which is repeated every _CHUNK elements: float64, shape (2,)."""
    sums = torch.zeros(2, dtype=torch.float64, device=grad.device)
    for chunk in grad.split(_CHUNK):
        x = chunk.double()
        sums += torch.stack([x.dot(x), x.dot(vector[: x.numel()])])
    sums[0].sqrt_()
    return sums


def _close(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether two sketches differ by rounding at most."""
    if not (math.isfinite(a[0]) and math.isfinite(b[0])):  # every average contains one rank's infinity or NaN
        return math.isfinite(a[0]) == math.isfinite(b[0])
    return max(abs(a[0] - b[0]), abs(a[1] - b[1])) <= TOLERANCE * max(a[0], b[0])
