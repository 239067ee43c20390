"""Parameter groups of a state_dict that is converted."""

from __future__ import annotations

from typing import Any, TypeAlias

StateDict: TypeAlias = dict[str, Any]

_LION_KEYS = ("lr", "betas", "weight_decay", "params")


def lion_groups(state_dict: StateDict) -> list[dict[str, Any]]:
    """The groups of a state_dict of any Lion, with the hyper-parameters that all Lions have."""
    return [{k: v for k, v in group.items() if k in _LION_KEYS} for group in state_dict["param_groups"]]


def decoupled(group: dict[str, Any], number: int) -> dict[str, Any]:
    """The keys of a Lion group whose weights decay by lr / initial_lr * weight_decay in each step.

    Args:
        group: A group of the other optimizer.
        number: Its number, for messages.

    Raises:
        ValueError: ``initial_lr`` is missing or not positive.
    """
    initial = group.get("initial_lr")
    if initial is None or not float(initial) > 0:
        raise ValueError(
            f"parameter group {number} has initial_lr {initial}; expected a number > 0, since its weight decay is "
            "lr / initial_lr * weight_decay: set initial_lr to the lr that the optimizer was made with"
        )
    return {"decoupled_weight_decay": True, "init_lr": float(initial)}
