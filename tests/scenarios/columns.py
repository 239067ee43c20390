"""A further column of state, for tests that it is stored, moved, checked and saved as the momentum is."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from lion_dist import param_groups
from lion_dist.update.state import StateColumn

COUNT = "count"


def add_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives every parameter's state a column of int32, in the shape of the parameter."""
    columns = param_groups.state_columns

    def with_count(p: Tensor, group: dict[str, Any]) -> tuple[StateColumn, ...]:
        return *columns(p, group), StateColumn(COUNT, torch.int32)

    for name, module in list(sys.modules.items()):
        if name.startswith("lion_dist.") and hasattr(module, "state_columns"):
            monkeypatch.setattr(module, "state_columns", with_count)
