"""What a parameter group means to Lion; shared by both optimizers.

A group holds, beside ``params``: lr (float or tensor of one element), betas (two floats), weight_decay (float),
decoupled_weight_decay (bool), init_lr (float: the lr that the constructor was given), momentum_dtype (torch.dtype or
None), maximize (bool). Given are numbers of any kind and dtypes by name; stored is what this list says. Any other key
belongs to somebody else and is kept.
"""

from __future__ import annotations

import difflib
import math
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence, Set
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from ._torch_compat import is_traceable_wrapper_subclass
from .frozen import is_plain, takes_part
from .fsdp import local
from .memory_order import may_overlap
from .update.reference import STORAGE_DTYPES, HyperParameters
from .update.state import EXP_AVG, StateColumn

Group = dict[str, Any]

KEYS = ("lr", "betas", "weight_decay", "decoupled_weight_decay", "init_lr", "momentum_dtype", "maximize")

# Keys that others write into groups, or that groups written for AdamW hold: without effect on Lion, and no typos.
KNOWN_KEYS = frozenset({
    *KEYS, "params", "param_names", "name",
    "initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr", "lr_scale",  # schedulers
    "foreach", "fused", "capturable", "differentiable", "eps", "amsgrad", "bias_correction",  # AdamW
    "step", "moe",  # DeepSpeed
})  # fmt: skip


# Values --------------------------------------------------------------------------------------------


def shown(value: Any) -> str:
    """A value in a message. Tensors and what may hold them by their type: to print one without memory ends the
    process."""
    plain = (str, int, float, complex, type(None), torch.dtype)
    if isinstance(value, plain) or (type(value) in (list, tuple) and all(isinstance(v, plain) for v in value)):
        return repr(value) if len(repr(value)) < 100 else repr(value)[:100] + "..."
    return f"a {type(value).__name__}"


def to_float(value: Any, name: str) -> float:
    """A number of any kind as a float: Python's, NumPy's, a Fraction, a Decimal, a tensor or array of one element.

    Raises:
        TypeError: it is no real number.
        ValueError: it is a tensor or array of another size, or too large for a float.
    """
    if type(value) is float:
        return value
    given = value
    if isinstance(value, Tensor) or type(value).__module__ == "numpy":
        shape = tuple(value.shape)
        if math.prod(shape) != 1:
            raise ValueError(f"{name} must be a number or a tensor of one element, got shape {shape}")
        if isinstance(value, Tensor) and not is_plain(value):
            raise TypeError(f"{name} must be a number or a tensor of one element, got {shown(value)}")
        value = value.item()
    if not hasattr(type(value), "__float__") or isinstance(value, complex):
        raise TypeError(f"{name} must be a number or a tensor of one element, got {shown(given)}")
    try:
        return float(value)
    except OverflowError as error:
        raise ValueError(f"{name} must be finite, got a number too large for a float") from error


def _lr(value: Any, hint: str = "") -> float | Tensor:
    number = to_float(value, "lr")
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"lr must be finite and >= 0, got {number}{hint}")
    return value if isinstance(value, Tensor) else number


def _betas(value: Any) -> tuple[float, float]:
    if type(value) is tuple and len(value) == 2 and type(value[0]) is float and type(value[1]) is float:
        pair: tuple[float, ...] = value
    else:
        if isinstance(value, (str, bytes, Mapping, Set)):
            raise TypeError(f"betas must be two numbers in [0, 1), got {shown(value)}")
        try:
            pair = tuple(islice(iter(value), 3))
            pair = tuple(to_float(beta, "each of betas") for beta in pair)
        except (TypeError, RuntimeError) as error:  # RuntimeError: a tensor subclass that cannot be iterated over
            raise TypeError(f"betas must be two numbers in [0, 1), got {shown(value)}") from error
    if len(pair) != 2 or not (0 <= pair[0] < 1 and 0 <= pair[1] < 1):
        raise ValueError(f"betas must be two numbers in [0, 1), got {shown(value)}")
    return pair[0], pair[1]


def _weight_decay(value: Any) -> float:
    number = to_float(value, "weight_decay")
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"weight_decay must be finite and >= 0, got {number}")
    return number


def _flag(value: Any, name: str) -> bool:
    if type(value).__name__ not in ("bool", "bool_"):  # NumPy's are called bool_ (1.x) and bool (2.x)
        raise TypeError(f"{name} must be True or False, got {shown(value)}")
    return bool(value)


