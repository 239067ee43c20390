"""Hyper-parameters read from the groups in each step, converted again only where one was set."""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import Any

import torch

from .param_groups import KEYS, Group, hyper_parameters
from .update.reference import HyperParameters

_CONSTANT = (float, int, bool, str, type(None), torch.dtype)

Values = tuple[Any, ...]


class HyperReader:
    """Reads groups, and remembers the objects that it read.

    A group whose values are the same objects as in the last step, of types that never change, is not converted again.
    Equal objects would not do: 1 equals True, and a hyper-parameter may be only one of them. A tensor may be filled in
    place, so its group is converted in every step.
    """

    def __init__(self) -> None:
        self._seen: list[Values | None] = []  # of each group; None if one of its values can change
        self._hypers: list[HyperParameters] = []

    def read(self, groups: Sequence[Group]) -> list[HyperParameters]:
        """The hyper-parameters of each group: the same list as in the last call if nothing has changed.

        Raises:
            TypeError, ValueError: see `hyper_parameters`.
        """
        values = [tuple(map(group.get, KEYS)) for group in groups]
        if len(values) == len(self._seen) and all(map(_unchanged, values, self._seen)):
            return self._hypers
        if len(values) != len(self._seen):
            self._seen = [None] * len(values)
        hypers = [
            self._hypers[i] if _unchanged(own, self._seen[i]) else hyper_parameters(group)
            for i, (own, group) in enumerate(zip(values, groups, strict=True))
        ]
        self._seen = [own if all(map(_is_constant, own)) else None for own in values]
        self._hypers = hypers
        return hypers


def _unchanged(values: Values, seen: Values | None) -> bool:
    return seen is not None and all(map(is_, values, seen))


def _is_constant(value: Any) -> bool:
    return type(value) in _CONSTANT or (type(value) is tuple and all(type(v) in _CONSTANT for v in value))
