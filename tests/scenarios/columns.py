"""A further column of state, for tests that it is stored, moved, checked and saved as the momentum is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lion_dist import param_groups
from lion_dist.update.state import StateColumn

COUNT = "count"


def add_column(monkeypatch: pytest.MonkeyPatch, make: Callable[[Tensor, dict[str, Any]], StateColumn | None]) -> None:
    """Gives the state of every parameter for which ``make`` returns one a further column."""
    monkeypatch.setattr(param_groups, "COLUMNS", [*param_groups.COLUMNS, make])


def add_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives every parameter's state a column of int32, in the shape of the parameter."""
    add_column(monkeypatch, lambda p, group: StateColumn(COUNT, torch.int32))
