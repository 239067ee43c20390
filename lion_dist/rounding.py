"""Warnings of hyper-parameters that round away to nothing in the dtype of the weights.

bfloat16 weights with master weights count as float32 weights, which the rule runs on.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any

import torch
from torch import Tensor

from .adamw import RANGE
from .dtensors import local
from .frozen import is_plain, takes_part
from .hyper_values import to_float
from .memory_order import flat
from .param_groups import Group, warn
from .update.reference import STORAGE_DTYPES, HyperParameters

_HALVES = (torch.bfloat16, torch.float16)
_SAMPLE = 1 << 16  # weights, of all parameters together


class RoundingWarnings:
    """Warns once if weight decay rounds to nothing, and once if the update itself does.

    Weight decay changes a weight by lr * weight_decay of its value in each step. The update rounds to nothing if lr is
    below half a unit in the last place of most 16-bit weights that have no master weights.

    Both may be negligible during warm-up, so the check uses the largest lr that the schedule is known to reach when it
    looks at the weights. It does not check again if lr is lowered later, by hand or by a load, since that may be the
    end of a schedule.
    """

    def __init__(self) -> None:
        self._decay_done = False
        self._decays: dict[int, tuple[float, float]] = {}
        self._passed: Sequence[HyperParameters] = ()  # those of the last step
        self._update_done = False
        self._looked: set[int] = set()  # groups whose weights have been compared with their lr
        self._idle: list[tuple[int, Tensor]] = []  # (number of such a group, parameter that was frozen then)
        self._reads = 2  # number of further steps that may read lr tensors on a GPU, for which the host waits

    def check(self, groups: Sequence[Group], hypers: Sequence[HyperParameters]) -> None:
        """Checks the groups. Call it before each step.

        In the first step in which the lr of a group is not 0 it reads the group's weights, for which the host waits. In
        later steps it reads only weights that were frozen until then.
        """
        # An lr that the schedule reaches later, which is all that else may be new, makes the decay larger.
        if not self._decay_done and hypers is not self._passed:
            self._passed = hypers
            for i, (group, hyper) in enumerate(zip(groups, hypers, strict=True)):
                self._check_decay(i, group, hyper)
        if self._update_done:
            return
        if len(self._looked) < len(groups) or any(takes_part(p) for _, p in self._idle):
            self._check_update(groups, hypers)

    def _check_decay(self, index: int, group: Group, hyper: HyperParameters) -> None:
        if self._decay_done or hyper.weight_decay == 0 or _on_gpu(hyper.lr):
            return
        lr = _aim(group, hyper)
        if lr == 0 or self._decays.get(index) == (lr, hyper.weight_decay):
            return
        self._decays[index] = (lr, hyper.weight_decay)
        decay = lr * hyper.weight_decay
        dtypes = {_stepped_dtype(p, group): p.dtype for p in group["params"] if takes_part(p)}
        for dtype in dtypes.keys() & set(STORAGE_DTYPES):
            # Half the distance from a weight to its neighbour is at least eps/4 of the weight.
            if decay <= torch.finfo(dtype).eps / 4:
                self._decay_done = True
                what = str(dtype) if dtypes[dtype] == dtype else f"{dtype} master"
                warn(
                    f"lr * weight_decay = {decay:.3g} is below half a unit in the last place of {what} weights, so "
                    f"weight decay rounds to nothing. Use {_more_precision({dtype})}a larger weight_decay (Lion wants "
                    f"{RANGE} AdamW's)."
                )
                return

    def _check_update(self, groups: Sequence[Group], hypers: Sequence[HyperParameters]) -> None:
        weights: list[tuple[float, Tensor]] = []
        waited = False
        unfrozen = {i for i, p in self._idle if takes_part(p)}
        for i, (group, hyper) in enumerate(zip(groups, hypers, strict=True)):
            if (i in self._looked and i not in unfrozen) or not group["params"]:
                continue
            if _on_gpu(hyper.lr):
                if not self._reads:
                    continue
                waited = True
            lr = _aim(group, hyper)
            if lr > 0:
                params = [p for j, p in self._idle if j == i] if i in unfrozen else group["params"]
                self._looked.add(i)
                self._idle = [(j, p) for j, p in self._idle if j != i]
                self._idle += [(i, p) for p in params if not takes_part(p)]
                halves = (local(p) for p in params if _stepped_dtype(p, group) in _HALVES and takes_part(p))
                weights += [(lr, w) for w in halves if is_plain(w) and w.numel()]
        self._reads -= waited
        if not weights:
            return
        share = _share_that_stays(weights)
        if share > 0.5:
            self._update_done = True
            largest, dtypes = max(lr for lr, _ in weights), {w.dtype for _, w in weights}
            warn(
                f"lr = {largest:.3g} is below half a unit in the last place of {share:.0%} of the "
                f"{' and '.join(sorted(map(str, dtypes)))} weights other than 0, so that their update rounds to "
                f"nothing and they do not move. Use {_more_precision(dtypes)}a larger lr."
            )


def _stepped_dtype(p: Tensor, group: Group) -> torch.dtype:
    """The dtype of the weight that the rule runs on: of the master weight where p has one."""
    return torch.float32 if p.dtype == torch.bfloat16 and group.get("master_weights") else p.dtype


def _more_precision(dtypes: Set[torch.dtype]) -> str:
    """The part of an advice that says how weights of these dtypes get more precision."""
    if not dtypes & set(_HALVES):
        return ""
    masters = {
        frozenset({torch.bfloat16}): "master_weights=True, ",
        frozenset(_HALVES): "master_weights=True (bfloat16 weights), ",
    }
    return masters.get(frozenset(dtypes), "") + "float32 weights (autocast keeps compute in 16 bits), or "


def _on_gpu(lr: float | Tensor) -> bool:
    return isinstance(lr, Tensor) and lr.device.type != "cpu"


def _aim(group: Group, hyper: HyperParameters) -> float:
    """The largest lr that is known of a group's schedule: of this step's and those that torch's schedulers record."""
    return max(float(hyper.lr), _noted(group.get("initial_lr")), _noted(group.get("max_lr")))


def _noted(lr: Any) -> float:
    if lr is None:
        return 0.0
    try:
        return to_float(lr, "lr")
    except (TypeError, ValueError):  # other code uses this key for something else
        return 0.0


@torch.no_grad()
def _share_that_stays(weights: Sequence[tuple[float, Tensor]]) -> float:
    """The share, from 0 to 1, of the weights that neither +lr nor -lr moves to another value. It is estimated from a
    sample. Weights of 0 are left out: any lr moves them, which does not tell how they will behave once trained."""
    total = sum(w.numel() for _, w in weights)
    found: dict[torch.device, list[Tensor]] = {}
    for lr, w in weights:
        count = -(-w.numel() * _SAMPLE // max(total, _SAMPLE))
        sample = flat(w)[:: max(1, w.numel() // count)]
        exact = sample.float()
        stays = ((exact - lr).to(w.dtype) == sample) & ((exact + lr).to(w.dtype) == sample) & (sample != 0)
        found.setdefault(w.device, []).append(torch.stack([stays.sum(), sample.count_nonzero()]))
    stay, looked_at = torch.stack([torch.stack(counts).sum(0).cpu() for counts in found.values()]).sum(0).tolist()
    return float(stay / max(looked_at, 1))
