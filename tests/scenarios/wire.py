"""Bytes that travel between ranks, counted where torch dispatches its collectives."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

# By the beginning of an operator's name: what kind of collective it is, and which of its arguments is counted.
KINDS = {
    "allgather": ("gather", 0),
    "reduce_scatter": ("scatter", 1),
    "allreduce": ("reduce", 0),
    "broadcast": ("broadcast", 0),
    "alltoall": ("all to all", 1),
}


class Counter(TorchDispatchMode):
    """Bytes of the tensors that torch's collectives are given, by kind; those of a gather are what it completes.

    Args:
        group: the process group whose collectives are counted; None: all are.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        self.group = group
        self.bytes: dict[str, list[int]] = {kind: [] for kind, _ in KINDS.values()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and (self.group is None or self.group.group_name in _names_of_groups(args)):
            name = func.__name__.lstrip("_")
            kind, position = next(found for start, found in KINDS.items() if name.startswith(start))
            tensors = args[position] if isinstance(args[position], list) else [args[position]]
            self.bytes[kind].append(sum(t.numel() * t.element_size() for t in tensors))
        return func(*args, **(kwargs or {}))


def _names_of_groups(args: Any) -> list[str]:
    boxes = [arg for arg in args if isinstance(arg, torch.ScriptObject) and arg._type().name() == "ProcessGroup"]  # type: ignore[attr-defined]
    return [dist.ProcessGroup.unbox(box).group_name for box in boxes]
