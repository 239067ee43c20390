"""Keeps torch.compile out of a class whose methods are collective calls."""

from __future__ import annotations

import types
from typing import TypeVar

from ._torch_compat import disable_dynamo

C = TypeVar("C", bound=type)


def uncompiled(cls: C) -> C:
    """A class decorator: torch.compile runs the public methods of the class as they are, and compiles around them.

    Traced, a method would run with tensors that have no data, up to its first collective, which fails there or sends
    the ranks different ways. With ``fullgraph=True`` torch.compile raises, since a method breaks the graph.
    """
    for name, method in list(vars(cls).items()):
        if isinstance(method, types.FunctionType) and not name.startswith("_"):
            setattr(cls, name, disable_dynamo(method))
    return cls
