"""From llm-foundry's DecoupledLionW."""

from __future__ import annotations

from .groups import StateDict, decoupled, lion_groups


def from_decoupled_lionw(state_dict: StateDict) -> StateDict:
    """Converts the state of llm-foundry's ``DecoupledLionW``.

    Its weights decay by ``lr / initial_lr * weight_decay`` in each step. So the groups of the result have
    ``decoupled_weight_decay=True`` and its ``initial_lr`` as ``init_lr``, and the same ``weight_decay``.

    Args:
        state_dict: The state_dict as ``DecoupledLionW`` saves it.

    Returns:
        A state_dict with the same momenta (the same tensors), in which the same lr gives the same decay.

    Raises:
        ValueError: A group has no ``initial_lr`` > 0, or the state is another optimizer's (``DecoupledLionW_8bit``).
    """
    for i, entry in state_dict["state"].items():
        if entry.keys() != {"exp_avg"}:
            raise ValueError(
                f"parameter {i} has no state of DecoupledLionW, but {sorted(map(str, entry))}: expected exp_avg alone"
            )
    groups = []
    for number, (theirs, ours) in enumerate(zip(state_dict["param_groups"], lion_groups(state_dict), strict=True)):
        names = {"param_names": theirs["param_names"]} if "param_names" in theirs else {}
        groups.append({**ours, **decoupled(theirs, number), **names})
    return {"state": dict(state_dict["state"]), "param_groups": groups}
