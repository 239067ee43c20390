"""From torch's Adam and AdamW."""

from __future__ import annotations

from collections.abc import Callable

from torch.optim import Optimizer

from ...adamw import FACTORS
from ...adamw import from_adamw as advise
from .groups import StateDict


def from_adamw(state_dict: StateDict, optimizer: Optimizer, *, tell: Callable[[str], None] | None = print) -> StateDict:
    """Converts the first moment of torch's Adam or AdamW (``exp_avg``) to a momentum to start from.

    The training that follows is not a continuation of the one with Adam: hyper-parameters stay those of ``optimizer``.

    Args:
        state_dict: Adam's state_dict.
        optimizer: `Lion` or `ShardedLion` over the same parameters in the same groups.
        tell: Is called with advice on lr and weight decay, one line for each group. None: no advice.

    Returns:
        A state_dict for ``optimizer``.

    Raises:
        ValueError: The state is not Adam's.
    """
    state = {}
    for i, entry in state_dict["state"].items():
        if not {"exp_avg", "exp_avg_sq"} <= entry.keys():
            raise ValueError(
                f"parameter {i} has no state of Adam's, but {sorted(map(str, entry))}: expected exp_avg and exp_avg_sq"
            )
        state[i] = {"exp_avg": entry["exp_avg"]}
    groups = []
    for i, (adam, lion) in enumerate(zip(state_dict["param_groups"], optimizer.param_groups, strict=True)):
        groups.append({**{k: v for k, v in lion.items() if k != "param_names"}, "params": adam["params"]})
        if tell is not None:
            given = {key: float(adam[key]) for key in ("lr", "weight_decay")}
            large, small = (advise(**given, factor=factor) for factor in FACTORS)
            tell(
                f"group {i}: AdamW had lr {given['lr']:g} and weight_decay {given['weight_decay']:g}. For Lion take an "
                f"lr of {small['lr']:.2g} to {large['lr']:.2g} (start, peak and end of the schedule alike) and a "
                f"weight_decay of {large['weight_decay']:.2g} to {small['weight_decay']:.2g}; here they are "
                f"{float(lion['lr']):g} and {lion['weight_decay']:g}"
            )
    return {"state": state, "param_groups": groups}
