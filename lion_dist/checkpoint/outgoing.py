"""A checkpoint that is being saved: this rank's tensors and values, and the share of the union that it writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ..sharded_access import check_last_steps
from ..sharded_lion import ShardedLion
from .computed import Computed
from .generators import generator_states
from .groups import named_groups
from .json_values import from_json, to_json
from .keys import EXTRA, GROUPS, RANKS, SCHEDULER, TIED
from .logical import Logical
from .manifest import BLOCK_BYTES
from .model_state import ModelState
from .names import Names
from .optimizer_state import state_by_key
from .ranks import Ranks
from .schedulers import group_lists, replace_lists
from .union import RankState, Share, describe, samples


class Outgoing:
    """This rank's part of a checkpoint.

    Args:
        model, optimizer, schedulers, extra: what to save; see `lion_dist.checkpoint.save`.
        ranks: the ranks that save.

    Attributes:
        rank_state: its description, for `union.unite`.

    Raises:
        ValueError, TypeError: something cannot be saved; names it.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer | None, schedulers: Sequence[Any], extra: Any, ranks: Ranks
    ) -> None:
        names, logical = Names.read(model), Logical(model)
        of_model = ModelState.read(model, names, logical)
        self._extra, self._ranks = extra, ranks
        self._tensors: dict[str, Tensor | Computed] = dict(of_model.params)
        sampled = dict(of_model.params)
        self._once: dict[str, Any] = dict(of_model.buffers)  # values that one rank saves for all
        for key, module in of_model.extra.items():
            self._once[key] = _extra_state(key, module)
        groups: list[dict[str, Any]] = []
        self._once.update({TIED + alias: name for alias, name in names.aliases.items()})
        self._schedulers = [scheduler.state_dict() for scheduler in schedulers]
        if optimizer is not None:
            if isinstance(optimizer, ShardedLion):
                check_last_steps(optimizer)
            tensors, others = state_by_key(optimizer, names, logical)
            self._tensors.update(tensors)
            for key, t in tensors.items():
                sampled.update(t.sampled(key) if isinstance(t, Computed) else {key: t})
            self._once.update(others)
            for i, group in enumerate(named_groups(optimizer, names)):
                groups.append({key: to_json(value, f"{GROUPS}{i}.{key}") for key, value in group.items()})
        self.rank_state = RankState(
            {**describe(self._tensors), **describe(of_model.buffers)},
            samples(sampled) if ranks.size > 1 else {},
            set(self._once),
            groups,
            [
                {path: to_json(of, f"{SCHEDULER}{i}.{path[-1]}") for path, of in group_lists(state, len(groups))}
                for i, state in enumerate(self._schedulers)
            ],
        )

    def state(self, share: Share) -> dict[str, Any]:
        """The tensors and values that this rank saves, by key. What several ranks hold alike is saved by one."""
        state: dict[str, Any] = {**self._tensors, **{key: self._once[key] for key in share.once}}
        if share.groups is not None and share.schedulers is not None:  # this is the first rank
            for i, group in enumerate(share.groups):
                state.update({f"{GROUPS}{i}.{key}": from_json(value) for key, value in group.items()})
            for i, (own, lists) in enumerate(zip(self._schedulers, share.schedulers, strict=True)):
                state[f"{SCHEDULER}{i}"] = replace_lists(own, {path: from_json(of) for path, of in lists.items()})
            state[EXTRA], state[RANKS] = self._extra, self._ranks.size
        state.update(generator_states(self._ranks.rank))
        return state


def _extra_state(key: str, module: nn.Module) -> Any:
    state = module.get_extra_state()
    if not isinstance(state, Tensor):
        to_json(state, key)  # raises TypeError for a value that cannot be saved
    elif state.nbytes > BLOCK_BYTES:
        raise TypeError(
            f"{key} is a tensor of {state.nbytes} bytes; a checkpoint holds extra states of up to {BLOCK_BYTES} bytes"
        )
    return state
