"""A checkpoint on its way in: compared with the model, optimizer and schedulers before any of them is touched.

What this rank has of a model may be a part of what the checkpoint has, as a stage of a pipeline is; together the ranks
must have all of it.

- A parameter of the model, a buffer or an extra state that the checkpoint lacks is an error.
- A momentum that the checkpoint has is loaded, also where the parameter is frozen here.
- A momentum that the checkpoint lacks, of a parameter that was frozen when it was saved and is trained here, starts
  at zero, as in torch's optimizers; a warning says so.
"""

from __future__ import annotations

import random
import re
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .._torch_compat import load_state_dict_post_hooks, load_state_dict_pre_hooks
from ..fsdp import local, new_momenta
from ..param_groups import KEYS, check_group, momentum_dtype
from ..sharded_lion import ShardedLion
from ..sharding.box_tensor import BoxTensor
from .manifest import check_name
from .named import (
    BESIDE,
    EXP_AVG,
    GROUPS,
    MAX_BESIDE,
    MAX_ENTRIES,
    MODEL,
    STATE,
    Logical,
    ModelState,
    Names,
    check_entry,
    entry_limit,
    groups_by_name,
    match_groups,
    parameters,
    split_key,
    values_of,
)
from .plain import DTYPES, from_plain
from .ranks import Ranks
from .reader import Reader
from .undo import remember_elements, remember_module, remember_state
from .union import by_group, with_lists

SCHEDULER, EXTRA, RANKS, RNG, TIED = "scheduler.", "extra", "ranks", "rng.", "tied."
_MOMENTA = (torch.float32, torch.bfloat16, torch.float16)  # dtypes that a momentum may have
_LISTED = "listed."  # in `Incoming.unclaimed`, before names of parameters that a group has
_GROUP_KEY = re.compile(re.escape(GROUPS) + r"(0|[1-9][0-9]{0,5})\.(.+)")


