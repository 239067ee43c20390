"""Parameter groups: their hyper-parameters, parameters and state columns; shared by both optimizers.

Beside ``params``, a group stores lr (float or tensor of one element), betas (two floats), weight_decay (float),
decoupled_weight_decay (bool), init_lr (float: the lr that the constructor was given), momentum_dtype (torch.dtype or
None), master_weights (bool), maximize (bool) and rounding_step (int: the number of steps in which 8-bit momenta of the
group have been rounded, on which the next rounding depends). Users may also give other kinds of numbers, and dtypes by
name. Any other key belongs to other code and is kept.
"""

from __future__ import annotations

import difflib
import math
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from ._torch_compat import is_traceable_wrapper_subclass
from .dtensors import local
from .frozen import is_plain, takes_part
from .hyper_values import to_betas, to_count, to_dtype, to_flag, to_float, to_lr, to_weight_decay
from .memory_order import may_overlap
from .update.codecs import BLOCK, seed_of
from .update.reference import STORAGE_DTYPES, HyperParameters
from .update.state import EXP_AVG, EXP_AVG_SCALE, REMAINDER, StateColumn

Group = dict[str, Any]

KEYS = (
    "lr", "betas", "weight_decay", "decoupled_weight_decay", "init_lr", "momentum_dtype", "master_weights", "maximize",
    "rounding_step",
)  # fmt: skip

# Keys that other code writes into groups, or that groups made for AdamW hold. They have no effect on Lion, but are no
# typing errors.
KNOWN_KEYS = frozenset({
    *KEYS, "params", "param_names", "name",
    "initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr", "lr_scale",  # schedulers
    "foreach", "fused", "capturable", "differentiable", "eps", "amsgrad", "bias_correction",  # AdamW
    "step", "moe",  # DeepSpeed
})  # fmt: skip


# Keys that groups pickled by a version without them lack, and their values there.
_ADDED: Group = {"master_weights": False, "rounding_step": 0}


def _values(group: Group) -> Group:
    """A group's hyper-parameters as they are stored. Raises TypeError or ValueError where Lion cannot use one."""
    lr, weight_decay = to_lr(group["lr"]), to_weight_decay(group["weight_decay"])
    betas = to_betas(group["betas"])
    decoupled = to_flag(group["decoupled_weight_decay"], "decoupled_weight_decay")
    init_lr = to_float(group["init_lr"], "init_lr")
    if not (math.isfinite(init_lr) and init_lr >= 0):
        raise ValueError(f"init_lr must be finite and >= 0, got {init_lr}")
    if decoupled:
        _divided(weight_decay, init_lr)
    return {
        "lr": lr,
        "betas": betas,
        "weight_decay": weight_decay,
        "decoupled_weight_decay": decoupled,
        "init_lr": init_lr,
        "momentum_dtype": to_dtype(group["momentum_dtype"]),
        "master_weights": to_flag(group["master_weights"], "master_weights"),
        "maximize": to_flag(group["maximize"], "maximize"),
        "rounding_step": to_count(group["rounding_step"], "rounding_step"),
    }


def _divided(weight_decay: float, init_lr: float) -> float:
    """The factor of lr that stands for a decoupled weight decay."""
    if not init_lr > 0:
        raise ValueError(
            "decoupled_weight_decay=True divides weight_decay by the lr that the constructor was given, which must be "
            f"> 0, got {init_lr}: construct the optimizer with the peak lr and warm up with a scheduler"
        )
    divided = weight_decay / init_lr
    if math.isinf(divided):
        raise ValueError(f"decoupled_weight_decay=True: weight_decay {weight_decay} / lr {init_lr} is too large")
    return divided


def make_defaults(
    lr: Any,
    betas: Any,
    weight_decay: Any,
    decoupled_weight_decay: bool,
    momentum_dtype: torch.dtype | str | None,
    master_weights: bool,
    maximize: bool,
) -> Group:
    """The defaults of an optimizer, checked as a group is. The host waits for an lr tensor on a GPU."""
    given = {
        "lr": lr,
        "betas": betas,
        "weight_decay": weight_decay,
        "decoupled_weight_decay": decoupled_weight_decay,
        "init_lr": to_float(lr, "lr"),  # its value now: schedulers fill an lr tensor in place
        "momentum_dtype": momentum_dtype,
        "master_weights": master_weights,
        "maximize": maximize,
        "rounding_step": 0,
    }
    return _values(given)


