"""States of learning-rate schedulers, which keep lists with one value for each parameter group (base_lrs and others).

Groups may come in another order or number in another process, so such lists are taken apart on a save, put together
over the ranks (see union.py), and put into the order of the live groups on a load.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from .._torch_compat import LAST_LR
from .keys import SCHEDULER

Path = tuple[Any, ...]  # the keys and indices that lead to a value within a state
GroupLists = dict[Path, list[Any]]  # lists with one value for each parameter group, by path
# Lists that torch's schedulers keep with one value for each parameter group.
_GROUP_LISTS = frozenset({
    "base_lrs", LAST_LR, "lr_lambdas", "min_lrs", "max_lrs", "base_momentums", "max_momentums",
})  # fmt: skip


def group_lists(state: Any, count: int, path: Path = ()) -> Iterator[tuple[Path, list[Any]]]:
    """Finds the lists in a scheduler's state that have one value for each parameter group.

    Args:
        state: the scheduler's state, or a value within it.
        count: number of parameter groups.
        path: where ``state`` is in the whole state.

    Yields:
        A path and the list there.
    """
    if type(state) is dict:
        for key, value in state.items():
            if key in _GROUP_LISTS and isinstance(value, list) and len(value) == count:
                yield (*path, key), value
            else:
                yield from group_lists(value, count, (*path, key))
    elif isinstance(state, (list, tuple)) and any(type(value) is dict for value in state):
        for i, value in enumerate(state):
            yield from group_lists(value, count, (*path, i))


def replace_lists(state: Any, lists: Mapping[Path, list[Any]], path: Path = ()) -> Any:
    """A copy of a scheduler's state with other lists at these paths.

    Args:
        state: the scheduler's state, or a value within it.
        lists: the new lists, by path.
        path: where ``state`` is in the whole state.
    """
    if path in lists:
        return lists[path]
    if not any(place[: len(path)] == path for place in lists):
        return state
    if type(state) is dict:
        return {key: replace_lists(value, lists, (*path, key)) for key, value in state.items()}
    return type(state)(replace_lists(value, lists, (*path, i)) for i, value in enumerate(state))


def match_schedulers(
    objects: Mapping[str, Any], schedulers: Sequence[Any], saved_count: int, matches: Collection[int | None]
) -> list[tuple[Any, dict[str, Any]]]:
    """Finds the saved state for each scheduler, with lists in the order of the live groups.

    Args:
        objects: values of the checkpoint, by key.
        schedulers: the schedulers to load into.
        saved_count: number of parameter groups in the checkpoint.
        matches: the saved group for each live one; see `groups.match_groups`.

    Returns:
        Each scheduler with the state that it is to load.

    Raises:
        ValueError: the checkpoint has another number of schedulers, or states of other schedulers.
    """
    keys = sorted((key for key in objects if key.startswith(SCHEDULER)), key=lambda key: (len(key), key))
    if keys != [f"{SCHEDULER}{i}" for i in range(len(keys))]:
        raise ValueError(f"the checkpoint has schedulers {keys[:5]}; expected them to be numbered from 0")
    if len(keys) != len(schedulers):
        raise ValueError(f"the checkpoint has {len(keys)} schedulers, and {len(schedulers)} were given to load into")
    found = []
    for i, (key, scheduler) in enumerate(zip(keys, schedulers, strict=True)):
        saved, live = objects[key], scheduler.state_dict()
        lists = {}
        for path, here in group_lists(live, len(matches)):
            there = _at(saved, path)
            if isinstance(there, list) and len(there) == saved_count:
                lists[path] = [here[k] if j is None else there[j] for k, j in enumerate(matches)]
        saved = replace_lists(saved, lists)
        if type(saved) is not dict or not _same_form(saved, live):
            raise ValueError(
                f"scheduler {i} of the checkpoint is not the state of a {type(scheduler).__name__} of these parts"
            )
        found.append((scheduler, saved))
    return found


def _at(state: Any, path: Sequence[Any]) -> Any:
    """The value at a path within a scheduler's state; None if there is none."""
    for step in path:
        if type(state) is dict:
            state = state.get(step)
        elif isinstance(state, (list, tuple)) and type(step) is int and step < len(state):
            state = state[step]
        else:
            return None
    return state


def _same_form(saved: Any, live: Any) -> bool:
    """Whether a scheduler with the state ``live`` may load ``saved``: the keys are the same, and so is the number of
    schedulers or functions within."""
    if type(live) is dict and type(saved) is dict:
        return saved.keys() == live.keys() and all(_same_form(saved[key], live[key]) for key in live)
    if isinstance(live, (list, tuple)) and any(value is None or isinstance(value, dict) for value in live):
        return isinstance(saved, (list, tuple)) and len(saved) == len(live) and all(map(_same_form, saved, live))
    return True
