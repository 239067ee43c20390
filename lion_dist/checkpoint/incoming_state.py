"""Parameter groups and optimizer.state of a checkpoint, compared with those here and then loaded.

The state that Lion keeps for a parameter is described by columns (`param_groups.state_columns`).

- Columns that the checkpoint holds are loaded, also where the parameter is frozen here.
- If a parameter was frozen when it was saved and is trained here, the checkpoint has no columns for it. They start at
  zero, as in torch's optimizers, and a warning says so.
- Other entries belong to a wrapper, and are loaded as they were saved.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..dtypes import DTYPES
from ..fsdp import new_state
from ..param_groups import KEYS, Group, check_group, state_columns, warn
from ..sharded_lion import ShardedLion, shard_with_columns
from ..update.state import StateColumn
from .contents import Contents
from .groups import match_groups, named_groups, saved_groups, values_for
from .keys import BESIDE, STATE, split_entry
from .logical import Logical
from .names import Names
from .optimizer_state import MAX_BESIDE, MAX_ENTRIES, check_entry_name, max_entry_bytes, params_by_name

LISTED = "listed."  # in `IncomingState.unclaimed`: prefix of a name that a parameter group of the checkpoint lists


class IncomingState:
    """Groups and state that fit an optimizer on this rank.

    Args:
        contents: the checkpoint.
        optimizer: the optimizer to load into. Nothing is changed before `make_room`.
        names, logical: the model's.
        tied: first name in the checkpoint of parameters that are known here by another name, by that name.

    Attributes:
        unclaimed: keys of the checkpoint's state that this rank has no parameter for, and names, prefixed with
            `LISTED`, of parameters that only the checkpoint's groups have.
        matches: index of the checkpoint's group for each group of the optimizer; see `groups.match_groups`.
        saved_count: number of groups in the checkpoint.

    Raises:
        ValueError, TypeError: the contents of the checkpoint do not fit.
    """

    def __init__(
        self,
        contents: Contents,
        optimizer: Optimizer,
        names: Names,
        logical: Logical,
        tied: Mapping[str, str],
    ) -> None:
        self._contents, self._optimizer, self._logical = contents, optimizer, logical
        self._params = params_by_name(optimizer, names)
        self.unclaimed: set[str] = set()
        self._groups = self._check_groups(names, tied)
        live = zip(optimizer.param_groups, self._groups, strict=True)
        loaded = [({**group, **values}, group["params"]) for group, values in live]
        self._group_of: dict[int, Group] = {id(p): group for group, params in loaded for p in params}
        self._beside = self._read_beside()
        self._keys = self._keys_of_entries(names, tied)
        self._small: dict[str, dict[str, Any]] = {}  # entries of wrappers, by parameter: values and small tensors
        self._like_param: dict[str, dict[str, torch.dtype]] = {}  # and dtypes of tensors that are sharded as it is
        self._fresh: list[str] = []  # parameters whose state starts at zero
        for name, p in self._params.items():
            self._check_entries(name, p)

    # Comparing ------------------------------------------------------------------------------------

    def _check_groups(self, names: Names, tied: Mapping[str, str]) -> list[Group]:
        """The groups as the optimizer's load_state_dict takes them."""
        saved = saved_groups(self._contents.objects)
        self.saved_count = len(saved)
        for group in saved:
            group["params"] += [name for name, first in tied.items() if first in group["params"]]
        live_groups = self._optimizer.param_groups
        named = named_groups(self._optimizer, names)
        self.matches = match_groups(named, saved)
        known = {name for group in named for name in group["params"]} | names.aliases.keys() | set(tied.values())
        self.unclaimed |= {
            f"{LISTED}{name} (of group {i})"
            for i, group in enumerate(saved)
            for name in group["params"]
            if name not in known
        }
        groups: list[Group] = []
        number = 0
        for live, j in zip(live_groups, self.matches, strict=True):
            values = {k: v for k, v in live.items() if k != "params"}
            if j is not None:
                values = self._check_values(values_for(saved[j], live), live, j)
            count = len(live["params"])
            groups.append({**values, "params": list(range(number, number + count))})
            number += count
        return groups

    def _check_values(self, values: Group, live: Group, number: int) -> Group:
        """The hyper-parameters of the checkpoint's group of this number, for a live group."""
        missing = [key for key in KEYS if key not in values]
        if missing:
            raise ValueError(f"parameter group {number} of the checkpoint has no {', '.join(missing)}")
        if self._contents.cast:
            values["momentum_dtype"] = live["momentum_dtype"]
        elif isinstance(values["momentum_dtype"], str):  # saved from state_dict(), through torch's own functions
            values["momentum_dtype"] = DTYPES.get(values["momentum_dtype"], values["momentum_dtype"])
        try:
            check_group({**live, **values})
        except OverflowError as error:
            raise ValueError(f"parameter group {number} of the checkpoint: {error}") from error
        return values

    def _read_beside(self) -> dict[str, Any]:
        """The entries of optimizer.state whose keys are no parameters."""
        keys = self._contents.keys(BESIDE)
        if len(keys) > MAX_BESIDE:
            raise ValueError(f"the checkpoint has more than {MAX_BESIDE} entries of {BESIDE[:-1]}")
        beside, limit = {}, max_entry_bytes(())
        for key in keys:
            size = self._contents.tensors[key].nbytes if key in self._contents.tensors else 0
            if size > limit:
                raise ValueError(f"{key} has {size} bytes; expected at most {limit}, as lion_dist saves")
            beside[key.removeprefix(BESIDE)] = self._contents.value(key)
        return beside

    def _keys_of_entries(self, names: Names, tied: Mapping[str, str]) -> dict[str, dict[str, str]]:
        """The keys of the checkpoint's state, by parameter and entry. Other keys become `unclaimed`."""
        found: dict[str, dict[str, str]] = {}
        known = self._params.keys() | names.aliases.keys() | set(tied.values())
        for key in self._contents.keys(STATE):
            parts = split_entry(key.removeprefix(STATE), known)
            if parts is None:
                self.unclaimed.add(key)
            elif parts[0] not in names.aliases:
                found.setdefault(parts[0], {})[parts[1]] = key
        return found

    def _check_entries(self, name: str, p: Tensor) -> None:
        """Compares what the checkpoint holds of a parameter's state, and sorts it."""
        keys = self._keys.get(name, {})
        if len(keys) > MAX_ENTRIES:
            raise ValueError(f"the state of {name} in the checkpoint has {len(keys)} entries, more than any save")
        for entry in keys:
            check_entry_name(name, entry)
        columns = {column.name: column for column in state_columns(p, self._group_of[id(p)])}
        missing = [column for column in columns if column not in keys]
        if missing and p.requires_grad:
            if keys:
                raise ValueError(
                    f"the state of {name} in the checkpoint has {sorted(keys)}, but no {', '.join(missing)}"
                )
            self._fresh.append(name)
        shape = self._logical.shape(p)
        for entry, key in keys.items():
            stored = self._contents.tensors.get(key)
            if entry in columns:
                self._contents.check_tensor(key, self._dtype(p, entry, key), columns[entry].shape(shape))
            elif stored is not None and stored.shape == shape:
                self._like_param.setdefault(name, {})[entry] = stored.torch_dtype
            elif stored is not None and stored.nbytes > max_entry_bytes(shape):
                raise ValueError(f"{key} has {stored.nbytes} bytes and not the parameter's shape")
            else:
                self._small.setdefault(name, {})[entry] = self._contents.value(key)

    def _dtype(self, p: Tensor, entry: str, key: str) -> torch.dtype:
        """The dtype of a column of p's state: as it is here, or as `make_room` will make it."""
        group = self._group_of[id(p)]
        (column,) = (column for column in state_columns(p, group) if column.name == entry)
        own = (self._optimizer.state.get(p) or {}).get(entry)
        if own is not None:
            dtype: torch.dtype = own.dtype
            if column.loaded_dtype(dtype) != dtype:
                raise ValueError(
                    f"{key} is {dtype} here, and its parameter group in the checkpoint asks for {column.dtype} "
                    "(momentum_dtype): pass cast=True to keep this optimizer's dtype"
                )
            return dtype
        stored = None if self._contents.cast else self._contents.tensors.get(key)
        if stored and column.keeps_saved and stored.torch_dtype in column.loadable:
            return stored.torch_dtype
        return column.dtype

    # Changing -------------------------------------------------------------------------------------

    def make_room(self, undo: ExitStack) -> dict[str, Tensor]:
        """Makes the state that the checkpoint holds and that is missing here. Under `ShardedLion` a collective call.

        Args:
            undo: takes the new state away again if the load fails.

        Returns:
            The tensors to load into, by key.
        """
        self._make_columns(undo)
        tensors: dict[str, Tensor] = {}
        self._new: dict[str, dict[str, Tensor]] = {}
        for name, dtypes in self._like_param.items():
            p = self._params[name]
            self._new[name] = {entry: new_state([p], [StateColumn(entry, dtype)])[0] for entry, dtype in dtypes.items()}
            for entry, t in self._new[name].items():
                tensors[self._keys[name][entry]] = self._logical(p, t)
        for name, p in self._params.items():
            for entry in self._saved_columns(name, p):
                tensors[self._keys[name][entry]] = self._logical(p, self._optimizer.state[p][entry])
        return tensors

    def _make_columns(self, undo: ExitStack) -> None:
        """Makes the columns of every parameter that lacks one that the checkpoint holds."""
        optimizer = self._optimizer
        lacking: dict[str, tuple[StateColumn, ...]] = {}
        for name, p in self._params.items():
            own, saved = optimizer.state.get(p) or {}, self._saved_columns(name, p)
            if any(entry not in own for entry in saved):
                keys, columns = self._keys[name], state_columns(p, self._group_of[id(p)])
                lacking[name] = tuple(
                    replace(c, dtype=self._dtype(p, c.name, keys[c.name])) if c.name in saved else c for c in columns
                )
        if isinstance(optimizer, ShardedLion):
            if lacking:
                new = {self._params[name]: columns for name, columns in lacking.items()}
                shard_with_columns(optimizer, new, undo)
            return
        missing: dict[str, list[tuple[Tensor, StateColumn]]] = {}
        for name, columns in lacking.items():
            p = self._params[name]
            for column in columns:
                if column.name not in (optimizer.state.get(p) or {}):
                    missing.setdefault(column.name, []).append((p, column))
        for entry, pairs in missing.items():
            made = new_state([p for p, _ in pairs], [column for _, column in pairs])
            for (p, _), t in zip(pairs, made, strict=True):
                optimizer.state[p] = {**optimizer.state.get(p, {}), entry: t}

    def _saved_columns(self, name: str, p: Tensor) -> list[str]:
        """Names of the columns of p's state that the checkpoint holds."""
        keys = self._keys.get(name, {})
        return [column.name for column in state_columns(p, self._group_of[id(p)]) if column.name in keys]

    def apply(self) -> None:
        """Loads groups and entries once the tensors are loaded. Under `ShardedLion` a collective call."""
        optimizer = self._optimizer
        params = [p for group in optimizer.param_groups for p in group["params"]]
        name_of = {id(p): name for name, p in self._params.items()}
        columns: dict[int, dict[str, Tensor]] = {}
        for i, p in enumerate(params):
            if saved := self._saved_columns(name_of[id(p)], p):
                columns[i] = {entry: optimizer.state[p][entry] for entry in saved}
        for key in [key for key in optimizer.state if not isinstance(key, Tensor)]:
            del optimizer.state[key]
        optimizer.load_state_dict({"state": columns, "param_groups": self._groups})
        state: dict[Any, Any] = optimizer.state
        state.update(self._beside)
        for name, p in self._params.items():
            entries = {**self._small.get(name, {}), **self._new.get(name, {})}
            if entries:
                state.setdefault(p, {}).update(_on_device(entries, p))

    def warn_of_fresh(self) -> None:
        """Warns of parameters whose state starts at zero."""
        if self._fresh:
            warn(
                f"{len(self._fresh)} parameters that are trained here were frozen when the checkpoint was saved "
                f"({', '.join(self._fresh[:5])}): their state starts at zero. If they are to stay frozen, call "
                "requires_grad_(False) on them before load()"
            )


def _on_device(entries: dict[str, Any], p: Tensor) -> dict[str, Any]:
    """Small tensors where torch's load_state_dict puts them: a step counter on the CPU, others beside the parameter."""
    return {
        key: value.to(p.device) if isinstance(value, Tensor) and key != "step" else value
        for key, value in entries.items()
    }
