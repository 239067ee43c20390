"""``optimizer.state`` of a ShardedLion, as frameworks walk and write it.

Entry: what the state holds for one sharded parameter: a mapping, which makes a view of the shard whenever a column is
    read, so that none outlives its shard. What is assigned to a column is copied into the shard. A copy of an entry, by
    ``copy``, ``type(entry)(mapping)`` or torch's pytree, is a plain dict.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ._torch_compat import register_pytree_node
from .dtensors import is_dtensor
from .meshes import of_same_boxes
from .sharding.box_tensor import BoxTensor
from .sharding.shard import Column, Shard


class ShardEntry(MutableMapping[str, Any]):
    """One parameter's entry in ``optimizer.state``: a BoxTensor for each column, and what others keep beside them.

    The BoxTensors are views of the shard. A BoxTensor of the same cut, or a whole tensor of the same shape, that is
    assigned to a column is copied into the shard, from any device; between float dtypes it is cast, and anything else
    must have the column's own dtype. Columns cannot be deleted. Whole columns are plain tensors, and only whole tensors
    can be assigned to them.
    """

    _place: tuple[Shard, int, int]
    others: dict[str, Any]

    def __new__(cls, values: Any = ()) -> Any:
        return dict(values)  # walkers rebuild a mapping from its type

    @classmethod
    def at(cls, shard: Shard, param: int, rank: int, others: Mapping[str, Any]) -> ShardEntry:
        """The entry of a shard's parameter.

        Args:
            shard, param, rank: as for `Shard.state`.
            others: what other code keeps beside the columns.
        """
        entry: ShardEntry = object.__new__(cls)
        entry._place, entry.others = (shard, param, rank), dict(others)
        return entry

    def _column(self, key: str) -> Column | None:
        shard, _, _ = self._place
        return next((column for column in shard.columns if column.name == key), None)

    def _tensor(self, column: Column) -> Tensor:
        shard, param, rank = self._place
        return shard.state(param, column, rank)

    def __getitem__(self, key: str) -> Any:
        column = self._column(key)
        return self.others[key] if column is None else self._tensor(column)

    def __setitem__(self, key: str, value: Any) -> None:
        column = self._column(key)
        if column is None:
            self.others[key] = value
        else:
            _write(*self._checked(column, value))

    def replace(self, values: Any) -> None:
        """Takes all of another mapping, which has the columns of this entry.

        Raises:
            ValueError, TypeError: it is none, lacks a column, or a value does not fit; nothing has been changed.
        """
        shard, _, _ = self._place
        lacking = [c.name for c in shard.columns if not isinstance(values, Mapping) or c.name not in values]
        if lacking:
            got = f"one with {sorted(map(str, values))}" if isinstance(values, Mapping) else type(values).__name__
            raise ValueError(
                f"an entry of ShardedLion's state must be a mapping with {', '.join(lacking)}, got {got}: the shard "
                "stays in use, so assign zeros to a column to reset it, or give a state to load_state_dict"
            )
        columns = [self._checked(column, values[column.name]) for column in shard.columns]
        for own, value in columns:
            _write(own, value)
        self.others = {key: value for key, value in values.items() if self._column(key) is None}

    def _checked(self, column: Column, value: Any) -> tuple[Tensor, Tensor]:
        """The column's tensor and what is to be written to it."""
        own, key = self._tensor(column), column.name
        if not isinstance(value, Tensor) or value.shape != own.shape:
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"{key} must be a tensor of shape {tuple(own.shape)}, as its parameter requires, got {got}"
            )
        if value.dtype != own.dtype and not (value.is_floating_point() and own.is_floating_point()):
            raise TypeError(
                f"{key} is kept in {own.dtype}, got {value.dtype}: to assign would change the numbers. Give it in "
                f"{own.dtype}, or give a whole state to load_state_dict, which converts it"
            )
        if value.is_meta:
            raise ValueError(f"{key} must have memory of its own, got a tensor on meta")
        if is_dtensor(value):
            value = of_same_boxes(value, own)
        if isinstance(value, BoxTensor):
            value.check_cut(own)
        return own, value

    def __delitem__(self, key: str) -> None:
        if self._column(key) is not None:
            raise TypeError(f"{key} is part of ShardedLion's shard, and cannot be deleted: assign zeros to it instead")
        del self.others[key]

    def __iter__(self) -> Iterator[str]:
        shard, _, _ = self._place
        return iter((*(column.name for column in shard.columns), *self.others))

    def __len__(self) -> int:
        shard, _, _ = self._place
        return len(shard.columns) + len(self.others)

    def __repr__(self) -> str:
        return repr(dict(self))

    def __reduce__(self) -> Any:
        return dict, (dict(self),)


