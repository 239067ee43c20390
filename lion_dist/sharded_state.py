"""ShardedLion's state, as others see it: by parameter, in the parameter's own shape.

Whole: plain tensors on the CPU, gathered. In boxes: `BoxTensor`s, views of this rank's shard, local. What
``optimizer.state`` holds are entries that make a BoxTensor whenever one is looked at, so that none outlives its shard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import Optimizer

from ._torch_compat import load_state_dict_post_hooks
from .param_groups import Group
from .sharding.box_tensor import BoxTensor
from .sharding.shard import Shard
from .state_dicts import check_and_wrap_state, map_tensors

_EXP_AVG = "exp_avg"


class ShardEntry(MutableMapping[str, Any]):
    """What ``optimizer.state`` has for one parameter: {"exp_avg": BoxTensor}, and whatever others put beside it.

    ``exp_avg`` is a view of the shard: assigned to it, a BoxTensor of the same cut, or a whole tensor of the
    parameter's shape, is copied into the shard. It cannot be deleted.
    """

    def __init__(self, shard: Shard, param: int, rank: int, others: Mapping[str, Any]) -> None:
        self._place = shard, param, rank
        self.others = dict(others)

    def _exp_avg(self) -> BoxTensor:
        shard, param, rank = self._place
        return shard.boxes(param, rank)

    def __getitem__(self, key: str) -> Any:
        return self._exp_avg() if key == _EXP_AVG else self.others[key]

    def __setitem__(self, key: str, value: Any) -> None:
        if key != _EXP_AVG:
            self.others[key] = value
            return
        own = self._exp_avg()
        if not isinstance(value, Tensor) or value.shape != own.shape:
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"exp_avg must be a tensor of shape {tuple(own.shape)}, as its parameter is, got {got}")
        with torch.no_grad():
            own.copy_(value)

    def __delitem__(self, key: str) -> None:
        if key == _EXP_AVG:
            raise TypeError("exp_avg is part of ShardedLion's shard, and cannot be deleted: assign zeros to it instead")
        del self.others[key]

    def __iter__(self) -> Iterator[str]:
        return iter((_EXP_AVG, *self.others))

    def __len__(self) -> int:
        return 1 + len(self.others)


def put_entries(state: MutableMapping[Any, Any], shards: Sequence[Shard], rank: int) -> None:
    """Puts an entry for every parameter that is sharded into ``state``, first and in the shards' order. What others
    keep there stays."""
    before = dict(state)
    state.clear()
    for shard in shards:
        for i, p in enumerate(shard.params):
            entry = before.pop(p, {})
            others = entry.others if isinstance(entry, ShardEntry) else entry
            state[p] = ShardEntry(shard, i, rank, others)
    state.update(before)


def ordered(packed: Mapping[Any, Any]) -> dict[Any, Any]:
    """The state of a packed state_dict: plain dicts, those of parameters first and by their numbers."""
    numbered = sorted(i for i in packed if isinstance(i, int))
    return {
        i: dict(packed[i]) if isinstance(packed[i], ShardEntry) else packed[i]
        for i in (*numbered, *(i for i in packed if not isinstance(i, int)))
    }


def whole(packed: Mapping[Any, Any], groups: Sequence[Group], momenta: Mapping[int, Tensor]) -> dict[Any, Any]:
    """`ordered` with whole momenta, given by ``id`` of the parameter. What others keep beside them is this rank's, its
    tensors copied to the CPU."""
    state = ordered(packed)
    for i, p in enumerate(p for group in groups for p in group["params"]):
        if i in state:
            others = {key: map_tensors(_on_cpu, value) for key, value in state[i].items() if key != _EXP_AVG}
            state[i] = {_EXP_AVG: momenta[id(p)], **others} if id(p) in momenta else others
    return state


def _on_cpu(t: Tensor, _: Any) -> Tensor:
    return t.detach().to("cpu", copy=True)


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

    def __init__(self, groups: Sequence[Group], defaults: Group, state: Mapping[Any, Any]) -> None:
        self._groups, self._defaults, self._state = groups, defaults, state
        self._params: list[Tensor] = [p for group in groups for p in group["params"]]
        self.momenta: dict[int, Tensor] = {}
        self.dtypes: dict[int, torch.dtype] = {}
        self._post_hooks: dict[int, Callable[[Optimizer], None]] = {}

    def take(self, optimizer: Optimizer, given: dict[str, Any]) -> dict[str, Any]:
        """A pre-hook of torch's load_state_dict, to be the last of them, which leaves torch what is not Lion's. Raises
        ValueError or TypeError for a state that does not fit the groups. Takes the optimizer's post hooks away, because
        torch would run them before the momenta are loaded: see `give_back_post_hooks`."""
        hooks = load_state_dict_post_hooks(optimizer)
        self._post_hooks.update(hooks)
        hooks.clear()
        checked = check_and_wrap_state(given, self._groups, self._defaults, self._state, (BoxTensor,))
        ids = [i for group in checked["param_groups"] for i in group["params"]]
        for i, p in zip(ids, self._params, strict=True):
            momentum = checked["state"].get(i, {}).pop(_EXP_AVG, None)
            if momentum is not None:
                self.momenta[id(p)] = momentum.value
        return checked

    def give_back_post_hooks(self, optimizer: Optimizer) -> None:
        """Registers the hooks that `take` took away again, under their old handles and in their old order."""
        load_state_dict_post_hooks(optimizer).update(self._post_hooks)

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