def to_dtype(value: Any) -> torch.dtype | None:
    """A momentum_dtype, which may be given by name ("bfloat16" or "torch.bfloat16").

    Raises:
        TypeError: a momentum cannot have this dtype.
    """
    dtype = _DTYPE_OF.get(value.removeprefix("torch."), value) if isinstance(value, str) else value
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype in STORAGE_DTYPES):
        raise TypeError(f"momentum_dtype must be None, float32, bfloat16 or float16, got {shown(value)}")
    return dtype


def dtype_name(dtype: Any) -> str | None:
    """The name by which `to_dtype` knows a dtype: "float32" and the like; None for None."""
    return None if dtype is None else str(dtype).removeprefix("torch.")


_DTYPE_OF = {dtype_name(dtype): dtype for dtype in STORAGE_DTYPES}


# Groups --------------------------------------------------------------------------------------------


def _values(group: Group) -> Group:
    """A group's own hyper-parameters as they are stored; raises where Lion cannot use one."""
    lr, weight_decay = _lr(group["lr"]), _weight_decay(group["weight_decay"])
    betas = _betas(group["betas"])
    decoupled = _flag(group["decoupled_weight_decay"], "decoupled_weight_decay")
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
        "maximize": _flag(group["maximize"], "maximize"),
    }


def _divided(weight_decay: float, init_lr: float) -> float:
    """The weight decay that lr is multiplied by, of one that was given decoupled."""
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
    maximize: bool,
) -> Group:
    """The defaults of an optimizer, validated as a group is. Waits for an lr tensor on a GPU."""
    given = {
        "lr": lr,
        "betas": betas,
        "weight_decay": weight_decay,
        "decoupled_weight_decay": decoupled_weight_decay,
        "init_lr": to_float(lr, "lr"),  # a scheduler fills an lr tensor in place, so its first value is kept
        "momentum_dtype": momentum_dtype,
        "maximize": maximize,
    }
    return _values(given)


def check_group(group: Group) -> None:
    """Raises TypeError or ValueError where a group's hyper-parameters are not ones that Lion can use. Reads lr's value,
    so an lr tensor on a GPU is waited for: for construction and loads, not for steps."""
    _values(group)


def complete_group(group: Group, *others: Group) -> None:
    """Adds, in place, the hyper-parameters that a group lacks: each from the first of the others that has it."""
    for key in KEYS:
        for other in others:
            if key not in group and key in other:
                group[key] = other[key]
    if "init_lr" not in group:  # pickled by a version that had none
        group["init_lr"] = to_float(others[-1].get("lr", group["lr"]), "lr")


def normalize_group(group: Group) -> None:
    """Brings the hyper-parameters of a complete group, in place, into the form in which they are stored.

    Raises:
        ValueError, TypeError: naming the one that Lion cannot use; nothing has been changed.
    """
    group.update(_values(group))


def complete_loaded_groups(groups: Sequence[Group], previous: Sequence[Group], defaults: Group) -> None:
    """Adds what loaded groups lack: it stays as this optimizer had it, else it is the default."""
    for i, group in enumerate(groups):
        complete_group(group, *previous[i : i + 1], defaults)


def warn_of_unknown_keys(group: Group, others: Iterable[Group]) -> None:
    """Warns of keys that neither Lion nor anybody known reads, such as a typo; not of those that others have too."""
    seen = {key for other in others for key in other}
    for key in group:
        if key in KNOWN_KEYS or key in seen or str(key).startswith("_"):
            continue
        close = difflib.get_close_matches(str(key).lower(), KEYS, n=1, cutoff=0.75)
        hint = f'Did you mean "{close[0]}"?' if close else f"Lion reads {', '.join(k for k in KEYS if k != 'init_lr')}."
        warn(f'a parameter group has a key "{key}", which Lion does not know: it is kept, without effect. {hint}')


