"""A checkpoint on its way out: what this rank has of it, and its share of what the ranks hold together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ..sharded_lion import ShardedLion
from .incoming import EXTRA, RANKS, SCHEDULER, TIED, generators
from .manifest import BLOCK_BYTES
from .named import GROUPS, Logical, ModelState, Names, groups_by_name, state_of
from .plain import from_plain, to_plain
from .ranks import Ranks
from .union import RankState, Share, by_group, describe, samples, with_lists


class Outgoing:
    """What this rank has.

    Attributes:
        held: its description, for `union.unite`.

    Raises:
        ValueError, TypeError: naming what cannot be saved.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer | None, schedulers: Sequence[Any], extra: Any, ranks: Ranks
    ) -> None:
        names, logical = Names.read(model), Logical(model)
        of_model = ModelState.read(model, names, logical)
        self._extra, self._ranks = extra, ranks
        self._tensors = dict(of_model.params)
        self._once: dict[str, Any] = dict(of_model.buffers)
        for key, module in of_model.extra.items():
            self._once[key] = _extra_state(key, module)
        groups: list[dict[str, Any]] = []
        self._once.update({TIED + alias: name for alias, name in names.aliases.items()})
        self._schedulers = [scheduler.state_dict() for scheduler in schedulers]
        if optimizer is not None:
            if isinstance(optimizer, ShardedLion):
                optimizer.state_dict()  # raises where the last steps were not the same on all ranks
            tensors, others = state_of(optimizer, names, logical)
            self._tensors.update(tensors)
            self._once.update(others)
            for i, group in enumerate(groups_by_name(optimizer, names)):
                groups.append({key: to_plain(value, f"{GROUPS}{i}.{key}") for key, value in group.items()})
        self.held = RankState(
            {**describe(self._tensors), **describe(of_model.buffers)},
            samples(self._tensors) if ranks.size > 1 else {},
            set(self._once),
            groups,
            [
                {path: to_plain(of, f"{SCHEDULER}{i}.{path[-1]}") for path, of in by_group(state, len(groups))}
                for i, state in enumerate(self._schedulers)
            ],
        )

    def state(self, share: Share) -> dict[str, Any]:
        """By key; what every rank gives alike is written by one of them."""
        state: dict[str, Any] = {**self._tensors, **{key: self._once[key] for key in share.once}}
        if share.groups is not None and share.schedulers is not None:  # of the first rank
            for i, group in enumerate(share.groups):
                state.update({f"{GROUPS}{i}.{key}": from_plain(value) for key, value in group.items()})
            for i, (own, lists) in enumerate(zip(self._schedulers, share.schedulers, strict=True)):
                state[f"{SCHEDULER}{i}"] = with_lists(own, {path: from_plain(of) for path, of in lists.items()})
            state[EXTRA], state[RANKS] = self._extra, self._ranks.size
        state.update(generators(self._ranks.rank))
        return state


def _extra_state(key: str, module: nn.Module) -> Any:
    state = module.get_extra_state()
    if not isinstance(state, Tensor):
        to_plain(state, key)
    elif state.nbytes > BLOCK_BYTES:
        raise TypeError(f"{key} is a tensor of {state.nbytes} bytes; a checkpoint holds extra states of {BLOCK_BYTES}")
    return state
