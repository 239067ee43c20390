"""Saves and restores the state of each rank's random number generators."""

from __future__ import annotations

import random
from typing import Any

import torch

from .contents import Contents
from .keys import RANKS, RNG
from .ranks import Ranks


def generator_states(rank: int) -> dict[str, Any]:
    """The states of this rank's generators, by key: Python's, and torch's on the CPU and on the current GPU."""
    states: dict[str, Any] = {f"{RNG}{rank}.python": random.getstate(), f"{RNG}{rank}.cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states[f"{RNG}{rank}.cuda"] = torch.cuda.get_rng_state()
    return states


def saved_states(contents: Contents, ranks: Ranks) -> dict[str, Any]:
    """The states that a checkpoint holds for this rank's generators, by key; {} if another number of ranks saved.

    Raises:
        ValueError: one is not the state of a generator.
    """
    if contents.objects.get(RANKS) != ranks.size:
        return {}
    found: dict[str, Any] = {}
    for key in generator_states(ranks.rank):
        try:
            if key in contents.objects:
                found[key] = contents.objects[key]
                trial = random.Random()
                trial.setstate(found[key])
                if trial.getstate() != found[key]:  # it takes any integers, and keeps 32 bits of each
                    raise ValueError("some of its numbers are too large")
            elif key in contents.tensors:
                found[key] = contents.value(key)
                torch.Generator("cuda" if key.endswith(".cuda") else "cpu").set_state(found[key])
        except Exception as error:  # the type depends on what is wrong
            raise ValueError(
                f"{key} of the checkpoint is not the state of a random number generator: {error}"
            ) from error
    return found


def set_generators(states: dict[str, Any]) -> None:
    """Sets this rank's generators to states from `saved_states`."""
    for key, value in states.items():
        if key.endswith(".python"):
            random.setstate(value)
        else:
            (torch.set_rng_state if key.endswith(".cpu") else torch.cuda.set_rng_state)(value)
