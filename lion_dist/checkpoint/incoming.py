"""A checkpoint that is being loaded: compared with the model, optimizer and schedulers before any of them is touched.

This rank may have a part of what the checkpoint holds, such as one stage of a pipeline; together the ranks must have
all of it. Every parameter, buffer and extra state of this rank's model must be in the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from .._torch_compat import load_state_dict_post_hooks, load_state_dict_pre_hooks
from .contents import Contents
from .generators import saved_states, set_generators
from .incoming_columns import check_joined, check_weight, has_remainder, joining
from .incoming_state import LISTED, IncomingState
from .keys import EXTRA, MODEL
from .logical import Logical, like, parts_of
from .model_state import ModelState
from .names import Names
from .optimizer_state import params_by_name
from .ranks import Ranks
from .reader import Reader
from .schedulers import match_schedulers
from .undo import remember_elements, remember_module, remember_scheduler


class Incoming:
    """A checkpoint that fits this rank.

    Args:
        reader: reads the checkpoint.
        model, optimizer, schedulers: what to load into; without an optimizer only the model is loaded.
        cast: whether tensors may be converted to another dtype.
        ranks: the ranks that load.

    Attributes:
        extra: the caller's values.
        unclaimed: what the checkpoint holds and this rank has not, for `check_claimed`.
        hooked: whether the optimizer has hooks on load_state_dict, which may fail after everything has been read.
        tensors: tensors to load into, by key; complete once `make_room` has been called.

    Raises:
        ValueError, TypeError: the checkpoint does not fit. Nothing has been changed.
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
        contents = Contents(reader, cast)
        names, logical = Names.read(model), Logical(model)
        self.extra: Any = contents.objects.get(EXTRA)
        self._model = ModelState.read(model, names, logical)
        tied = contents.untie(names)
        self.tensors: dict[str, Tensor] = {**self._model.params, **self._model.buffers}
        masters = set[str]() if optimizer is None else _with_remainders(contents, optimizer, names)
        self._joined: dict[str, str] = {}  # key of a weight, by key of remainders that it is joined with
        listed = None if optimizer is None else params_by_name(optimizer, names).keys()
        self.unclaimed = self._check_model(contents, masters, listed, {*names.aliases, *tied.values()})
        self._extra_states = {key: contents.value(key) for key in self._model.extra}
        self._state: IncomingState | None = None
        self._schedulers: list[tuple[Any, dict[str, Any]]] = []
        self._generators: dict[str, Any] = {}
        self.hooked = False
        if optimizer is not None:
            state = self._state = IncomingState(contents, optimizer, names, logical, tied)
            self.unclaimed |= state.unclaimed
            self._schedulers = match_schedulers(contents.objects, schedulers, state.saved_count, state.matches)
            self._generators = saved_states(contents, ranks)
            self.hooked = bool(load_state_dict_pre_hooks(optimizer) or load_state_dict_post_hooks(optimizer))

    def _check_model(
        self, contents: Contents, masters: Container[str], listed: Container[str] | None, other_names: set[str]
    ) -> set[str]:
        """Compares the model's tensors and extra states with the checkpoint's.

        Args:
            contents: the checkpoint.
            masters: names of parameters that have remainders here.
            listed: names of the optimizer's parameters, if there is an optimizer.
            other_names: further names of parameters that are here.

        Returns:
            The keys that only the checkpoint has.
        """
        there = set(contents.keys(MODEL))
        here = self.tensors.keys() | self._model.extra.keys()
        _check_none_missing(here - there, "model", "checkpoint")
        for key, t in self._model.params.items():
            name = key.removeprefix(MODEL)
            lower = check_joined(contents, name, t.dtype, tuple(t.shape))
            if lower is None:
                known = listed is None or name in listed
                check_weight(contents, name, t.dtype, tuple(t.shape), name in masters, known)
            else:
                self._joined[lower] = key
        for key, t in self._model.buffers.items():
            contents.check_tensor(key, t.dtype, tuple(t.shape))
        return there - here - {MODEL + name for name in other_names}

    # Steps that change things. Each begins once every rank has completed the one before --------------

    def make_room(self, undo: ExitStack) -> None:
        """Makes the state that the checkpoint holds and the optimizer lacks. Under `ShardedLion` a collective call."""
        if self._state is not None:
            self.tensors.update(self._state.make_room(undo))
        self.tensors.update({lower: self.tensors[key] for lower, key in self._joined.items()})  # of the same shape

    def try_out(self, undo: ExitStack, copy: bool) -> None:
        """Loads what the user's code loads, which may fail: schedulers and extra states.

        Args:
            undo: puts back what is changed here.
            copy: let ``undo`` also put back the tensors that are loaded later, from a copy on the CPU.
        """
        if copy:
            beside = [] if self._state is None else self._state.beside()
            remember_elements(undo, [part for t in (*self.tensors.values(), *beside) for part in parts_of(t)])
        for i, (scheduler, state) in enumerate(self._schedulers):
            remember_scheduler(undo, scheduler)
            _attempt(f"scheduler {i}, a {type(scheduler).__name__},", scheduler.load_state_dict, state)
        for key, state in self._extra_states.items():
            module = self._model.extra[key]
            remember_module(undo, module)
            _attempt(f"{key}, of a {type(module).__name__},", module.set_extra_state, state)

    @property
    def encoded(self) -> Collection[str]:
        """Keys of momenta and remainders that are read one after another, after all else, into memory from `staged`."""
        return self._joined if self._state is None else (*self._joined, *self._state.encoded)

    def staged(self, key: str) -> tuple[Tensor, Callable[[], None]]:
        """As `IncomingState.staged`, also for remainders."""
        if key in self._joined:
            weight = self.tensors[self._joined[key]]
            remainders, join = joining(parts_of(weight))
            return like(weight, remainders), join
        assert self._state is not None
        return self._state.staged(key)

    def apply(self) -> None:
        """Loads groups and entries once the tensors are loaded. Under `ShardedLion` a collective call."""
        if self._state is not None:
            self._state.apply()

    def finish(self) -> None:
        """Warns, and sets the random number generators. Call it when nothing can fail on any rank any more."""
        if self._state is not None:
            self._state.warn_of_fresh()
        set_generators(self._generators)


