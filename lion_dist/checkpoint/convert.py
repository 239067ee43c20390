"""From other optimizers' checkpoints, and to lion-pytorch's.

lion-pytorch needs no conversion: `Lion.load_state_dict` and `ShardedLion.load_state_dict` take its state_dict as it is.
Whatever comes out of the functions here goes into these two, too; hyper-parameters are the saved ones only where the
other optimizer is a Lion. Files are read with ``weights_only=True``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.optim import Optimizer

from .folders import Key
from .foreign import TorchReader
from .incoming import same_keys
from .named import EXP_AVG, MODEL, MOMENTUM, Logical, Names, model_tensors, momenta
from .ranks import Ranks, as_error

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


_ADAMS_OWN = (".step", ".exp_avg_sq", ".max_exp_avg_sq")


def _check_torchs(
    there: dict[str, Any], targets: dict[str, Tensor], keys: Sequence[str], aliases: set[str], cast: bool
) -> None:
    """Raises ValueError unless the checkpoint has these tensors, and no others of this model and optimizer."""
    parts = (keys[0] + ".", *(f"{key}.state." for key in keys[1:]))
    held = {k for k, of in there.items() if k.startswith(parts) and isinstance(of, TensorStorageMetadata)}
    same_keys({k for k in held if not k.endswith(_ADAMS_OWN)} - aliases, targets.keys() - aliases)
    for key, t in targets.items():
        found = there[key]
        if tuple(found.size) != tuple(t.shape):
            raise ValueError(f"{key} has shape {tuple(found.size)} in the checkpoint and {tuple(t.shape)} here")
        if found.properties.dtype != t.dtype and not cast:
            raise ValueError(
                f"{key} is {found.properties.dtype} in the checkpoint and {t.dtype} here: pass cast=True if it is to "
                "be converted"
            )


def load_torch(
    path: Key,
    model: nn.Module,
    optimizer: Optimizer | None = None,
    *,
    keys: tuple[str, str] = ("model", "optim"),
    cast: bool = False,
    process_group: dist.ProcessGroup | None = None,
) -> None:
    """Loads weights and momenta (of Lion, or Adam's ``exp_avg``) from a checkpoint of torch's own storage, saved as
    ``dcp.save({"model": get_model_state_dict(...), "optim": get_optimizer_state_dict(...)})``; a collective call.
    Hyper-parameters stay those of the optimizer. See `foreign.TorchReader` for what is refused.

    All of this rank's part is read into memory of its own first, since such files have no checksums; nothing is changed
    if they cannot be read.

    Args:
        keys: under which model and optimizer were saved.
        cast: convert tensors that were saved in another dtype.

    Raises:
        FileNotFoundError, ValueError, RuntimeError: on every rank, where it does not fit on any.
    """
    ranks = Ranks.of(optimizer, process_group)
    with ranks.agreeing("lion_dist.checkpoint.convert.load_torch()"):
        names, logical = Names.read(model), Logical(model)
        targets = {f"{keys[0]}.{k.removeprefix(MODEL)}": t for k, t, _ in model_tensors(model, names, logical)}
        if optimizer is not None:
            for key, t in momenta(optimizer, names, logical).items():
                targets[f"{keys[1]}.state.{key.removeprefix(MOMENTUM).removesuffix(EXP_AVG)}{EXP_AVG}"] = t
        there = TorchReader(path).read_metadata().state_dict_metadata
        for alias, name in names.aliases.items():  # torch's optimizer state has the first name that it meets
            key, saved_as = (f"{keys[1]}.state.{n}{EXP_AVG}" for n in (name, alias))
            if key in targets and key not in there and saved_as in there:
                targets[saved_as] = targets.pop(key)
        aliases = {f"{keys[0]}.{alias}" for alias in names.aliases}
        _check_torchs(there, targets, keys[:1] if optimizer is None else keys, aliases, cast)
        fresh = {key: torch.empty_like(t) for key, t in targets.items()}
    try:
        dcp_load(
            fresh,
            storage_reader=TorchReader(path),
            planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            process_group=ranks.group,
            no_dist=ranks.group is None,
        )
    except CheckpointException as error:
        raise as_error(error, f"lion_dist.checkpoint.convert.load_torch({str(path)!r})") from None
    with torch.no_grad():
        for key, t in targets.items():
            t.copy_(fresh[key])
