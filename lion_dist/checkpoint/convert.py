"""From other optimizers' checkpoints, and to lion-pytorch's.

lion-pytorch needs no conversion: `Lion.load_state_dict` and `ShardedLion.load_state_dict` take its state_dict as it is.
Whatever comes out of the functions here goes into these two, too; hyper-parameters are the saved ones only where the
other optimizer is a Lion. Files are read with ``weights_only=True``. (Checkpoints of torch.distributed.checkpoint's own
storage are pickled: whoever trusts them loads them by torch's own functions, as the README shows.)
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .folders import Key
from .named import Names

StateDict = dict[str, Any]

_LION_KEYS = ("lr", "betas", "weight_decay", "params")


def from_bitsandbytes(state_dict: StateDict) -> StateDict:
    """Of bitsandbytes' Lion with 32-bit state, the state_dict as it is saved.

    Raises:
        ValueError: the state has 8 bits, or is another optimizer's.
    """
    state = {}
    for i, entry in state_dict["state"].items():
        found = {**entry, **entry.get("__bnb_optimizer_quant_state__", {})}
        m = found.get("state1")
        if not isinstance(m, Tensor) or "state2" in found:
            raise ValueError(f"parameter {i} has no state of bitsandbytes' Lion, but {sorted(map(str, found))}")
        if "absmax1" in found or not m.is_floating_point():
            raise ValueError(
                f"the state of parameter {i} has 8 bits; only 32-bit state can be converted (optim_bits=32, Lion32bit)"
            )
        state[i] = {"exp_avg": m}
    return {"state": state, "param_groups": _lion_groups(state_dict)}


def to_lion_pytorch(state_dict: StateDict) -> StateDict:
    """A state_dict that ``lion_pytorch.Lion`` loads, from `Lion.state_dict` or `ShardedLion.full_state_dict`.

    ``decoupled_weight_decay`` is an argument of its constructor, and momenta will take the dtype of the weights.

    Raises:
        ValueError: a group maximizes, which lion-pytorch cannot.
    """
    if any(group.get("maximize") for group in state_dict["param_groups"]):
        raise ValueError("a parameter group has maximize=True, which lion-pytorch has not")
    return {"state": dict(state_dict["state"]), "param_groups": _lion_groups(state_dict)}


def _lion_groups(state_dict: StateDict) -> list[dict[str, Any]]:
    return [{k: v for k, v in group.items() if k in _LION_KEYS} for group in state_dict["param_groups"]]


def from_adamw(state_dict: StateDict, optimizer: Optimizer, *, tell: Callable[[str], None] | None = print) -> StateDict:
    """A start from torch's Adam or AdamW: its ``exp_avg`` becomes the momentum. Not a continuation: hyper-parameters
    stay those of ``optimizer``, of `Lion` or `ShardedLion` over the same parameters in the same groups.

    Args:
        tell: is given the advice on lr and weight decay, a line a group; None: nobody is.

    Raises:
        ValueError: the state is not Adam's.
    """
    state = {}
    for i, entry in state_dict["state"].items():
        if not {"exp_avg", "exp_avg_sq"} <= entry.keys():
            raise ValueError(f"parameter {i} has no state of Adam's, but {sorted(map(str, entry))}")
        state[i] = {"exp_avg": entry["exp_avg"]}
    groups = []
    for i, (theirs, ours) in enumerate(zip(state_dict["param_groups"], optimizer.param_groups, strict=True)):
        groups.append({**{k: v for k, v in ours.items() if k != "param_names"}, "params": theirs["params"]})
        if tell is not None:
            lr, decay = float(theirs["lr"]), float(theirs["weight_decay"])
            tell(
                f"group {i}: AdamW had lr {lr:g} and weight_decay {decay:g}. For Lion take an lr of {lr / 10:.2g} to "
                f"{lr / 3:.2g} (start, peak and end of the schedule alike) and a weight_decay of {3 * decay:.2g} to "
                f"{10 * decay:.2g}; here they are {float(ours['lr']):g} and {ours['weight_decay']:g}"
            )
    return {"state": state, "param_groups": groups}


def from_deepspeed_universal(folder: Key, model: nn.Module, optimizer: Optimizer) -> StateDict:
    """The momenta (``exp_avg``) of a universal checkpoint of DeepSpeed's, by the names of ``model``, in the order of
    ``optimizer``'s parameters. Hyper-parameters stay those of the optimizer.

    Args:
        folder: the one that has a folder named zero in it.

    Raises:
        FileNotFoundError, ValueError: a momentum is missing, or has another number of elements.
    """
    names = Names.read(model)
    zero = Path(folder) / "zero"
    params = [p for group in optimizer.param_groups for p in group["params"]]
    state = {}
    for i, p in enumerate(params):
        if not p.requires_grad:
            continue
        name = names.of[id(p)]
        same = [name, *(alias for alias, of in names.aliases.items() if of == name)]
        file = next((zero / n / "exp_avg.pt" for n in same if (zero / n / "exp_avg.pt").is_file()), None)
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