def _attempt(who: str, load: Callable[[Any], object], state: Any) -> None:
    try:
        load(state)
    except Exception as error:
        raise ValueError(f"{who} does not take what was saved: {type(error).__name__}: {error}") from error


def _with_remainders(contents: Contents, optimizer: Optimizer, names: Names) -> set[str]:
    """Names of the optimizer's parameters that have remainders here."""
    return {
        names.of(p)
        for group in optimizer.param_groups
        for p in group["params"]
        if has_remainder(contents, names.of(p), p, group, optimizer.state.get(p) or {})
    }


def check_claimed(ranks: Sequence[set[str]]) -> None:
    """Raises ValueError if the checkpoint holds something that no rank has.

    Args:
        ranks: `Incoming.unclaimed` of every rank.
    """
    keys = set.intersection(*ranks)
    listed = sorted(key.removeprefix(LISTED) for key in keys if key.startswith(LISTED))
    if listed and not any(key.startswith(MODEL) for key in keys):
        raise ValueError(
            f"the optimizer lacks {len(listed)} parameters of the checkpoint's parameter groups: "
            f"{', '.join(listed[:5])}. Make it with all parameters that it had when it was saved, the frozen ones too: "
            "a parameter with requires_grad=False is not stepped"
        )
    _check_none_missing({key for key in keys if not key.startswith(LISTED)}, "checkpoint", "model or optimizer")


def _check_none_missing(keys: set[str], one: str, other: str) -> None:
    """Raises ValueError if there are keys that ``one`` has and ``other`` has not."""
    if keys:
        raise ValueError(
            f"the {one} has {len(keys)} tensors that the {other} has not: {', '.join(sorted(keys)[:5])}. Is it another "
            "model, is the optimizer missing, or does it have other parameters?"
        )
