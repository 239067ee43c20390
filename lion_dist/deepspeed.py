"""DeepSpeed's `"optimizer": {"type": "Lion", "params": {...}}`, built as lion_dist's Lion.

    import lion_dist
    lion_dist.deepspeed.register()      # before deepspeed.initialize, Accelerate's prepare or the HF Trainer

DeepSpeed has no door for other people's optimizers, so `register` puts two functions in place of methods of
DeepSpeedEngine, and appends our class to the list of those that ZeRO takes. It looks at all three before it touches
one. deepspeed is imported by these functions only.

Partition: what ZeRO hands the optimizer in place of the model's parameters: this rank's part of a parameter group
(stages 1 and 2) or of a sub-group of it (stage 3), flat, with padding, float32 as a rule. Stages 1 and 2 call step()
once a group, with ``param_groups`` swapped for a list of that one; stage 3 once a sub-group, with the ``params`` of
all other groups empty. Lion is elementwise, so it is right on any of them.

Zero gradients: DeepSpeed hands those for parameters without a gradient. Their momentum decays and their weights follow
its sign until it is zero; a weight that never had a gradient stays where it is.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .hyper_values import to_dtype
from .lion import Lion
from .update.state import EXP_AVG

TESTED_VERSION = "0.19.8"

# What a config may say of the optimizer.
ARGUMENTS = ("lr", "betas", "weight_decay", "decoupled_weight_decay", "use_triton", "momentum_dtype", "maximize")
# What configs written for Adam, or for DeepSpeed's own Lion, say that chooses among implementations, or is a number of
# Adam's: without effect here, and a warning says so.
WITHOUT_EFFECT = ("eps", "torch_adam", "fused", "foreach", "bias_correction", "set_grad_none")
# What would change the result of the optimizer that the config was written for: taken at the value that Lion means.
ONLY = {
    "adam_w_mode": (True, "Lion's weight decay is decoupled from the gradient"),
    "amsgrad": (False, "Lion has no second moment"),
    "fp32_optimizer_states": (True, 'say "momentum_dtype": "bfloat16" for a momentum in 16 bits'),
}
ADAMS_BETAS = (0.9, 0.999)

NOT_LIONS = {"step", "exp_avg_sq"}  # entries of a state that DeepSpeed's tools ask for


class DeepSpeedLion(Lion):
    """`Lion` with state_dicts as DeepSpeed's tools expect them.

    Its universal checkpoint format is made of Adam's states. So beside ``exp_avg`` a state_dict has ``exp_avg_sq``,
    one zero seen in the momentum's shape, and ``step``, 0. Neither takes memory, and both are dropped where a
    checkpoint is loaded; what others keep under other keys is kept. Elastic checkpoints look for ``step`` in the
    groups. Arguments and errors are those of `Lion`.
    """

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group({"step": 0, **param_group})

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("step", 0)

    # Each partition would throw away what was prepared for the one before, an index of its tiles among it.
    _swaps_params = True

    def _adopt_state(self) -> None:
        """Brings a universal checkpoint into Lion's form. DeepSpeed loads it into the groups, as they were saved, and
        into the state, in float32; it keeps references to the state that exists after the first step."""
        for group in self.param_groups:
            _check_not_adams(group)
            group["momentum_dtype"] = to_dtype(group["momentum_dtype"])
            for p in group["params"]:
                entry = self.state.get(p, {})
                if NOT_LIONS & entry.keys():
                    _check_second_moment(f"a partition of {p.numel()} elements", entry)
                    for key in NOT_LIONS:
                        entry.pop(key, None)
                if group["momentum_dtype"] is not None and EXP_AVG in entry:
                    entry[EXP_AVG] = entry[EXP_AVG].to(group["momentum_dtype"])

    def state_dict(self) -> dict[str, Any]:
        saved = super().state_dict()
        return {**saved, "state": {i: _like_adams(entry) for i, entry in saved["state"].items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As `Lion.load_state_dict`; takes what `state_dict` and what DeepSpeed's own Lions saved.

        Raises:
            ValueError: the state_dict does not fit, or holds a second moment that is not zero, as Adam's would;
                nothing has been changed.
        """
        if isinstance(state_dict, dict) and isinstance(state_dict.get("state"), dict):
            state = {i: _lions_own(i, entry) for i, entry in state_dict["state"].items()}
            state_dict = {**state_dict, "state": state}
        super().load_state_dict(state_dict)


def _like_adams(entry: Any) -> Any:
    if not isinstance(entry, dict) or EXP_AVG not in entry:
        return entry  # somebody else's
    momentum = entry[EXP_AVG]
    placeholder = torch.zeros((), dtype=momentum.dtype).expand(momentum.shape)
    return {"step": 0, EXP_AVG: momentum, "exp_avg_sq": placeholder} | {
        key: value for key, value in entry.items() if key not in NOT_LIONS
    }


