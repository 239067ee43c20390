"""To lion-pytorch."""

from __future__ import annotations

from .groups import StateDict, lion_groups


def to_lion_pytorch(state_dict: StateDict) -> StateDict:
    """Converts a state_dict of `Lion`, or of `ShardedLion.full_state_dict`, to one that ``lion_pytorch.Lion`` loads.

    ``decoupled_weight_decay`` is an argument of lion-pytorch's constructor and is not in the result. On the load the
    momenta take the dtype of the weights.

    Args:
        state_dict: The state_dict to convert.

    Returns:
        A state_dict with the same tensors.

    Raises:
        ValueError: A group has maximize=True, which lion-pytorch does not support.
    """
    if any(group.get("maximize") for group in state_dict["param_groups"]):
        raise ValueError("a parameter group has maximize=True, which lion-pytorch does not support")
    return {"state": dict(state_dict["state"]), "param_groups": lion_groups(state_dict)}
