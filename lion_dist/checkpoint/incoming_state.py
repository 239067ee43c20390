"""Parameter groups and optimizer.state of a checkpoint, compared with those here and then loaded.

The state that Lion keeps for a parameter is described by columns (`param_groups.state_columns`).

- Columns that the checkpoint holds are loaded, also where the parameter is frozen here.
- If a parameter was frozen when it was saved and is trained here, the checkpoint has no columns for it. They start at
  zero, as in torch's optimizers, and a warning says so.
- Weights, remainders and momenta that were saved in another form than they have here are converted as they are read,
  or encoded once they are read: see incoming_columns.py.
- Other entries belong to a wrapper, and are loaded as they were saved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..dtypes import DTYPES
from ..fsdp import new_state
from ..param_groups import KEYS, Group, check_group, keep_storage, state_columns, warn
from ..sharded_access import shard_with_columns
from ..sharded_lion import ShardedLion
from ..update.state import EXP_AVG, EXP_AVG_SCALE, REMAINDER, StateColumn
from .codes import code_runs
from .contents import Contents
from .groups import match_groups, named_groups, saved_groups, values_for
from .incoming_columns import (
    CONVERTED,
    Routes,
    has_remainder,
    route_codes,
    route_remainder,
    set_conversion,
    stored_scale,
)
from .keys import BESIDE, MODEL, STATE, split_entry
from .logical import Logical, parts_of
from .names import Names
from .optimizer_state import (
    MAX_BESIDE,
    MAX_ENTRIES,
    check_entry_name,
    has_whole_blocks,
    max_entry_bytes,
    params_by_name,
)

_ADDED = ("master_weights", "rounding_step")  # keys that groups saved by a version without them lack
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
        self._routes: dict[str, Routes] = {}
        self.encoded: dict[str, str] = {}  # name of the parameter, by key of a momentum that is encoded
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
        self._was_8_bit: set[int] = set()  # ids of parameters
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
                if _to_dtype(saved[j]["momentum_dtype"]) == torch.int8:
                    self._was_8_bit |= {id(p) for p in live["params"]}
            count = len(live["params"])
            groups.append({**values, "params": list(range(number, number + count))})
            number += count
        return groups

    def _check_values(self, values: Group, live: Group, number: int) -> Group:
        """The hyper-parameters of the checkpoint's group of this number, for a live group."""
        missing = [key for key in KEYS if key not in values and key not in _ADDED]
        if missing:
            raise ValueError(f"parameter group {number} of the checkpoint has no {', '.join(missing)}")
        if self._contents.cast:
            values["momentum_dtype"] = live["momentum_dtype"]
        else:  # the name of one was saved from state_dict(), through torch's own functions
            values["momentum_dtype"] = _to_dtype(values["momentum_dtype"])
        try:
            keep_storage(values, live)
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
        missing = [column for column in columns if column not in keys and column not in (EXP_AVG_SCALE, REMAINDER)]
        if missing and p.requires_grad:
            if keys:
                raise ValueError(
                    f"the state of {name} in the checkpoint has {sorted(keys)}, but no {', '.join(missing)}"
                )
            self._fresh.append(name)
        shape, routes = self._logical.shape(p), self._find_routes(name, p, keys, columns)
        self._routes[name] = routes
        for entry, key in keys.items():
            stored = self._contents.tensors.get(key)
            if entry in CONVERTED:
                continue
            if entry in columns:
                routes.read[entry], routes.dtypes[entry] = key, self._dtype(p, entry, key)
                self._contents.check_tensor(key, routes.dtypes[entry], columns[entry].shape(shape))
            elif stored is not None and stored.shape == shape:
                self._like_param.setdefault(name, {})[entry] = stored.torch_dtype
            elif stored is not None and stored.nbytes > max_entry_bytes(shape):
                raise ValueError(f"{key} has {stored.nbytes} bytes and not the parameter's shape")
            else:
                self._small.setdefault(name, {})[entry] = self._contents.value(key)

    def _find_routes(self, name: str, p: Tensor, keys: Mapping[str, str], columns: Mapping[str, StateColumn]) -> Routes:
        """Where the momentum and the remainder of a parameter come from."""
        routes = Routes()
        if EXP_AVG in keys:
            self._route_momentum(routes, name, p, keys, columns[EXP_AVG].dtype == torch.int8)
        elif EXP_AVG_SCALE in keys:
            raise ValueError(f"the state of {name} in the checkpoint has {EXP_AVG_SCALE}, but no {EXP_AVG}")
        if MODEL + name in self._contents.tensors and p.dtype != torch.float32:
            own = self._optimizer.state.get(p) or {}
            remainder = has_remainder(self._contents, name, p, self._group_of[id(p)], own)
            route_remainder(routes, self._contents, name, keys, self._logical.shape(p), remainder)
        return routes

    def _route_momentum(self, routes: Routes, name: str, p: Tensor, keys: Mapping[str, str], eight_bits: bool) -> None:
        contents, key, shape = self._contents, keys[EXP_AVG], self._logical.shape(p)
        stored = contents.tensor(key, shape)
        scale = stored_scale(contents, keys, shape)
        if eight_bits:
            route_codes(routes, contents, keys, scale, has_whole_blocks(p, self._logical))
            if routes.encoded:
                self.encoded[key] = name
            return
        dtype = self._dtype(p, EXP_AVG, key)
        routes.read[EXP_AVG], routes.dtypes[EXP_AVG] = key, dtype
        # A conversion that loses nothing needs no cast=True.
        wider = dtype == torch.float32 and stored.torch_dtype in (torch.bfloat16, torch.float16)
        if scale is not None or id(p) in self._was_8_bit or wider:
            set_conversion(contents, key, scale)
        else:
            contents.check_tensor(key, dtype, shape)

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
            for entry, key in self._routes[name].read.items():
                tensors[key] = self._logical(p, self._optimizer.state[p][entry])
        return tensors

    def beside(self) -> list[Tensor]:
        """Tensors that the load changes beside those that it reads into, once `make_room` has been called."""
        state = self._optimizer.state
        return [
            state[p][column]
            for name, p in self._params.items()
            for column in self._columns_beside(name, p)
            if self._routes[name].filled
        ]

    def staged(self, key: str) -> tuple[Tensor, Callable[[], None]]:
        """Memory to read a momentum into that is encoded.

        Args:
            key: a key of ``encoded``.

        Returns:
            A tensor to read into, float32, in the shape of the whole parameter; and a function to call then.
        """
        p = self._params[self.encoded[key]]
        codes = self._logical(p, self._optimizer.state[p][EXP_AVG])
        runs = code_runs(parts_of(codes), parts_of(self._optimizer.state[p][EXP_AVG_SCALE]))
        buffers = [run.empty() for run in runs]

        def encode() -> None:
            for run, (buffer, _) in zip(runs, buffers, strict=True):
                run.take(buffer)

        return self._logical.like(p, codes, [view for _, views in buffers for view in views]), encode

    def _make_columns(self, undo: ExitStack) -> None:
        """Makes the columns of every parameter that lacks one that the checkpoint holds."""
        optimizer = self._optimizer
        lacking: dict[str, tuple[StateColumn, ...]] = {}
        for name, p in self._params.items():
            own, routes = optimizer.state.get(p) or {}, self._routes[name]
            if any(entry not in own for entry in routes.filled):
                columns = state_columns(p, self._group_of[id(p)])
                lacking[name] = tuple(replace(c, dtype=routes.dtypes.get(c.name, c.dtype)) for c in columns)
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

    def _columns_beside(self, name: str, p: Tensor) -> list[str]:
        """Names of the columns of p's state that the checkpoint does not hold."""
        columns = state_columns(p, self._group_of[id(p)])
        return [column.name for column in columns if column.name not in self._routes[name].read]

    def apply(self) -> None:
        """Loads groups and entries once the tensors are loaded. Under `ShardedLion` a collective call."""
        optimizer = self._optimizer
        params = [p for group in optimizer.param_groups for p in group["params"]]
        name_of = {id(p): name for name, p in self._params.items()}
        columns: dict[int, dict[str, Tensor]] = {}
        for i, p in enumerate(params):
            name = name_of[id(p)]
            routes, beside = self._routes[name], self._columns_beside(name, p)
            if routes.filled:
                for entry in beside:
                    if entry not in routes.filled:  # such as the remainder of a weight that was saved in bfloat16
                        _fill_zeros(optimizer.state[p][entry])
                columns[i] = {entry: optimizer.state[p][entry] for entry in (*routes.read, *beside)}
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


def _fill_zeros(t: Tensor) -> None:
    with torch.no_grad():
        for part in parts_of(t):
            part.zero_()


def _to_dtype(value: Any) -> Any:
    """A dtype that was given by its name, as in a state_dict() that torch's own functions have saved."""
    return DTYPES.get(value, value) if isinstance(value, str) else value


def _on_device(entries: dict[str, Any], p: Tensor) -> dict[str, Any]:
    """Small tensors where torch's load_state_dict puts them: a step counter on the CPU, others beside the parameter."""
    return {
        key: value.to(p.device) if isinstance(value, Tensor) and key != "step" else value
        for key, value in entries.items()
    }