_START_FROM_WEIGHTS = "start Lion from the weights alone (load_optimizer_states=False)"


def _check_not_adams(group: dict[str, Any]) -> None:
    """Every rank has the groups, and only some a second moment that is not zero."""
    strange = sorted({"eps", "amsgrad", "bias_correction"} & group.keys())
    if strange:
        raise ValueError(
            f"a parameter group has {strange[0]!r}, as one from a checkpoint of Adam's has, so it is Adam's: "
            f"{_START_FROM_WEIGHTS}; in a group of your own leave {strange[0]!r} out"
        )


def _check_second_moment(whose: str, entry: dict[str, Any]) -> None:
    second = entry.get("exp_avg_sq")
    if isinstance(second, Tensor) and second.count_nonzero():
        raise ValueError(
            f"the state of {whose} has an exp_avg_sq that is not zero, so it is Adam's: {_START_FROM_WEIGHTS}"
        )


def _lions_own(index: Any, entry: Any) -> Any:
    if not isinstance(entry, dict):
        return entry  # Lion's own load says what is wrong with it
    _check_second_moment(f"parameter {index!r}", entry)
    return {key: value for key, value in entry.items() if key not in NOT_LIONS}


def arguments(params: dict[str, Any]) -> dict[str, Any]:
    """A config's ``optimizer.params`` as keyword arguments of Lion, whose defaults hold for what is not said (lr 1e-4,
    betas (0.9, 0.99), weight_decay 0; DeepSpeed's own Lion has lr 1e-3 and betas (0.9, 0.999)).

    Raises:
        ValueError: naming the parameter that Lion does not know, or cannot take at this value.
    """
    given = dict(params)
    if "max_grad_norm" in given:
        raise ValueError('"max_grad_norm" is no parameter of an optimizer; set "gradient_clipping" of the config')
    for name, value in given.items():
        if value == "auto":
            raise ValueError(
                f'"{name}": "auto" is for Hugging Face to fill in, and nobody did; give Lion a value, or leave it out'
            )
    for name, (value, reason) in ONLY.items():
        if given.pop(name, value) != value:
            raise ValueError(f'"{name}": {str(not value).lower()} is not possible: {reason}')
    ignored = [name for name in WITHOUT_EFFECT if given.pop(name, None) is not None]
    if ignored:
        warnings.warn(f"lion_dist: optimizer parameters without meaning for Lion: {', '.join(ignored)}", stacklevel=2)
    unknown = sorted(given.keys() - set(ARGUMENTS))
    if unknown:
        raise ValueError(f'"Lion" has no parameter {", ".join(unknown)}; it has {", ".join(ARGUMENTS)}')
    if tuple(given.get("betas", ())) == ADAMS_BETAS:
        warnings.warn(
            f"lion_dist: betas {ADAMS_BETAS} are Adam's. Lion's are (0.9, 0.99), or (0.95, 0.98) for language models: "
            "give them in the DeepSpeed config and, for the Hugging Face Trainer, as adam_beta1 and adam_beta2",
            stacklevel=2,
        )
    try:
        to_dtype(given.get("momentum_dtype"))
    except TypeError as error:
        raise ValueError(str(error)) from error
    return given


def _check_modes(engine: Any) -> None:
    """Raises for modes in which DeepSpeed would step with an Adam of its own."""
    modes = {
        "zero_optimization.zenflow": engine.zenflow_config() is not None,
        "zero_optimization.offload_optimizer.super_offload": engine.super_offload(),
        "zero_optimization.offload_optimizer.ratio < 1": engine.zero_partial_offload() < 1,
    }
    for mode, is_on in modes.items():
        if is_on:
            raise ValueError(
                f'{mode}: in this mode DeepSpeed steps with its own Adam, whatever "optimizer" says. Leave it out to '
                "train with Lion; ordinary offload_optimizer and offload_param work"
            )


# What replaces methods of DeepSpeedEngine ------------------------------------------------------------------