def warn(message: str) -> None:
    """A warning that points at the first line outside of lion_dist and torch."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("lion_dist", "torch"):
        level, frame = level + 1, frame.f_back
    warnings.warn(f"lion_dist: {message}", stacklevel=level)


def momentum_dtype(p: Tensor, group: Group) -> torch.dtype:
    """The dtype of a new momentum for p: what the group says, else p's own; float32 for float16
    weights, whose momentum would lose every |g| below 6e-8 / (1 - beta2)."""
    explicit = to_dtype(group["momentum_dtype"])
    if explicit is not None:
        return explicit
    return torch.float32 if p.dtype == torch.float16 else p.dtype


def state_columns(p: Tensor, group: Group) -> tuple[StateColumn, ...]:
    """The state that Lion keeps for a parameter of this group."""
    return (StateColumn(EXP_AVG, momentum_dtype(p, group)),)


def hyper_parameters(group: Group) -> HyperParameters:
    """This step's hyper-parameters of a group; raises where they cannot be used. An lr tensor stays one,
    and if it is on a GPU its value is not looked at, since that would wait for the GPU."""
    lr = group["lr"]
    if not isinstance(lr, Tensor) or lr.device.type == "cpu":
        lr = _lr(lr, " (did a scheduler pass its end?)")
    weight_decay = _weight_decay(group["weight_decay"])
    if _flag(group["decoupled_weight_decay"], "decoupled_weight_decay"):
        weight_decay = _divided(weight_decay, group["init_lr"])
    return HyperParameters(lr, weight_decay, *_betas(group["betas"]), _flag(group["maximize"], "maximize"))


# Parameters ----------------------------------------------------------------------------------------


def check_steppable(p: Tensor, who: str) -> None:
    """Raises where Lion cannot step a parameter.

    Raises:
        TypeError: Lion cannot step its type, dtype, layout or memory.
        ValueError: its elements overlap.
    """
    if is_lazy(p):
        raise TypeError(f"{who} has no shape yet: run the model once (a dry run) before making the optimizer")
    who, part = f"{who} (shape {tuple(p.shape)})", local(p)
    if is_traceable_wrapper_subclass(part) or p.is_meta:
        raise TypeError(
            f"{who} is a {'meta tensor' if p.is_meta else type(part).__name__}, which has no memory of its own to "
            "step: materialise the model before making the optimizer, or freeze the parameter"
        )
    if p.is_complex():
        raise TypeError(f"{who} is complex; give Lion torch.view_as_real of it")
    if p.layout != torch.strided or p.dtype not in STORAGE_DTYPES:
        raise TypeError(f"{who} is {p.layout} {p.dtype}; expected strided float32, bfloat16 or float16")
    if may_overlap(part):
        raise ValueError(
            f"{who} has strides {part.stride()}, in which elements share memory (an expanded tensor?); "
            "use .clone() to give each element its own"
        )


def check_params(params: Sequence[Tensor], already: Iterable[Tensor]) -> None:
    """Raises ValueError for a parameter of a group that is given twice, and as `check_steppable` does for those that
    take part."""
    seen = {id(p) for p in already}
    for i, p in enumerate(params):
        who = f"parameter {i} of the group"
        if takes_part(p):
            check_steppable(p, who)
        if id(p) in seen:
            raise ValueError(f"{who} was given twice; pass each parameter once (model.parameters() does)")
        seen.add(id(p))


def names_of(group: Group) -> list[str] | None:
    """The names of a group's parameters; None where ``param_names`` are not as many strings as there are parameters."""
    names, n = group.get("param_names"), len(group["params"])
    if not isinstance(names, (list, tuple)) or len(names) != n or not all(isinstance(name, str) for name in names):
        return None
    return list(names)


def describe_groups(groups: Sequence[Group], first: int = 0) -> list[str]:
    """What must be equal on all ranks, one line a group from number ``first`` and one a parameter."""
    lines = []
    for i, group in enumerate(groups[first:], first):
        values = {key: float(v) if isinstance(v := group[key], Tensor) else v for key in KEYS}
        lines.append(f"group {i}: " + ", ".join(f"{key}={value}" for key, value in values.items()))
        names = names_of(group) or [""] * len(group["params"])
        for j, (p, name) in enumerate(zip(group["params"], names, strict=True)):
            lines.append(f"parameter {j} of group {i} {name}: {_describe(p)}")
    return lines


def _describe(p: Tensor) -> str:
    if not (takes_part(p) or is_plain(p)):
        return f"frozen, a {type(p).__name__} that is not compared"
    kind = "trainable" if p.requires_grad else "frozen"
    return f"shape {tuple(p.shape)}, strides {p.stride()}, {p.dtype}, {p.device.type}, {kind}"
