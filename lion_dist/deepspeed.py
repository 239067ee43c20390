"""Makes DeepSpeed build lion_dist's Lion for `"optimizer": {"type": "Lion", "params": {...}}`.

    import lion_dist
    lion_dist.deepspeed.register()      # before deepspeed.initialize, Accelerate's prepare or the HF Trainer

DeepSpeed has no interface by which a config can name an optimizer of another library. So `register` replaces two
methods of DeepSpeedEngine and appends `DeepSpeedLion` to the list of optimizers that ZeRO accepts. It checks the
methods and the list before it changes any of them. deepspeed is imported only when one of the functions here is called.

Partition: the tensor that ZeRO gives the optimizer in place of the model's parameters. It is this rank's part of a
parameter group (stages 1 and 2) or of a sub-group of one (stage 3): flat, padded, and normally float32. Stages 1 and 2
call step() once for each group, with ``param_groups`` replaced by a list of that group alone. Stage 3 calls it once for
each sub-group, with empty ``params`` in all other groups. Lion is elementwise, so it is correct on any partition.

Zero gradients: DeepSpeed gives the optimizer zeros for parameters without a gradient. The momentum of such a weight
decays, and the weight follows its sign until it is zero. A weight that never had a gradient does not move.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .deepspeed_config import arguments, check_modes, check_precision
from .hyper_values import to_dtype
from .lion import Lion
from .update.state import EXP_AVG

TESTED_VERSION = "0.19.8"

NOT_LIONS = {"step", "exp_avg_sq"}  # keys of a parameter's state that DeepSpeed's tools read and Lion does not have


class DeepSpeedLion(Lion):
    """`Lion` with state_dicts as DeepSpeed's tools expect them.

    DeepSpeed's universal checkpoint format assumes Adam's state. So a state_dict also has, beside ``exp_avg``, an
    ``exp_avg_sq`` (a single zero, expanded to the momentum's shape) and a ``step`` of 0. Neither takes memory, and a
    load drops both. Entries under other keys are saved and loaded. Each parameter group has a ``step`` too, which
    elastic checkpoints read. Arguments and errors are those of `Lion`; and ``master_weights=True`` and a
    ``momentum_dtype`` of int8 raise ValueError, since DeepSpeed keeps master weights of its own, and its tools would
    read 8-bit codes without their scales.
    """

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        group = {"step": 0, **param_group}
        check_precision({**self.defaults, **group})
        super().add_param_group(group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("step", 0)

    # Without this each partition would discard the tables that were prepared for the one before.
    _swaps_params = True

    def _adopt_state(self) -> None:
        """Converts a universal checkpoint that DeepSpeed has loaded into the form that Lion steps.

        DeepSpeed loads the groups as they were saved, and the state in float32. It keeps references to the state that
        exists after the first step.

        Raises:
            ValueError: the checkpoint is one of Adam.
        """
        for group in self.param_groups:
            _check_not_adams(group)
            check_precision(group)
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
        """Loads a state_dict of `DeepSpeedLion`, of DeepSpeed's own Lion optimizers, or any that `Lion` takes.

        Raises:
            ValueError: the state_dict does not fit, or has a second moment that is not zero, so it is Adam's. Nothing
                has been changed.
        """
        if isinstance(state_dict, dict) and isinstance(state_dict.get("state"), dict):
            state = {i: _lions_own(i, entry) for i, entry in state_dict["state"].items()}
            state_dict = {**state_dict, "state": state}
        super().load_state_dict(state_dict)


def _like_adams(entry: Any) -> Any:
    if not isinstance(entry, dict) or EXP_AVG not in entry:
        return entry  # other code put it there
    momentum = entry[EXP_AVG]
    placeholder = torch.zeros((), dtype=momentum.dtype, device=momentum.device).expand(momentum.shape)
    return {"step": 0, EXP_AVG: momentum, "exp_avg_sq": placeholder} | {
        key: value for key, value in entry.items() if key not in NOT_LIONS
    }


_START_FROM_WEIGHTS = "start Lion from the weights alone (load_optimizer_states=False)"


def _check_not_adams(group: dict[str, Any]) -> None:
    """Raises ValueError if a group is one of Adam. Every rank has the groups, while a second moment that is not zero
    may lie on some ranks only, so this check fails on all ranks alike."""
    strange = sorted({"eps", "amsgrad", "bias_correction"} & group.keys())
    if strange:
        raise ValueError(
            f"a parameter group has the key {strange[0]!r}, which Adam's groups have. If it comes from a "
            f"checkpoint of Adam, {_START_FROM_WEIGHTS}. If it is a group of yours, leave {strange[0]!r} out"
        )


def _check_second_moment(whose: str, entry: dict[str, Any]) -> None:
    second = entry.get("exp_avg_sq")
    if isinstance(second, Tensor) and second.count_nonzero():
        raise ValueError(
            f"the state of {whose} has an exp_avg_sq that is not zero, so it is Adam's: {_START_FROM_WEIGHTS}"
        )


def _lions_own(index: Any, entry: Any) -> Any:
    if not isinstance(entry, dict):
        return entry  # Lion.load_state_dict reports what is wrong with it
    _check_second_moment(f"parameter {index!r}", entry)
    return {key: value for key, value in entry.items() if key not in NOT_LIONS}


# Replacing methods of DeepSpeedEngine ----------------------------------------------------------------------


def _replacements(originals: dict[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """Makes the functions that replace methods of DeepSpeedEngine.

    Args:
        originals: the methods that are replaced, by name. The replacements call them for other optimizers.

    Returns:
        The replacements, by name of the method.
    """

    def _configure_basic_optimizer(self: Any, model_parameters: ParamsT) -> torch.optim.Optimizer:
        if self.optimizer_name() != "lion":
            basic: torch.optim.Optimizer = originals["_configure_basic_optimizer"](self, model_parameters)
            return basic
        check_modes(self)
        return DeepSpeedLion(model_parameters, **arguments(self.optimizer_params() or {}))

    def _configure_fp16_optimizer(self: Any, optimizer: torch.optim.Optimizer, low_precision_dtype: torch.dtype) -> Any:
        wrap = originals["_configure_fp16_optimizer"]
        if not isinstance(optimizer, Lion):
            return wrap(self, optimizer, low_precision_dtype)
        # The wrapper's constructor makes a step with gradients of zero, so that the optimizer makes its state. That
        # step would decay the weights. With lr = 0 Lion writes no weights.
        rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        try:
            return wrap(self, optimizer, low_precision_dtype)
        finally:
            for group, lr in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = lr

    return {f.__name__: f for f in (_configure_basic_optimizer, _configure_fp16_optimizer)}


# Names of the parameters of the methods that are replaced, and of the methods that the replacements call.
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
    """The changes that `register` has made to DeepSpeed, kept so that they can be undone."""

    engine: type  # DeepSpeedEngine
    supported: list[type]  # optimizers that ZeRO accepts
    originals: dict[str, Callable[..., Any]]  # the methods that have been replaced, by name
    replacements: dict[str, Callable[..., Any]]  # the functions that have replaced them


_lock = threading.RLock()
_registration: _Registration | None = None  # while `register` holds, or a block of `registered` is open
_by_register = False
_open_blocks = 0


def _internals() -> tuple[type, list[type]]:
    """Returns DeepSpeedEngine, and the list of optimizers that ZeRO accepts.

    Raises:
        ImportError: DeepSpeed is not installed.
        RuntimeError: either is not as in the version that this file was written for.
    """
    try:
        import deepspeed
    except ImportError as error:
        raise ImportError(
            "lion_dist.deepspeed.register() needs DeepSpeed: pip install 'lion_dist[deepspeed]'"
        ) from error
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
        differences.append("deepspeed.runtime.zero.utils.ZERO_SUPPORTED_OPTIMIZERS is not a list")
    if engine is None or supported is None or differences:
        raise RuntimeError(
            f"lion_dist.deepspeed.register() does not know the internals of DeepSpeed {deepspeed.__version__} "
            f"({'; '.join(differences)}), and has changed nothing. It was tested with {TESTED_VERSION}: install that "
            "version, or pass optimizer=lion_dist.deepspeed.DeepSpeedLion(...) to deepspeed.initialize, with "
            '"zero_allow_untested_optimizer": true in the config and, for offload, "zero_force_ds_cpu_optimizer": false'
        )
    return engine, supported


def register() -> None:
    """Makes DeepSpeed build `DeepSpeedLion` for `"type": "Lion"`, in this process, until `unregister` is called.

    Engines that exist already keep their optimizer. It may be called more than once, and from any thread.

    Raises:
        ImportError: DeepSpeed is not installed.
        RuntimeError: this version of DeepSpeed is not as expected. Nothing has been changed.
    """
    global _by_register
    with _lock:
        _patch()
        _by_register = True


def unregister() -> None:
    """Undoes `register`: at once, or when the last open block of `registered` ends.

    It does nothing if `register` has not been called.

    Raises:
        RuntimeError: other code has replaced one of the methods since. Nothing has been changed.
    """
    global _by_register
    with _lock:
        if not _open_blocks:
            _restore()
        _by_register = False


@contextlib.contextmanager
def registered() -> Iterator[None]:
    """Context manager and decorator: `register` for a ``with`` block, or for the duration of a function's calls.

    Blocks may overlap in any number of threads. When the last one ends, DeepSpeed is as it was before: changed only if
    `register` has been called.

    Raises:
        ImportError, RuntimeError: as by `register`, and as by `unregister` when the last block ends.
    """
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
            f"DeepSpeedEngine.{covered[0]} has been replaced since lion_dist.deepspeed.register(): put back the method "
            "that register() set, then call unregister() again"
        )
    for name, function in _registration.originals.items():
        setattr(engine, name, function)
    _registration.supported.remove(DeepSpeedLion)
    _registration = None