def _replacements(originals: dict[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """By name of the method: what takes its place, given what stood there."""

    def _configure_basic_optimizer(self: Any, model_parameters: ParamsT) -> torch.optim.Optimizer:
        if self.optimizer_name() != "lion":
            basic: torch.optim.Optimizer = originals["_configure_basic_optimizer"](self, model_parameters)
            return basic
        _check_modes(self)
        return DeepSpeedLion(model_parameters, **arguments(self.optimizer_params() or {}))

    def _configure_fp16_optimizer(self: Any, optimizer: torch.optim.Optimizer, low_precision_dtype: torch.dtype) -> Any:
        wrap = originals["_configure_fp16_optimizer"]
        if not isinstance(optimizer, Lion):
            return wrap(self, optimizer, low_precision_dtype)
        # The wrapper's constructor makes a step with gradients of zero, to have the state made. It would decay the
        # weights; at an lr of 0 Lion writes none.
        rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        try:
            return wrap(self, optimizer, low_precision_dtype)
        finally:
            for group, lr in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = lr

    return {f.__name__: f for f in (_configure_basic_optimizer, _configure_fp16_optimizer)}


# Parameters of the methods that are replaced, and methods that the replacements call.
_SIGNATURES = {
    "_configure_basic_optimizer": ["self", "model_parameters"],
    "_configure_fp16_optimizer": ["self", "optimizer", "low_precision_dtype"],
    "optimizer_name": ["self"],
    "optimizer_params": ["self"],
    "zenflow_config": ["self"],
    "super_offload": ["self"],
    "zero_partial_offload": ["self"],
}


@dataclass(frozen=True)
class _Registration:
    """What was changed, and what it was before."""

    engine: type
    supported: list[type]
    originals: dict[str, Callable[..., Any]]
    replacements: dict[str, Callable[..., Any]]


_lock = threading.RLock()
_registration: _Registration | None = None  # while `register` holds, or a block of `registered` is open
_by_register = False
_open_blocks = 0


def _internals() -> tuple[type, list[type]]:
    """DeepSpeedEngine, and the list of the optimizers that ZeRO takes, once both are known to be as we know them."""
    try:
        import deepspeed
    except ImportError as error:
        raise ImportError("lion_dist.deepspeed.register() needs DeepSpeed: pip install deepspeed") from error
    from deepspeed.runtime import engine as engine_module
    from deepspeed.runtime.zero import utils as zero_utils

    engine = getattr(engine_module, "DeepSpeedEngine", None)
    supported = getattr(zero_utils, "ZERO_SUPPORTED_OPTIMIZERS", None)
    differences = []
    for name, expected in _SIGNATURES.items():
        method = vars(engine).get(name) if engine is not None else None
        got = list(inspect.signature(method).parameters) if callable(method) else None
        if got != expected:
            differences.append(f"DeepSpeedEngine.{name} takes {got}, expected {expected}")
    if getattr(engine_module, "LION_OPTIMIZER", None) != "lion":
        differences.append('deepspeed.runtime.engine.LION_OPTIMIZER is not "lion"')
    if not isinstance(supported, list):
        differences.append("deepspeed.runtime.zero.utils.ZERO_SUPPORTED_OPTIMIZERS is no list")
    if engine is None or supported is None or differences:
        raise RuntimeError(
            f"lion_dist.deepspeed.register() does not know the inside of DeepSpeed {deepspeed.__version__} "
            f"({'; '.join(differences)}), and has changed nothing. It was tested with {TESTED_VERSION}: install that "
            "one, or give deepspeed.initialize optimizer=lion_dist.deepspeed.DeepSpeedLion(...), with "
            '"zero_allow_untested_optimizer": true and, to offload it, "zero_force_ds_cpu_optimizer": false'
        )
    return engine, supported


def register() -> None:
    """Has DeepSpeed build `DeepSpeedLion` for `"type": "Lion"`, in this process, until `unregister`. Engines that exist
    already keep their optimizer. May be called again, and from any thread.

    Raises:
        ImportError: DeepSpeed is not installed.
        RuntimeError: this version of DeepSpeed is not as expected; nothing has been changed.
    """
    global _by_register
    with _lock:
        _patch()
        _by_register = True


def unregister() -> None:
    """Gives DeepSpeed back what `register` changed, once no block of `registered` is open. Without a `register` before
    it does nothing.

    Raises:
        RuntimeError: somebody has put something of their own over ours since; nothing has been changed.
    """
    global _by_register
    with _lock:
        if not _open_blocks:
            _restore()
        _by_register = False


@contextlib.contextmanager
def registered() -> Iterator[None]:
    """`register` for a ``with`` block, or, as a decorator, for each call of a function, in any number of threads:
    afterwards things are as they were before, registered or not."""
    global _open_blocks
    with _lock:
        _patch()
        _open_blocks += 1
    try:
        yield
    finally:
        with _lock:
            _open_blocks -= 1
            if not _open_blocks and not _by_register:
                _restore()


def _patch() -> None:
    global _registration
    if _registration is not None:
        return
    engine, supported = _internals()
    originals = {name: vars(engine)[name] for name in ("_configure_basic_optimizer", "_configure_fp16_optimizer")}
    replacements = _replacements(originals)
    for name, function in replacements.items():
        setattr(engine, name, function)
    supported.append(DeepSpeedLion)
    _registration = _Registration(engine, supported, originals, replacements)


def _restore() -> None:
    global _registration
    if _registration is None:
        return
    engine, ours = _registration.engine, _registration.replacements
    covered = [name for name, function in ours.items() if vars(engine).get(name) is not function]
    if covered:
        raise RuntimeError(
            f"DeepSpeedEngine.{covered[0]} has been replaced since lion_dist.deepspeed.register(): undo that first"
        )
    for name, function in _registration.originals.items():
        setattr(engine, name, function)
    _registration.supported.remove(DeepSpeedLion)
    _registration = None
