"""What a parameter group and a state_dict mean to Lion; shared by both optimizers.

A group holds, beside ``params``: lr (number or one-element tensor), betas, weight_decay,
decoupled_weight_decay, init_lr (the lr the group was made with), momentum_dtype, maximize.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .fsdp import local, misfit
from .memory_order import may_overlap
from .update.reference import STORAGE_DTYPES, HyperParameters

Group = dict[str, Any]

KEYS = ("lr", "betas", "weight_decay", "decoupled_weight_decay", "init_lr", "momentum_dtype", "maximize")


def make_defaults(
    lr: float | Tensor,
    betas: tuple[float, float],
    weight_decay: float,
    decoupled_weight_decay: bool,
    momentum_dtype: torch.dtype | None,
    maximize: bool,
) -> Group:
    """The defaults of an optimizer, validated as a group would be."""
    defaults = {
        "lr": lr,
        "betas": betas,
        "weight_decay": weight_decay,
        "decoupled_weight_decay": decoupled_weight_decay,
        "momentum_dtype": momentum_dtype,
        "maximize": maximize,
    }
    check_group({**defaults, "init_lr": _number(lr)})
    return defaults


def _is_number(x: Any) -> bool:
    return isinstance(x, Real)  # NumPy's scalars among them


def _number(lr: float | Tensor) -> float:
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr must be a number or a tensor of one element, got shape {tuple(lr.shape)}")
    if not (_is_number(lr) or isinstance(lr, Tensor)):
        raise TypeError(f"lr must be a number or a tensor of one element, got {lr!r}")
    return float(lr)


def check_group(group: Group) -> None:
    """Raises where a group's hyper-parameters are not ones that Lion can use. Reads lr's value, so an
    lr tensor on a GPU is waited for: for construction, not for steps."""
    lr = _number(group["lr"])
    if not (math.isfinite(lr) and lr >= 0):
        raise ValueError(f"lr must be finite and >= 0, got {lr}")
    _check_rest(group)
    if group["decoupled_weight_decay"] and not group["init_lr"] > 0:
        raise ValueError(
            "decoupled_weight_decay=True divides weight_decay by the group's initial lr, which must be > 0, "
            f"got {group['init_lr']}: start from the peak lr and warm up with a scheduler"
        )
    dtype = group["momentum_dtype"]
    if dtype is not None and dtype not in STORAGE_DTYPES:
        raise TypeError(f"momentum_dtype must be None, float32, bfloat16 or float16, got {dtype}")


def _check_rest(group: Group) -> None:
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or not all(_is_number(beta) for beta in betas):
        raise TypeError(f"betas must be two numbers in [0, 1), got {betas!r}")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas}")
    weight_decay = group["weight_decay"]
    if not _is_number(weight_decay):
        raise TypeError(f"weight_decay must be a number, got {weight_decay!r}")
    if not (math.isfinite(weight_decay) and weight_decay >= 0):
        raise ValueError(f"weight_decay must be finite and >= 0, got {weight_decay}")


def check_params(params: Sequence[Tensor], already: Iterable[Tensor]) -> None:
    """Raises TypeError for a parameter that Lion cannot hold, ValueError for one given twice or one
    that overlaps itself."""
    seen = {id(p) for p in already}
    for i, p in enumerate(params):
        who = f"parameter {i} of the group (shape {tuple(p.shape)})"
        part = local(p)
        if is_traceable_wrapper_subclass(part) or p.is_meta:
            raise TypeError(
                f"{who} is a {'meta tensor' if p.is_meta else type(part).__name__}, which has no memory of its own to "
                "step: materialise the model before making the optimizer"
            )
        if p.is_complex():
            raise TypeError(f"{who} is complex; give Lion torch.view_as_real of it")
        if p.layout != torch.strided or p.dtype not in STORAGE_DTYPES:
            raise TypeError(f"{who} is {p.layout} {p.dtype}; expected strided float32, bfloat16 or float16")
        if id(p) in seen:
            raise ValueError(f"{who} was given twice; pass each parameter once (model.parameters() does)")
        seen.add(id(p))
        if may_overlap(part):
            raise ValueError(
                f"{who} has strides {part.stride()}, in which elements share memory (an expanded tensor?); "
                "use .clone() to give each element its own"
            )


def complete_group(group: Group, defaults: Group) -> None:
    """Fills in, in place, what a group from a user, an older version or another Lion does not say."""
    for key in KEYS:
        if key in defaults:
            group.setdefault(key, defaults[key])
    group.setdefault("init_lr", _number(group["lr"]))


def complete_loaded_groups(groups: Sequence[Group], previous: Sequence[Group], defaults: Group) -> None:
    """Fills in what a state_dict does not say: it stays as this optimizer had it, else the default."""
    for i, group in enumerate(groups):
        complete_group(group, previous[i] if i < len(previous) else defaults)
        complete_group(group, defaults)


def momentum_dtype(p: Tensor, group: Group) -> torch.dtype:
    """The dtype of a new momentum for p: what the group says, else p's own; float32 for float16
    weights, whose momentum would lose every |g| below 6e-8 / (1 - beta2)."""
    explicit: torch.dtype | None = group["momentum_dtype"]
    if explicit is not None:
        return explicit
    return torch.float32 if p.dtype == torch.float16 else p.dtype


def hyper_parameters(group: Group) -> HyperParameters:
    """This step's hyper-parameters of a group; raises where they cannot be used. An lr tensor stays one,
    and if it is on a GPU its value is not looked at, since that would wait for the GPU."""
    lr = group["lr"]
    waits = isinstance(lr, Tensor) and lr.device.type != "cpu"
    if not waits and not 0 <= _number(lr) < math.inf:
        raise ValueError(f"lr must be finite and >= 0, got {lr} (did a scheduler pass its end?)")
    _check_rest(group)
    weight_decay = float(group["weight_decay"])
    if group["decoupled_weight_decay"]:
        weight_decay /= group["init_lr"]
    beta1, beta2 = group["betas"]
    return HyperParameters(lr, weight_decay, float(beta1), float(beta2), bool(group["maximize"]))


class DecayWarning:
    """Warns once where weight decay, lr * weight_decay of a weight a step, rounds away to nothing."""

    def __init__(self) -> None:
        self._done = False
        self._seen: dict[int, tuple[float, float]] = {}

    def check(self, index: int, group: Group, hyper: HyperParameters) -> None:
        if self._done or hyper.weight_decay == 0 or isinstance(hyper.lr, Tensor):
            return
        # During warm-up any decay is negligible; what counts is the lr the schedule works towards.
        lr = max(hyper.lr, float(group.get("initial_lr", 0.0)))
        if lr == 0 or self._seen.get(index) == (lr, hyper.weight_decay):
            return
        self._seen[index] = (lr, hyper.weight_decay)
        decay = lr * hyper.weight_decay
        for dtype in {p.dtype for p in group["params"]}:
            # Half the distance from a weight to its neighbour is at least eps/4 of the weight.
            if decay <= torch.finfo(dtype).eps / 4:
                self._done = True
                warnings.warn(
                    f"lion_dist: lr * weight_decay = {decay:.3g} is below half a unit in the last place of {dtype} "
                    f"weights, so weight decay rounds to nothing. Use float32 weights (autocast keeps compute in "
                    "16 bits), or a larger weight_decay (Lion wants 3 to 10 times AdamW's).",
                    stacklevel=5,
                )
                return


class KeptAsIs:
    """Carries a tensor through torch's load_state_dict, which would cast it to the parameter's dtype."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def check_and_wrap_state(state_dict: dict[str, Any], groups: Sequence[Group]) -> dict[str, Any]:
    """A shallow copy of a state_dict with every momentum in `KeptAsIs`, once the whole of it is known
    to fit the optimizer's groups.

    Raises:
        ValueError: naming the first thing that does not fit. Nothing has been changed then.
    """
    if not isinstance(state_dict, dict) or not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError('expected an optimizer state_dict with keys "state" and "param_groups"')
    saved_groups = state_dict["param_groups"]
    if not isinstance(state_dict["state"], dict) or not all(
        isinstance(g, dict) and {"params", "lr"} <= g.keys() and isinstance(g["params"], (list, tuple))
        for g in (saved_groups if isinstance(saved_groups, (list, tuple)) else [None])
    ):
        raise ValueError('expected "state" to be a dict and "param_groups" a list of dicts with "params" and "lr"')
    saved_sizes, sizes = [len(g["params"]) for g in saved_groups], [len(g["params"]) for g in groups]
    if saved_sizes != sizes:
        raise ValueError(f"the state_dict has parameter groups of sizes {saved_sizes}; this optimizer has {sizes}")
    for saved, group in zip(saved_groups, groups, strict=True):
        check_group({**group, **saved})
    params = [p for g in groups for p in g["params"]]
    ids = [i for g in saved_groups for i in g["params"]]
    param_of = dict(zip(ids, params, strict=True))
    state: dict[Any, dict[str, Any]] = {}
    for i, entry in state_dict["state"].items():
        if i not in param_of:
            raise ValueError(f"the state_dict has state for parameter {i!r}, which is in none of its groups")
        if not entry:
            state[i] = {}
            continue
        if not isinstance(entry, dict):
            raise ValueError(f"state of parameter {i!r} is a {type(entry).__name__}; expected a dict with 'exp_avg'")
        if set(entry) != {"exp_avg"}:
            raise ValueError(
                f"state of parameter {i!r} has entries {sorted(map(str, entry))}; Lion's has 'exp_avg' alone. "
                "Is this another optimizer's state_dict?"
            )
        m, p = entry["exp_avg"], param_of[i]
        if isinstance(m, Tensor) and (reason := misfit(m, p)):
            raise ValueError(f"exp_avg of parameter {i!r} {reason}")
        if not isinstance(m, Tensor) or m.shape != p.shape or m.dtype not in STORAGE_DTYPES:
            got = f"{tuple(m.shape)} {m.dtype}" if isinstance(m, Tensor) else type(m).__name__
            raise ValueError(
                f"exp_avg of parameter {i!r} is {got}; expected shape {tuple(p.shape)} in float32, bfloat16 or "
                "float16. Is this the state_dict of another model?"
            )
        state[i] = {"exp_avg": KeptAsIs(m)}
    return {**state_dict, "state": state}


def describe_groups(groups: Sequence[Group], first: int = 0) -> list[str]:
    """What must be equal on all ranks, one line a group from number ``first`` and one a parameter."""
    lines = []
    for i, group in enumerate(groups[first:], first):
        values = {key: float(v) if isinstance(v := group[key], Tensor) else v for key in KEYS}
        lines.append(f"group {i}: " + ", ".join(f"{key}={value}" for key, value in values.items()))
        names = group.get("param_names", [""] * len(group["params"]))
        for j, (p, name) in enumerate(zip(group["params"], names, strict=True)):
            lines.append(
                f"parameter {j} of group {i} {name}: shape {tuple(p.shape)}, strides {p.stride()}, {p.dtype}, "
                + f"{p.device.type}, "
                + ("trainable" if p.requires_grad else "frozen")
            )
    return lines
