"""Whether gradients have been averaged over the ranks, as stage 1 takes them to be.

A rank steps its slices by its own gradients alone, so gradients that nobody averaged train each slice on one rank's
data, and replicas stay alike. After an all-reduce every rank has the same bits: so a checksum tells.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..memory_order import laid_out_like
from .replicas import checksum, gathered


class AveragedGradients:
    """Compares the gradients' bits over the ranks of a group, in the first steps that have gradients.

    The host waits for each comparison, so there are few: `STEPS`, and as many again after `again`.
    """

    # Not in the first alone: behind weights of zero, most gradients of a first step are zero on every rank.
    STEPS = 2

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._left = self.STEPS

    def again(self) -> None:
        """There are parameters that were not compared: DistributedDataParallel averages none that was added or
        unfrozen after it was made. The same call on every rank."""
        self._left = self.STEPS

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
        if not self._left or not params:
            return
        absent = torch.zeros(2, dtype=torch.int64, device=params[0].device)
        own = [
            absent if g is None else torch.stack([checksum(laid_out_like(g, p)), torch.ones_like(absent[0])])
            for p, g in zip(params, grads, strict=True)
        ]
        unlike, evidence = [], False
        for i, of_ranks in enumerate(gathered(torch.stack(own), self._group).transpose(0, 1).tolist()):
            sums = {rank: total for rank, (total, is_there) in enumerate(of_ranks) if is_there}
            evidence = evidence or any(sums.values())
            if len(set(sums.values())) > 1:
                unlike.append((i, sums))
        if unlike:
            i, sums = unlike[0]
            first = min(sums)
            others = [rank for rank, total in sums.items() if total != sums[first]]
            raise ValueError(
                f"with stage=1 gradients must be averaged over the ranks before step(), but {len(unlike)} of "
                f"{len(params)} differ: that of parameter {numbers[i]} (shape {tuple(params[i].shape)}) is on ranks "
                f"{others} of the group not what it is on rank {first}. Nothing was changed. Wrap the model in "
                "DistributedDataParallel and call the wrapped model (wrap it anew after unfreezing or adding "
                "parameters, and make the last backward before step() outside no_sync()), or use stage=2, which "
                "averages by itself"
            )
        self._left -= evidence
