"""From DeepSpeed's universal checkpoints."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..folders import Key
from ..names import Names
from .groups import StateDict


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