def check_group(group: Group) -> None:
    """Raises TypeError or ValueError where Lion cannot use a hyper-parameter of a group.

    The host waits for an lr tensor on a GPU. Call it on construction and loads, not in steps.
    """
    _values(group)


def complete_group(group: Group, *others: Group) -> None:
    """Adds the hyper-parameters that a group lacks, in place: each from the first of the other groups that has it."""
    for key in KEYS:
        for other in others:
            if key not in group and key in other:
                group[key] = other[key]
    if "init_lr" not in group:  # pickled by a version without it
        group["init_lr"] = to_float(others[-1].get("lr", group["lr"]), "lr")
    for key, value in _ADDED.items():
        group.setdefault(key, value)


def normalize_group(group: Group) -> None:
    """Converts the hyper-parameters of a complete group to the form in which they are stored, in place.

    Raises:
        ValueError, TypeError: Lion cannot use one, which the message names. Nothing has been changed.
    """
    group.update(_values(group))


def complete_loaded_groups(groups: Sequence[Group], previous: Sequence[Group], defaults: Group) -> None:
    """Adds the hyper-parameters that loaded groups lack, in place: those that this optimizer had, else the defaults."""
    for i, group in enumerate(groups):
        complete_group(group, *previous[i : i + 1], defaults)


def kept_form(group: Group) -> tuple[bool, bool]:
    """Whether the momenta of a group are kept in 8 bits, and whether it has master weights. Raises TypeError where a
    value means neither."""
    return to_dtype(group["momentum_dtype"]) == torch.int8, to_flag(group["master_weights"], "master_weights")


def has_kept_form(p: Tensor, own: Mapping[str, Any], group: Group) -> bool:
    """Whether a parameter's momentum, if any, is kept in 8 bits exactly if its group says so; see `check_kept_form`."""
    m = own.get(EXP_AVG)
    return not isinstance(m, Tensor) or (m.dtype == torch.int8) == (momentum_dtype(p, group) == torch.int8)


def check_kept_form(p: Tensor, own: Mapping[str, Any], group: Group) -> None:
    """Raises ValueError where a parameter's momentum is kept in 8 bits and its group says otherwise, or the reverse.

    Args:
        p: the parameter.
        own: its present state.
        group: its group.
    """
    if not has_kept_form(p, own, group):
        raise ValueError(
            f"momentum_dtype of a parameter group was changed to {group['momentum_dtype']}, but the momentum of a "
            f"parameter of shape {tuple(p.shape)} is {own[EXP_AVG].dtype}: set it back; to change it, load the "
            "state_dict() taken then into a new optimizer made with the other momentum_dtype, which converts momenta"
        )


def keep_storage(loaded: Group, live: Group) -> None:
    """Gives a loaded group the live group's decisions on how state is stored, in place.

    These are ``master_weights`` and, where exactly one of the two groups has an 8-bit momentum, ``momentum_dtype``. A
    loaded group without a ``rounding_step`` takes the live one.

    Args:
        loaded: a group of a state_dict or a checkpoint.
        live: the optimizer's group.

    Raises:
        TypeError: a momentum cannot have the loaded ``momentum_dtype``, or ``master_weights`` is no bool.
    """
    dtypes = [to_dtype(group.get("momentum_dtype", live["momentum_dtype"])) for group in (loaded, live)]
    if dtypes.count(torch.int8) == 1:
        loaded["momentum_dtype"] = live["momentum_dtype"]
    to_flag(loaded.get("master_weights", False), "master_weights")
    loaded["master_weights"] = live["master_weights"]
    loaded.setdefault("rounding_step", live["rounding_step"])