@torch.no_grad()
def _write(own: Tensor, value: Tensor) -> None:
    own.copy_(value)


class ShardedState(defaultdict[Any, Any]):
    """``optimizer.state`` with an entry for every sharded parameter.

    A mapping that is assigned to such a parameter is written into its entry, and the entry cannot be removed: neither
    would reach the shard otherwise, which is what steps and saves use.
    """

    def __setitem__(self, key: Any, value: Any) -> None:
        entry = self.get(key)
        if isinstance(entry, ShardEntry):
            if value is not entry:
                entry.replace(value)
        else:
            super().__setitem__(key, value)

    def update(self, *args: Any, **kwargs: Any) -> None:  # dict's own would not call __setitem__
        for key, value in dict(*args, **kwargs).items():
            self[key] = value

    def __ior__(self, other: Any) -> ShardedState:  # type: ignore[misc]
        self.update(other)
        return self

    def __delitem__(self, key: Any) -> None:
        self._keep([key])
        super().__delitem__(key)

    def pop(self, key: Any, *default: Any) -> Any:
        self._keep([key])
        return super().pop(key, *default)

    def popitem(self) -> tuple[Any, Any]:
        self._keep(list(self)[-1:])
        return super().popitem()

    def clear(self) -> None:
        self._keep(self)
        super().clear()

    def _keep(self, keys: Iterable[Any]) -> None:
        if any(isinstance(self.get(key), ShardEntry) for key in keys):
            raise TypeError(
                "the state of a parameter is part of ShardedLion's shard, and cannot be removed from optimizer.state: "
                "assign zeros to its tensors instead"
            )


def check_state(state: Any, shards: Sequence[Shard]) -> None:
    """Raises ValueError where something else, such as a copy, has taken the place of an optimizer's `ShardedState`."""
    own = isinstance(state, ShardedState) and all(isinstance(state.get(s.params[0]), ShardEntry) for s in shards)
    if not own:
        raise ValueError(
            f"optimizer.state of a ShardedLion was replaced by a {type(state).__name__}, which the shard does not "
            "follow: put the old one back, and assign zeros to its tensors to begin with new momenta"
        )


def with_entries(state: MutableMapping[Any, Any], shards: Sequence[Shard], rank: int) -> ShardedState:
    """A state with an entry for every sharded parameter, first and in the order of the shards.

    What other code keeps in ``state`` stays. A `ShardedState` is changed in place, since wrappers refer to it.
    """
    before = dict(state)
    found = state if isinstance(state, ShardedState) else ShardedState(dict)
    dict.clear(found)
    for shard in shards:
        for i, p in enumerate(shard.params):
            entry = before.pop(p, {})
            others = entry.others if isinstance(entry, ShardEntry) else entry
            dict.__setitem__(found, p, ShardEntry.at(shard, i, rank, others))
    dict.update(found, before)
    return found


for _mapping in (ShardEntry, ShardedState):
    register_pytree_node(
        _mapping,
        lambda values: (list(values.values()), list(values)),
        lambda values, keys: dict(zip(keys, values, strict=True)),
    )
