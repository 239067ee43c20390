"""Numbers of the step that must not get worse: `python -m benchmarks.step --check` holds them against limits.json.

Limits are ratios and counts, since absolute times differ threefold between hosts: ours beside a peer's in the same run,
the number of kernels, the fraction of the floor. Each entry of limits.json has a name, "at_most" or "at_least", and
the number that was measured when the limit was set. A commit that makes a number worse on purpose changes the limit,
and its message gives the reason.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

PATH = Path(__file__).with_name("limits.json")


class Limit(NamedTuple):
    """
    Attributes:
        name: what is measured, such as "fp32, gradients kept: kernels".
        bound: the largest or the smallest value that is allowed.
        at_most: whether the bound is the largest.
        measured: the value when the limit was set.
    """

    name: str
    bound: float
    at_most: bool
    measured: float

    def allows(self, value: float) -> bool:
        return value <= self.bound if self.at_most else value >= self.bound

    def __str__(self) -> str:
        return f"{'at most' if self.at_most else 'at least'} {self.bound:g}"


def read(path: Path = PATH) -> list[Limit]:
    """The limits of a file.

    Raises:
        ValueError: an entry is not a limit, or two have one name.
    """
    limits = []
    for entry in json.loads(path.read_text()):
        bounds = [key for key in ("at_most", "at_least") if key in entry]
        if set(entry) != {"name", "measured", *bounds} or len(bounds) != 1:
            raise ValueError(f"{path}: {entry}: expected name, measured, and one of at_most and at_least")
        limit = Limit(entry["name"], entry[bounds[0]], bounds[0] == "at_most", entry["measured"])
        if not limit.allows(limit.measured):
            raise ValueError(f"{path}: {limit.name}: measured {limit.measured:g} when the limit was set, {limit}")
        limits.append(limit)
    names = [limit.name for limit in limits]
    if len(set(names)) != len(names):
        raise ValueError(f"{path}: two limits have the same name: {sorted({n for n in names if names.count(n) > 1})}")
    return limits


def compare(found: Mapping[str, float], limits: Sequence[Limit]) -> tuple[list[str], list[str]]:
    """Compares measured values with their limits.

    Args:
        found: measured values by name.
        limits: those that this run could measure.

    Returns:
        A line for each limit; and the lines of those that are broken. A limit that was not measured is broken, and so
        is a value that has no limit.
    """
    lines, broken = [], []
    for limit in limits:
        value = found.get(limit.name)
        if value is None:
            line, holds = f"{limit.name}: not measured; expected {limit}", False
        else:
            holds = limit.allows(value)
            line = f"{limit.name}: {value:.3g}, limit {limit} (it was {limit.measured:g} when the limit was set)"
        lines.append(f"{'ok  ' if holds else 'WORSE'} {line}")
        if not holds:
            broken.append(line)
    for name in sorted(set(found) - {limit.name for limit in limits}):
        broken.append(f"{name}: {found[name]:.3g}, but {PATH.name} has no limit for it: add one")
        lines.append(f"WORSE {broken[-1]}")
    return lines, broken