def warn_of_unknown_keys(group: Group, others: Iterable[Group]) -> None:
    """Warns of keys that neither Lion nor known other code reads, such as a typing error.

    Args:
        group: the group.
        others: other groups; keys that one of these has too are not warned of.
    """
    seen = {key for other in others for key in other}
    for key in group:
        if key in KNOWN_KEYS or key in seen or str(key).startswith("_"):
            continue
        close = difflib.get_close_matches(str(key).lower(), KEYS, n=1, cutoff=0.75)
        hint = f'Did you mean "{close[0]}"?' if close else f"Lion reads {', '.join(k for k in KEYS if k != 'init_lr')}."
        warn(f'a parameter group has a key "{key}", which Lion does not know: it is kept, without effect. {hint}')


def warn(message: str) -> None:
    """Warns at the innermost line outside of lion_dist and torch."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("lion_dist", "torch"):
        level, frame = level + 1, frame.f_back
    warnings.warn(f"lion_dist: {message}", stacklevel=level)


def momentum_dtype(p: Tensor, group: Group) -> torch.dtype:
    """The dtype of a new momentum for p: the group's, else p's own, or float32 where p is float16, because a float16
    momentum would lose every |g| below 6e-8 / (1 - beta2)."""
    explicit = to_dtype(group["momentum_dtype"])
    if explicit is not None:
        return explicit
    return torch.float32 if p.dtype == torch.float16 else p.dtype


def momentum_column(p: Tensor, group: Group) -> StateColumn:
    """The momentum of a parameter. Unless the group has a ``momentum_dtype``, it keeps the dtype it was saved in."""
    dtype, keeps_saved = momentum_dtype(p, group), group["momentum_dtype"] is None
    if dtype == torch.int8:
        return StateColumn(EXP_AVG, dtype)
    return StateColumn(EXP_AVG, dtype, saved_dtypes=STORAGE_DTYPES, keeps_saved=keeps_saved)


def scale_column(p: Tensor, group: Group) -> StateColumn | None:
    """The scales of an 8-bit momentum."""
    if momentum_dtype(p, group) != torch.int8:
        return None
    return StateColumn(EXP_AVG_SCALE, torch.float32, BLOCK)


def remainder_column(p: Tensor, group: Group) -> StateColumn | None:
    """The remainders of master weights. float32 parameters need none.

    Raises:
        TypeError: the parameter takes part and is float16.
    """
    if not group["master_weights"] or p.dtype == torch.float32:
        return None
    if p.dtype != torch.bfloat16:
        if takes_part(p):
            raise TypeError(
                f"master_weights=True, but a parameter of shape {tuple(p.shape)} is {p.dtype}; expected bfloat16 (or "
                "float32, which needs no master weight): convert the model with .bfloat16(), or give these parameters "
                "a group with master_weights=False"
            )
        return None
    return StateColumn(REMAINDER, torch.int16, of_param=True)


# The kinds of state. Each function is given a parameter and its group, and returns the column, or None where such a
# parameter has none. Kernels know the momentum as the first, and its scales as the second.
COLUMNS: list[Callable[[Tensor, Group], StateColumn | None]] = [momentum_column, scale_column, remainder_column]


def state_columns(p: Tensor, group: Group) -> tuple[StateColumn, ...]:
    """The state that Lion keeps for a parameter of this group."""
    return tuple(column for make in COLUMNS if (column := make(p, group)) is not None)


def hyper_parameters(group: Group) -> HyperParameters:
    """A group's hyper-parameters for one step. Raises TypeError or ValueError where they cannot be used.

    An lr tensor stays a tensor. If it is on a GPU its value is not checked, because the host would have to wait.
    """
    lr = group["lr"]
    if not isinstance(lr, Tensor) or lr.device.type == "cpu":
        lr = to_lr(lr, " (did a scheduler pass its end?)")
    weight_decay = to_weight_decay(group["weight_decay"])
    if to_flag(group["decoupled_weight_decay"], "decoupled_weight_decay"):
        weight_decay = _divided(weight_decay, group["init_lr"])
    beta1, beta2 = to_betas(group["betas"])
    eight_bits, _ = kept_form(group)
    seed = seed_of(to_count(group["rounding_step"], "rounding_step")) if eight_bits else 0
    return HyperParameters(lr, weight_decay, beta1, beta2, to_flag(group["maximize"], "maximize"), seed)


def count_step(groups: Iterable[Group]) -> None:
    """Counts a step, so that the next one rounds 8-bit momenta anew. Call it after each step.

    First steps with an lr of 0 are not counted: torch's functions for sharded state make one to create the state, on
    some ranks perhaps, and all ranks must round alike.
    """
    for group in groups:
        if not group["params"] or to_dtype(group["momentum_dtype"]) != torch.int8:
            continue
        steps, lr = to_count(group["rounding_step"], "rounding_step"), group["lr"]
        on_host = not isinstance(lr, Tensor) or lr.device.type == "cpu"
        if steps or not on_host or float(lr) != 0:
            group["rounding_step"] = steps + 1


# Parameters ----------------------------------------------------------------------------------------


def check_steppable(p: Tensor, who: str) -> None:
    """Checks that Lion can step a parameter.

    Args:
        p: the parameter.
        who: describes it in messages.

    Raises:
        TypeError: Lion cannot step its type, dtype, layout or memory.
        ValueError: its elements overlap.
    """
    if is_lazy(p):
        raise TypeError(f"{who} has no shape yet: run the model once before making the optimizer")
    who, part = f"{who} (shape {tuple(p.shape)})", local(p)
    if is_traceable_wrapper_subclass(part) or p.is_meta:
        raise TypeError(
            f"{who} is a {'meta tensor' if p.is_meta else type(part).__name__}, which has no memory of its own to "
            "step: materialize the model before making the optimizer, or freeze the parameter"
        )
    if p.is_complex():
        raise TypeError(f"{who} is complex; give Lion torch.view_as_real(p) instead")
    if p.layout != torch.strided or p.dtype not in STORAGE_DTYPES:
        raise TypeError(f"{who} is {p.layout} {p.dtype}; expected strided float32, bfloat16 or float16")
    if may_overlap(part):
        raise ValueError(
            f"{who} has strides {part.stride()}, in which elements share memory (an expanded tensor?); "
            "use .clone() to give each element its own"
        )


def check_params(params: Sequence[Tensor], already: Iterable[Tensor]) -> None:
    """Checks the parameters of a group.

    Args:
        params: the parameters.
        already: parameters of other groups.

    Raises:
        ValueError: a parameter is given twice.
        TypeError, ValueError: Lion cannot step a parameter that takes part.
    """
    seen = {id(p) for p in already}
    for i, p in enumerate(params):
        who = f"parameter {i} of the group"
        if takes_part(p):
            check_steppable(p, who)
        if id(p) in seen:
            raise ValueError(f"{who} was given twice; pass each parameter once (model.parameters() does)")
        seen.add(id(p))


def names_of(group: Group) -> list[str] | None:
    """The names of a group's parameters; None unless ``param_names`` are strings, one for each parameter."""
    names, n = group.get("param_names"), len(group["params"])
    if not isinstance(names, (list, tuple)) or len(names) != n or not all(isinstance(name, str) for name in names):
        return None
    return list(names)


def describe_groups(groups: Sequence[Group], first: int = 0) -> list[str]:
    """Describes groups, from index ``first`` on, and their parameters: one line for each. All ranks must have the same
    lines."""
    lines = []
    for i, group in enumerate(groups[first:], first):
        values = {key: float(v) if isinstance(v := group[key], Tensor) else v for key in KEYS}
        lines.append(f"group {i}: " + ", ".join(f"{key}={value}" for key, value in values.items()))
        names = names_of(group) or [""] * len(group["params"])
        for j, (p, name) in enumerate(zip(group["params"], names, strict=True)):
            lines.append(f"parameter {j} of group {i} {name}: {_describe(p)}")
    return lines


def _describe(p: Tensor) -> str:
    if not (takes_part(p) or is_plain(local(p))):
        return f"frozen, a {type(p).__name__} that is not compared"
    kind = "trainable" if p.requires_grad else "frozen"
    return f"shape {tuple(p.shape)}, strides {p.stride()}, {p.dtype}, {p.device.type}, {kind}"
