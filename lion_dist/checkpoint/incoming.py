"""A checkpoint on its way in: compared with the model, optimizer and schedulers before any of them is touched."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..param_groups import check_group
from .named import EXP_AVG, GROUPS, MODEL, MOMENTUM, Logical, Names, model_tensors, momenta, state_to_load
from .plain import DTYPES, from_plain
from .ranks import Ranks
from .reader import Reader

SCHEDULER, EXTRA, RANKS, RNG = "scheduler.", "extra", "ranks", "rng."


def generators(rank: int) -> dict[str, Any]:
    """The states of this rank's random number generators, by key."""
    state: dict[str, Any] = {f"{RNG}{rank}.python": random.getstate(), f"{RNG}{rank}.cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        state[f"{RNG}{rank}.cuda"] = torch.cuda.get_rng_state()
    return state


class Incoming:
    """A checkpoint that fits.

    Attributes:
        tensors: to load into, by key.
        extra: the user's.
    """

    tensors: dict[str, Tensor]
    extra: Any

    def __init__(
        self,
        reader: Reader,
        model: nn.Module,
        optimizer: Optimizer | None,
        schedulers: Sequence[Any],
        cast: bool,
        ranks: Ranks,
    ) -> None:
        names, logical = Names.read(model), Logical(model)
        manifest = reader.manifest
        objects = from_plain(manifest.objects)
        self.extra = objects.get(EXTRA)
        self.tensors = {key: t for key, t, _ in model_tensors(model, names, logical)}
        if optimizer is not None:
            self.tensors.update(momenta(optimizer, names, logical))
        aliases = {MODEL + name for name in names.aliases}
        aliases |= {MOMENTUM + name + EXP_AVG for name in names.aliases}
        wanted = (MODEL,) if optimizer is None else (MODEL, MOMENTUM)
        there = {k for k in manifest.tensors if k.startswith(wanted)} - aliases
        same_keys(there, set(self.tensors))
        for key, t in self.tensors.items():
            held = manifest.tensors[key]
            if held.shape != tuple(t.shape):
                raise ValueError(f"{key} has shape {held.shape} in the checkpoint and {tuple(t.shape)} here")
            if DTYPES[held.dtype] != t.dtype and not cast:
                raise ValueError(
                    f"{key} is {held.dtype} in the checkpoint and {t.dtype} here: pass cast=True if it is to be "
                    "converted, or make the model and optimizer with the same dtypes (momentum_dtype)"
                )
        self._optimizer, self._schedulers = optimizer, []
        if optimizer is not None:
            self._load = state_to_load(optimizer, names, _groups(objects), cast=cast)
            for saved, live in zip(self._load["param_groups"], optimizer.param_groups, strict=True):
                check_group({**live, **saved})
            self._schedulers = _schedulers(objects, schedulers)
        self._rng = self._generators(reader, objects, ranks)

    def _generators(self, reader: Reader, objects: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
        """The states saved for this rank; {} if the ranks were others, or only weights are wanted."""
        if self._optimizer is None or objects.get(RANKS) != ranks.size:
            return {}
        own: dict[str, Any] = {}
        for key in generators(ranks.rank):
            try:
                if key in objects:
                    own[key] = objects[key]
                    random.Random().setstate(own[key])
                elif key in reader.manifest.tensors:
                    own[key] = reader.fetch(key)
                    torch.Generator("cuda" if key.endswith(".cuda") else "cpu").set_state(own[key])
            except (TypeError, ValueError, OverflowError, RuntimeError) as error:
                raise ValueError(
                    f"{key} of the checkpoint is no state of a random number generator: {error}"
                ) from error
        return own

    def apply(self) -> None:
        """What is not a tensor, and what follows from those that were loaded."""
        if self._optimizer is not None:
            self._optimizer.load_state_dict(self._load)
        for scheduler, state in self._schedulers:
            scheduler.load_state_dict(state)
        for key, value in self._rng.items():
            if key.endswith(".python"):
                random.setstate(value)
            else:
                (torch.set_rng_state if key.endswith(".cpu") else torch.cuda.set_rng_state)(value)


def same_keys(there: set[str], here: set[str]) -> None:
    """Raises ValueError, naming some, unless a checkpoint has the tensors that are here, and no more."""
    for has, lacks, one, other in (
        (here, there, "model or optimizer", "checkpoint"),
        (there, here, "checkpoint", "model or optimizer"),
    ):
        if has - lacks:
            some = ", ".join(sorted(has - lacks)[:5])
            raise ValueError(
                f"the {one} has {len(has - lacks)} tensors that the {other} has not: {some}. Is it another model, are "
                "other parameters frozen, or is the optimizer missing?"
            )


def _groups(objects: dict[str, Any]) -> list[dict[str, Any]]:
    """Of `named.groups_by_name`, from their keys."""
    groups: dict[int, dict[str, Any]] = {}
    for key, value in objects.items():
        if key.startswith(GROUPS):
            number, _, name = key.removeprefix(GROUPS).partition(".")
            if not number.isdigit() or not name:
                raise ValueError(f"{key!r} names no value of a parameter group")
            groups.setdefault(int(number), {})[name] = value
    for i, group in groups.items():
        names = group.get("params")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"parameter group {i} of the checkpoint has no list of names")
    return [groups[number] for number in sorted(groups)]


def _same_form(saved: Any, mine: Any) -> bool:
    """Whether a scheduler may load it: the same keys, and as many schedulers or functions within."""
    if type(mine) is dict and type(saved) is dict:
        return saved.keys() == mine.keys() and all(_same_form(saved[key], mine[key]) for key in mine)
    if isinstance(mine, (list, tuple)) and any(value is None or isinstance(value, dict) for value in mine):
        return isinstance(saved, (list, tuple)) and len(saved) == len(mine) and all(map(_same_form, saved, mine))
    return True


def _schedulers(objects: dict[str, Any], given: Sequence[Any]) -> list[tuple[Any, dict[str, Any]]]:
    keys = sorted((key for key in objects if key.startswith(SCHEDULER)), key=lambda key: (len(key), key))
    saved = [objects[key] for key in keys]
    if len(saved) != len(given):
        raise ValueError(f"the checkpoint has {len(saved)} schedulers, and {len(given)} were given to load into")
    for i, (state, scheduler) in enumerate(zip(saved, given, strict=True)):
        mine = scheduler.state_dict()
        if type(state) is not dict or not _same_form(state, mine):
            raise ValueError(
                f"scheduler {i} of the checkpoint is not the state of a {type(scheduler).__name__} of these parts"
            )
    return list(zip(given, saved, strict=True))
