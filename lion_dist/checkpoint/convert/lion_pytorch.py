"""To lion-pytorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...saved_momentum import in_kept_form
from ...sharding.box_tensor import BoxTensor
from ...update.state import EXP_AVG, StateColumn
from .groups import StateDict, lion_groups


def to_lion_pytorch(state_dict: StateDict) -> StateDict:
    """Converts a state_dict of `Lion`, or of `ShardedLion.full_state_dict`, to one that ``lion_pytorch.Lion`` loads.

    Momenta in 8 bits become float32 numbers, exactly. On the load the momenta take the dtype of the weights.
    ``decoupled_weight_decay`` is an argument of lion-pytorch's constructor and is not in the result. Neither are the
    remainders, the lower halves of master weights: `to_safetensors` or a checkpoint of `lion_dist.checkpoint` has the
    whole weights, to be loaded into a float32 model.

    Args:
        state_dict: The state_dict to convert. It is not changed.

    Returns:
        A state_dict with the same momenta and hyper-parameters.

    Raises:
        ValueError: A group has maximize=True, which lion-pytorch does not support; or a momentum in 8 bits has no
            scales that fit it.
        TypeError: A momentum is a part of one, as ``ShardedLion.state_dict`` has it.
    """
    if any(group.get("maximize") for group in state_dict["param_groups"]):
        raise ValueError("a parameter group has maximize=True, which lion-pytorch does not support")
    state = {i: _with_numbers(i, entry) for i, entry in state_dict["state"].items()}
    return {"state": state, "param_groups": lion_groups(state_dict)}


def _with_numbers(i: Any, entry: Any) -> Any:
    """The entry of a parameter with a momentum of numbers, and without a remainder; an entry of other code as it is."""
    m = entry.get(EXP_AVG) if isinstance(entry, dict) else None
    if isinstance(m, BoxTensor):
        raise TypeError(
            f"{EXP_AVG} of parameter {i} is a BoxTensor, one rank's part of it; expected the whole momentum: give "
            "ShardedLion.full_state_dict()"
        )
    if not isinstance(m, Tensor):
        return entry
    return dict(in_kept_form(i, entry, m, (StateColumn(EXP_AVG, torch.float32),), {}))
