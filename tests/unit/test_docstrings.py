"""Every public name has a docstring, of its own or inherited. (ruff looks at modules, classes and functions.)"""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import Any

import pytest

import lion_dist
import lion_dist.checkpoint
import lion_dist.deepspeed


def public_names(module: ModuleType) -> dict[str, Any]:
    """The public names of a module, and the methods and properties that its classes define."""
    own = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
    names = getattr(module, "__all__", own)
    found = {name: getattr(module, name) for name in names if not name.startswith("_")}
    for name, value in list(found.items()):
        if inspect.isclass(value):
            found |= {f"{name}.{key}": getattr(value, key) for key in vars(value) if not key.startswith("_")}
    return {name: value for name, value in found.items() if callable(value) or isinstance(value, property)}


@pytest.mark.parametrize("module", [lion_dist, lion_dist.checkpoint, lion_dist.checkpoint.convert, lion_dist.deepspeed])
def test_public_names_have_docstrings(module: ModuleType) -> None:
    found = public_names(module)
    assert found
    assert not [name for name, value in found.items() if not inspect.getdoc(value)]
