"""ShardedLion's state, as others see it: by parameter, in the parameter's own shape.

Whole: plain tensors on the CPU, gathered. In boxes: `BoxTensor`s, views of this rank's shard, local. What
``optimizer.state`` holds are entries that make a BoxTensor whenever one is looked at, so that none outlives its shard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import Optimizer

from .param_groups import Group, check_and_wrap_state
from .sharding.box_tensor import BoxTensor
from .sharding.shard import Shard


class ShardEntry(Mapping[str, Tensor]):
    """What ``optimizer.state`` has for one parameter: {"exp_avg": BoxTensor}."""

    def __init__(self, shard: Shard, param: int, rank: int) -> None:
        self._place = shard, param, rank

    def __getitem__(self, key: str) -> Tensor:
        if key != "exp_avg":
            raise KeyError(key)
        shard, param, rank = self._place
        return shard.boxes(param, rank)

    def __iter__(self) -> Iterator[str]:
        return iter(("exp_avg",))

    def __len__(self) -> int:
        return 1


def shard_entries(shards: Sequence[Shard], rank: int) -> dict[Tensor, Any]:
    """An entry for every parameter that is sharded."""
    return {p: ShardEntry(shard, i, rank) for shard in shards for i, p in enumerate(shard.params)}


def whole_momenta(shards: Sequence[Shard], group: dist.ProcessGroup, keep: bool) -> dict[int, Tensor]:
    """By ``id`` of the parameter, on the CPU; a collective call. {} where ``keep`` is False."""
    gathered = {}
    for shard in shards:
        for p, exp_avg in zip(shard.params, shard.gather_exp_avgs(group, keep), strict=True):
            if keep:
                gathered[id(p)] = exp_avg
    return gathered


class IncomingState:
    """A state_dict on its way in: checked, and its momenta set aside from what torch would do with them.

    Attributes:
        momenta: by ``id`` of the parameter: whole, or BoxTensors.
        dtypes: that they are to have, likewise; once `check_cut` has been called.
    """

    def __init__(self, groups: Sequence[Group]) -> None:
        self._groups = groups
        self._params: list[Tensor] = [p for group in groups for p in group["params"]]
        self.momenta: dict[int, Tensor] = {}
        self.dtypes: dict[int, torch.dtype] = {}
        self._post_hooks: dict[int, Callable[[Optimizer], None]] = {}

    def take(self, optimizer: Optimizer, given: dict[str, Any]) -> dict[str, Any]:
        """A pre-hook of torch's load_state_dict, to be the last of them. Raises ValueError for a state that does not
        fit the groups. Takes the optimizer's post hooks away, because torch would run them before the momenta are
        loaded: see `give_back_post_hooks`."""
        hooks = optimizer._optimizer_load_state_dict_post_hooks
        self._post_hooks.update(hooks)
        hooks.clear()
        checked = check_and_wrap_state(given, self._groups)
        ids = [i for group in checked["param_groups"] for i in group["params"]]
        for i, p in zip(ids, self._params, strict=True):
            if checked["state"].get(i):
                self.momenta[id(p)] = checked["state"][i]["exp_avg"].tensor
        return {**checked, "state": {}}

    def give_back_post_hooks(self, optimizer: Optimizer) -> None:
        """Registers the hooks that `take` took away again, under their old handles and in their old order."""
        optimizer._optimizer_load_state_dict_post_hooks.update(self._post_hooks)

    def check_cut(self, groups: Sequence[Group], shards: Sequence[Shard], rank: int) -> None:
        """Decides on dtypes, from the groups as loaded. Raises ValueError for BoxTensors of another cut."""
        for group in groups:
            for p in group["params"]:
                if id(p) in self.momenta:
                    self.dtypes[id(p)] = group["momentum_dtype"] or self.momenta[id(p)].dtype
        cut = {id(p): shard.boxes(i, rank).boxes for shard in shards for i, p in enumerate(shard.params)}
        for i, p in enumerate(self._params):
            given = self.momenta.get(id(p))
            if isinstance(given, BoxTensor) and (given.boxes != cut.get(id(p)) or not self.fits(shards)):
                raise ValueError(
                    f"exp_avg of parameter {i} is a BoxTensor of another cut (other ranks, parameters or momentum "
                    "dtypes) than this ShardedLion's: go through lion_dist.checkpoint or torch.distributed.checkpoint, "
                    "into this optimizer's own state_dict(), or load a full_state_dict()"
                )

    def fits(self, shards: Sequence[Shard]) -> bool:
        """Whether the shards, as they are, can take the momenta."""
        there = {id(p): shard.exp_avg.dtype for shard in shards for p in shard.params}
        return all(there.get(p) == dtype for p, dtype in self.dtypes.items())

    def describe(self) -> list[str]:
        """What must be equal on all ranks, a line a parameter."""
        lines = []
        for i, p in enumerate(self._params):
            given = self.momenta.get(id(p))
            kind = "boxes of " if isinstance(given, BoxTensor) else ""
            lines.append(f"momentum of parameter {i}: {kind}{None if given is None else given.dtype}")
        return lines
