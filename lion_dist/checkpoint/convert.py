"""Converts state_dicts of other optimizers to Lion's, and Lion's to lion-pytorch's.

lion-pytorch's own state_dict needs no conversion: `Lion.load_state_dict` and `ShardedLion.load_state_dict` take it as
it is. They also take whatever the functions here return. Hyper-parameters are those that were saved only where the
other optimizer is a Lion. Files are read with ``weights_only=True``. (Checkpoints in torch.distributed.checkpoint's own
format are pickled: if you trust them, load them with torch's functions, as the documentation shows.)
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .folders import Key
from .names import Names

StateDict: TypeAlias = dict[str, Any]

_LION_KEYS = ("lr", "betas", "weight_decay", "params")


def from_bitsandbytes(state_dict: StateDict) -> StateDict:
    """Converts the state of bitsandbytes' Lion with 32-bit state.

    Args:
        state_dict: The state_dict as bitsandbytes saves it.

    Returns:
        A state_dict with the same momenta and hyper-parameters.

    Raises:
        ValueError: The state has 8 bits, or is another optimizer's.
    """
    state = {}
    for i, entry in state_dict["state"].items():
        values = {**entry, **entry.get("__bnb_optimizer_quant_state__", {})}
        m = values.get("state1")
        if not isinstance(m, Tensor) or "state2" in values:
            raise ValueError(
                f"parameter {i} has no state of bitsandbytes' Lion, but {sorted(map(str, values))}: expected state1 "
                "alone"
            )
        if "absmax1" in values or not m.is_floating_point():
            raise ValueError(
                f"the state of parameter {i} has 8 bits; only 32-bit state can be converted (optim_bits=32, Lion32bit)"
            )
        state[i] = {"exp_avg": m}
    return {"state": state, "param_groups": _lion_groups(state_dict)}


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
    return {"state": dict(state_dict["state"]), "param_groups": _lion_groups(state_dict)}


def _lion_groups(state_dict: StateDict) -> list[dict[str, Any]]:
    return [{k: v for k, v in group.items() if k in _LION_KEYS} for group in state_dict["param_groups"]]


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
            lr, decay = float(adam["lr"]), float(adam["weight_decay"])
            tell(
                f"group {i}: AdamW had lr {lr:g} and weight_decay {decay:g}. For Lion take an lr of {lr / 10:.2g} to "
                f"{lr / 3:.2g} (start, peak and end of the schedule alike) and a weight_decay of {3 * decay:.2g} to "
                f"{10 * decay:.2g}; here they are {float(lion['lr']):g} and {lion['weight_decay']:g}"
            )
    return {"state": state, "param_groups": groups}


def from_deepspeed_universal(folder: Key, model: nn.Module, optimizer: Optimizer) -> StateDict:
    """Reads the momenta (``exp_avg``) of a universal checkpoint of DeepSpeed.

    Momenta are found by the names of the model's parameters. Hyper-parameters stay those of ``optimizer``.

    Args:
        folder: The folder that contains a folder named "zero".
        model: The model, wrapped or not.
        optimizer: `Lion` or `ShardedLion` over parameters of the model.

    Returns:
        A state_dict for ``optimizer``, with a momentum for each parameter that requires a gradient.

    Raises:
        FileNotFoundError: A momentum is missing.
        ValueError: A momentum has another number of elements than its parameter.
    """
    names = Names.read(model)
    zero = Path(folder) / "zero"
    params = [p for group in optimizer.param_groups for p in group["params"]]
    state = {}
    for i, p in enumerate(params):
        if not p.requires_grad:
            continue
        name = names.of(p)
        all_names = [name, *(alias for alias, first in names.aliases.items() if first == name)]
        file = next((zero / n / "exp_avg.pt" for n in all_names if (zero / n / "exp_avg.pt").is_file()), None)
        if file is None:
            raise FileNotFoundError(f"there is no exp_avg.pt of {name} in {zero}")
        saved = torch.load(file, weights_only=True, map_location="cpu")
        m = saved.get("param") if isinstance(saved, dict) else saved
        if not isinstance(m, Tensor) or m.numel() != p.numel():
            raise ValueError(f"{file} holds {tuple(getattr(m, 'shape', ()))}; expected shape {tuple(p.shape)}")
        state[i] = {"exp_avg": m.reshape(p.shape)}
    groups, number = [], 0
    for group in optimizer.param_groups:
        count = len(group["params"])
        values = {k: v for k, v in group.items() if k != "param_names"}
        groups.append({**values, "params": list(range(number, number + count))})
        number += count
    return {"state": state, "param_groups": groups}