def generators(rank: int) -> dict[str, Any]:
    """The states of this rank's random number generators, by key."""
    state: dict[str, Any] = {f"{RNG}{rank}.python": random.getstate(), f"{RNG}{rank}.cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        state[f"{RNG}{rank}.cuda"] = torch.cuda.get_rng_state()
    return state


class Incoming:
    """A checkpoint that fits this rank.

    Attributes:
        extra: the user's.
        unclaimed: what the checkpoint has and this rank has not, for `check_claimed`.
        hooked: whether the optimizer has hooks on load_state_dict, which may fail when all has been read.
        tensors: to load into, by key; all of them once `make_room` has been called.
    """

    def __init__(
        self,
        reader: Reader,
        model: nn.Module,
        optimizer: Optimizer | None,
        schedulers: Sequence[Any],
        cast: bool,
        ranks: Ranks,
    ) -> None:
        self._reader, self._optimizer, self._cast, self._ranks = reader, optimizer, cast, ranks
        self._names, self._logical = Names.read(model), Logical(model)
        self._objects = {key: from_plain(value) for key, value in reader.manifest.objects.items()}
        self.extra: Any = self._objects.get(EXTRA)
        self.tensors: dict[str, Tensor] = {}
        self.unclaimed: set[str] = set()
        self.hooked = False
        self._of_model = ModelState.read(model, self._names, self._logical)
        self._tied = self._untie()
        self._check_model()
        self._schedulers: list[tuple[Any, dict[str, Any]]] = []
        self._rng: dict[str, Any] = {}
        if optimizer is not None:
            self._params = parameters(optimizer, self._names)
            self._check_groups(optimizer)
            self._check_state(optimizer)
            self._schedulers = _schedulers(self._objects, schedulers, optimizer, self._matches)
            self._rng = self._generators()
            self.hooked = bool(load_state_dict_pre_hooks(optimizer) or load_state_dict_post_hooks(optimizer))

    # What is compared ---------------------------------------------------------------------------

    def _untie(self) -> dict[str, str]:
        """Names of parameters here that the checkpoint has under another name, and that name: of weights that were tied
        there. What the checkpoint has of one it is made to have of the other."""
        manifest, found = self._reader.manifest, {}
        for name in self._names.of.values():
            first = self._objects.get(TIED + name)
            if not isinstance(first, str) or MODEL + name in manifest.tensors or MODEL + first not in manifest.tensors:
                continue
            found[name] = first
            manifest.tensors[MODEL + name] = manifest.tensors[MODEL + first]
            old, new = STATE + first + ".", STATE + name + "."
            for of in (manifest.tensors, manifest.objects, self._objects):
                values: dict[str, Any] = of
                values.update({new + key.removeprefix(old): values[key] for key in [*values] if key.startswith(old)})
        return found

    def _check_model(self) -> None:
        of_model, manifest = self._of_model, self._reader.manifest
        self.tensors = {**of_model.params, **of_model.buffers}
        there = {key for key in manifest.tensors if key.startswith(MODEL)}
        there |= {key for key in manifest.objects if key.startswith(MODEL)}
        here = self.tensors.keys() | of_model.extra.keys()
        lacking(here - there, "model", "checkpoint")
        self.unclaimed |= there - here - {MODEL + name for name in (*self._names.aliases, *self._tied.values())}
        for key, t in self.tensors.items():
            self._check_tensor(key, t.dtype, tuple(t.shape))
        self._extra_states = {key: self._value(key) for key in of_model.extra}

    def _check_tensor(self, key: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        held = self._reader.manifest.tensors.get(key)
        if held is None:
            raise ValueError(f"{key} is no tensor in the checkpoint")
        if held.shape != shape:
            raise ValueError(f"{key} has shape {held.shape} in the checkpoint and {shape} here")
        if DTYPES[held.dtype] != dtype and not self._cast:
            raise ValueError(
                f"{key} is {held.dtype} in the checkpoint and {dtype} here: pass cast=True if it is to be converted, "
                "or make the model and optimizer with the same dtypes (momentum_dtype)"
            )

    def _value(self, key: str) -> Any:
        """A value of the checkpoint, which may be a small tensor."""
        held = self._reader.manifest.tensors.get(key)
        return self._objects.get(key) if held is None else self._reader.fetch(key)

    def _check_groups(self, optimizer: Optimizer) -> None:
        saved = _groups(self._objects)
        for group in saved:
            group["params"] += [name for name, tied in self._tied.items() if tied in group["params"]]
        mine = groups_by_name(optimizer, self._names)
        aliases = self._names.aliases
        self._matches = match_groups(mine, saved)
        known = {name for group in mine for name in group["params"]} | aliases.keys() | set(self._tied.values())
        self.unclaimed |= {
            f"{_LISTED}{name} (of group {i})"
            for i, group in enumerate(saved)
            for name in group["params"]
            if name not in known
        }
        self._groups: list[dict[str, Any]] = []
        number = 0
        for live, j in zip(optimizer.param_groups, self._matches, strict=True):
            values = {k: v for k, v in live.items() if k != "params"} if j is None else values_of(saved[j], live)
            lacks = [key for key in KEYS if key not in values]
            if lacks:
                raise ValueError(f"parameter group {j} of the checkpoint has no {', '.join(lacks)}")
            if isinstance(values["momentum_dtype"], str):  # as state_dict() has it, which torch's own doors save
                values["momentum_dtype"] = DTYPES.get(values["momentum_dtype"], values["momentum_dtype"])
            if self._cast:
                values["momentum_dtype"] = live["momentum_dtype"]
            try:
                check_group({**live, **values})
            except OverflowError as error:
                raise ValueError(f"parameter group {j} of the checkpoint: {error}") from error
            count = len(live["params"])
            self._groups.append({**values, "params": list(range(number, number + count))})
            number += count

    def _check_state(self, optimizer: Optimizer) -> None:
        """Sorts what the checkpoint has of the optimizer's state."""
        manifest, aliases = self._reader.manifest, self._names.aliases
        self._entries: dict[str, dict[str, str]] = {}  # keys by name and entry
        self._beside: dict[str, Any] = {}
        known = {**dict.fromkeys((*aliases, *self._tied.values())), **self._params}
        if sum(key.startswith(BESIDE) for key in (*manifest.tensors, *manifest.objects)) > MAX_BESIDE:
            raise ValueError(f"the checkpoint has more than {MAX_BESIDE} entries of {BESIDE[:-1]}")
        for key in (*manifest.tensors, *manifest.objects):
            if key.startswith(BESIDE):
                size = manifest.tensors[key].nbytes if key in manifest.tensors else 0
                if size > entry_limit(()):
                    raise ValueError(f"{key} has {size} bytes; expected at most {entry_limit(())}, as any save")
                self._beside[key.removeprefix(BESIDE)] = self._value(key)
            if not key.startswith(STATE):
                continue
            found = split_key(key.removeprefix(STATE), known)
            if found is None:
                self.unclaimed.add(key)
            elif found[0] not in aliases:
                self._entries.setdefault(found[0], {})[found[1]] = key
        group_of = {id(p): group for group in self._groups_of(optimizer) for p in group["params"]}
        self._small: dict[str, dict[str, Any]] = {}  # entries that are not sharded as the parameter is
        self._wide: dict[str, dict[str, torch.dtype]] = {}  # dtypes of tensors that are
        self._fresh: list[str] = []  # parameters whose momenta start at zero
        for name, p in self._params.items():
            entries = self._entries.get(name, {})
            if len(entries) > MAX_ENTRIES:
                raise ValueError(
                    f"the state of {name} in the checkpoint has {len(entries)} entries, more than any save"
                )
            for entry in entries:
                check_entry(name, entry)
            if EXP_AVG not in entries:
                if p.requires_grad and entries:
                    raise ValueError(f"the state of {name} in the checkpoint has {sorted(entries)}, but no exp_avg")
                if p.requires_grad:
                    self._fresh.append(name)
            for entry, key in entries.items():
                held = manifest.tensors.get(key)
                if entry == EXP_AVG:
                    self._check_tensor(key, self._dtype(optimizer, p, group_of[id(p)], key), self._logical.shape(p))
                elif held is not None and held.shape == self._logical.shape(p):
                    self._wide.setdefault(name, {})[entry] = DTYPES[held.dtype]
                elif held is not None and held.nbytes > entry_limit(self._logical.shape(p)):
                    raise ValueError(f"{key} has {held.nbytes} bytes and not the parameter's shape")
                else:
                    self._small.setdefault(name, {})[entry] = self._value(key)

    def _groups_of(self, optimizer: Optimizer) -> list[dict[str, Any]]:
        return [
            {**live, **values, "params": live["params"]}
            for live, values in zip(optimizer.param_groups, self._groups, strict=True)
        ]

    def _dtype(self, optimizer: Optimizer, p: Tensor, group: dict[str, Any], key: str) -> torch.dtype:
        """The dtype that a momentum has here, or will have."""
        entry = optimizer.state.get(p) or {}
        held = self._reader.manifest.tensors.get(key)
        explicit: torch.dtype | None = group["momentum_dtype"]
        if EXP_AVG in entry:
            dtype: torch.dtype = entry[EXP_AVG].dtype
            if explicit is not None and explicit != dtype:
                raise ValueError(
                    f"the momentum_dtype of a parameter group is {explicit} in the checkpoint, and {key} is {dtype} "
                    "here: pass cast=True to keep this optimizer's"
                )
            return dtype
        if explicit is None and held is not None and not self._cast and DTYPES[held.dtype] in _MOMENTA:
            return DTYPES[held.dtype]
        return momentum_dtype(p, group)

    def _generators(self) -> dict[str, Any]:
        """The states saved for this rank; {} if the ranks were others."""
        if self._objects.get(RANKS) != self._ranks.size:
            return {}
        own: dict[str, Any] = {}
        for key in generators(self._ranks.rank):
            try:
                if key in self._objects:
                    own[key] = self._objects[key]
                    trial = random.Random()
                    trial.setstate(own[key])
                    if trial.getstate() != own[key]:  # it keeps 32 bits of any number
                        raise ValueError("some of its numbers are too large")
                elif key in self._reader.manifest.tensors:
                    own[key] = self._reader.fetch(key)
                    torch.Generator("cuda" if key.endswith(".cuda") else "cpu").set_state(own[key])
            except Exception as error:  # of many types, by what is wrong
                raise ValueError(
                    f"{key} of the checkpoint is no state of a random number generator: {error}"
                ) from error
        return own

    # What is changed ----------------------------------------------------------------------------

    def make_room(self, undo: ExitStack) -> None:
        """Makes state for parameters that have some in the checkpoint and none here; under `ShardedLion` a collective
        call, since a momentum is sharded."""
        optimizer = self._optimizer
        if optimizer is None:
            return
        group_of = {id(p): group for group in self._groups_of(optimizer) for p in group["params"]}
        pairs = [
            (p, self._dtype(optimizer, p, group_of[id(p)], self._entries[name][EXP_AVG]))
            for name, p in self._params.items()
            if EXP_AVG in self._entries.get(name, {}) and EXP_AVG not in (optimizer.state.get(p) or {})
        ]
        if isinstance(optimizer, ShardedLion):
            if pairs:
                undo.callback(optimizer._take_back, optimizer._shards, list(optimizer._frozen))
                optimizer._shard_frozen([p for p, _ in pairs], {id(p): dtype for p, dtype in pairs})
        else:
            momenta = new_momenta([p for p, _ in pairs], [dtype for _, dtype in pairs])
            for (p, _), m in zip(pairs, momenta, strict=True):
                optimizer.state[p] = {**optimizer.state.get(p, {}), EXP_AVG: m}
        self._new: dict[str, dict[str, Tensor]] = {}
        for name, dtypes in self._wide.items():
            p = self._params[name]
            self._new[name] = {entry: new_momenta([p], [dtype])[0] for entry, dtype in dtypes.items()}
            for entry, t in self._new[name].items():
                self.tensors[self._entries[name][entry]] = self._logical(p, t)
        for name, p in self._params.items():
            key = self._entries.get(name, {}).get(EXP_AVG)
            if key is not None:
                self.tensors[key] = self._logical(p, optimizer.state[p][EXP_AVG])

    def try_out(self, undo: ExitStack, copy: bool) -> None:
        """Changes what users' code changes, which may fail, and has ``undo`` put it back.

        Args:
            copy: whether to keep a copy of the tensors too.
        """
        if copy:
            remember_elements(undo, [part for t in self.tensors.values() for part in _parts(t)])
        for i, (scheduler, state) in enumerate(self._schedulers):
            remember_state(undo, scheduler)
            _attempt(f"scheduler {i}, a {type(scheduler).__name__},", scheduler.load_state_dict, state)
        for key, state in self._extra_states.items():
            module = self._of_model.extra[key]
            remember_module(undo, module)
            _attempt(f"{key}, of a {type(module).__name__},", module.set_extra_state, state)

    def apply(self) -> None:
        """Loads groups, schedulers and values once the tensors are there; a collective call under `ShardedLion`."""
        optimizer = self._optimizer
        if optimizer is None:
            return
        params = [p for group in optimizer.param_groups for p in group["params"]]
        name_of = {id(p): name for name, p in self._params.items()}
        entries = {
            i: {EXP_AVG: optimizer.state[p][EXP_AVG]}
            for i, p in enumerate(params)
            if EXP_AVG in self._entries.get(name_of[id(p)], {})
        }
        for key in [key for key in optimizer.state if not isinstance(key, Tensor)]:
            del optimizer.state[key]
        optimizer.load_state_dict({"state": entries, "param_groups": self._groups})
        state: dict[Any, Any] = optimizer.state
        state.update(self._beside)
        for name, p in self._params.items():
            beside = {**self._small.get(name, {}), **self._new.get(name, {})}
            if beside:
                state.setdefault(p, {}).update(_on_device(beside, p))

    def finish(self) -> None:
        """Comes last, once nothing can fail any more on any rank."""
        if self._optimizer is not None and self._fresh:
            warnings.warn(
                f"lion_dist: {len(self._fresh)} parameters that are trained here were frozen when the checkpoint was "
                f"saved ({', '.join(self._fresh[:5])}): their momenta start at zero. If they are to stay frozen, call "
                "requires_grad_(False) on them before load()",
                stacklevel=4,
            )
        for key, value in self._rng.items():
            if key.endswith(".python"):
                random.setstate(value)
            else:
                (torch.set_rng_state if key.endswith(".cpu") else torch.cuda.set_rng_state)(value)


def _attempt(who: str, load: Callable[[Any], object], state: Any) -> None:
    try:
        load(state)
    except Exception as error:
        raise ValueError(f"{who} does not take what was saved: {type(error).__name__}: {error}") from error


def _on_device(entries: dict[str, Any], p: Tensor) -> dict[str, Any]:
    """Small tensors where torch's load_state_dict puts them: a step counter on the CPU, others with the parameter."""
    return {
        key: value.to(p.device) if isinstance(value, Tensor) and key != "step" else value
        for key, value in entries.items()
    }


def _parts(t: Any) -> list[Tensor]:
    return list(t.parts) if isinstance(t, BoxTensor) else [local(t)]


def check_claimed(ranks: Sequence[set[str]]) -> None:
    """Raises ValueError, naming some, where the checkpoint has what no rank has."""
    keys = set.intersection(*ranks)
    listed = sorted(key.removeprefix(_LISTED) for key in keys if key.startswith(_LISTED))
    if listed and not any(key.startswith(MODEL) for key in keys):
        raise ValueError(
            f"the optimizer lacks {len(listed)} parameters of the checkpoint's parameter groups: "
            f"{', '.join(listed[:5])}. Make it of all parameters that it had when it was saved, the frozen ones too: a "
            "parameter with requires_grad=False is not stepped"
        )
    lacking({key for key in keys if not key.startswith(_LISTED)}, "checkpoint", "model or optimizer")


def lacking(keys: set[str], one: str, other: str) -> None:
    """Raises ValueError, naming some, if there are keys that ``one`` has and ``other`` has not."""
    if keys:
        raise ValueError(
            f"the {one} has {len(keys)} tensors that the {other} has not: {', '.join(sorted(keys)[:5])}. Is "
            "it another model, is the optimizer missing, or was it made of other parameters?"
        )


def _groups(objects: dict[str, Any]) -> list[dict[str, Any]]:
    """Of `named.groups_by_name`, from their keys."""
    groups: dict[int, dict[str, Any]] = {}
    for key, value in objects.items():
        if key.startswith(GROUPS):
            found = _GROUP_KEY.fullmatch(key)
            if not found:
                raise ValueError(f"{key!r} names no value of a parameter group")
            groups.setdefault(int(found[1]), {})[found[2]] = value
    for i, group in groups.items():
        names = group.get("params")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"parameter group {i} of the checkpoint has no list of names")
        for name in names:
            check_name(name)
    return [groups[number] for number in sorted(groups)]


def _same_form(saved: Any, mine: Any) -> bool:
    """Whether a scheduler may load it: the same keys, and as many schedulers or functions within."""
    if type(mine) is dict and type(saved) is dict:
        return saved.keys() == mine.keys() and all(_same_form(saved[key], mine[key]) for key in mine)
    if isinstance(mine, (list, tuple)) and any(value is None or isinstance(value, dict) for value in mine):
        return isinstance(saved, (list, tuple)) and len(saved) == len(mine) and all(map(_same_form, saved, mine))
    return True


def _schedulers(
    objects: dict[str, Any], given: Sequence[Any], optimizer: Optimizer, matches: Sequence[int | None]
) -> list[tuple[Any, dict[str, Any]]]:
    """Each scheduler with its state, in which lists by parameter group are in the order of the groups here."""
    keys = sorted((key for key in objects if key.startswith(SCHEDULER)), key=lambda key: (len(key), key))
    if keys != [f"{SCHEDULER}{i}" for i in range(len(keys))]:
        raise ValueError(f"the checkpoint has schedulers {keys[:5]}; expected them to be numbered from 0")
    if len(keys) != len(given):
        raise ValueError(f"the checkpoint has {len(keys)} schedulers, and {len(given)} were given to load into")
    found = []
    saved_groups = len(_groups(objects))
    for i, (key, scheduler) in enumerate(zip(keys, given, strict=True)):
        saved, mine = objects[key], scheduler.state_dict()
        lists = {}
        for path, here in by_group(mine, len(optimizer.param_groups)):
            there = _at(saved, path)
            if isinstance(there, list) and len(there) == saved_groups:
                lists[path] = [here[k] if j is None else there[j] for k, j in enumerate(matches)]
        saved = with_lists(saved, lists)
        if type(saved) is not dict or not _same_form(saved, mine):
            raise ValueError(
                f"scheduler {i} of the checkpoint is not the state of a {type(scheduler).__name__} of these parts"
            )
        found.append((scheduler, saved))
    return found


def _at(state: Any, path: Sequence[Any]) -> Any:
    """Returns the value at a place of a scheduler's state; None if there is no such place."""
    for step in path:
        if type(state) is dict:
            state = state.get(step)
        elif isinstance(state, (list, tuple)) and type(step) is int and step < len(state):
            state = state[step]
        else:
            return None
    return state
