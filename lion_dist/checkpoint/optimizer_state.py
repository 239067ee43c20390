"""The entries of ``optimizer.state`` by key, and the limits of what a checkpoint takes from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from ..lion import Lion
from ..meshes import of_same_boxes
from ..param_groups import state_columns
from ..sharded_lion import ShardedLion
from ..state_dicts import FOREIGN_ENTRIES
from ..update.state import EXP_AVG, EXP_AVG_SCALE, REMAINDER
from .codes import code_runs
from .computed import Computed, DecodedMomentum, MasterWeight
from .json_values import to_json
from .keys import BESIDE, MASTER, MODEL, STATE
from .logical import Logical, parts_of
from .manifest import BLOCK_BYTES
from .names import Names
from .ranks import Ranks, together

# These limits bound what a load may allocate, as does `max_entry_bytes`.
MAX_ENTRIES = 16  # entries of one parameter in optimizer.state
MAX_BESIDE = 256  # entries of optimizer.state whose keys are not parameters


def unwrapped(optimizer: Any) -> Any:
    """The optimizer inside Accelerate's wrapper; any other optimizer as it is."""
    while type(optimizer).__module__.split(".")[0] == "accelerate" and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def check_optimizer(optimizer: Any) -> None:
    """Raises TypeError for anything but None, `Lion` and `ShardedLion`."""
    if optimizer is not None and not isinstance(optimizer, (Lion, ShardedLion)):
        raise TypeError(f"expected lion_dist's Lion or ShardedLion, got {type(optimizer).__name__}")


def init_state(what: str, optimizer: Optimizer | None, ranks: Ranks) -> None:
    """Makes the state that the next step would make, for parameters that were unfrozen since the last one. A collective
    call.

    Args:
        what: the call, for messages.
        optimizer: the optimizer, if any.
        ranks: the ranks that save or load.

    Raises:
        ValueError: on every rank, if a ShardedLion is not given on all ranks of its group. They would wait for each
            other.
    """

    def group() -> tuple[int, list[int]]:
        if ranks.group is None:
            return 0, []
        given = optimizer.process_group if isinstance(optimizer, ShardedLion) else None
        return dist.get_rank(), [] if given is None else dist.get_process_group_ranks(given)

    def init() -> None:
        if isinstance(optimizer, (Lion, ShardedLion)):
            optimizer.init_state()

    together(what, lambda: ranks.steps.all_reduce("groups", group, _check_groups))
    # Not within an Agreement: for a ShardedLion this is a collective call of its own group.
    together(what, lambda: ranks.steps.all_gather("init state", init))


def _check_groups(ranks: list[tuple[int, list[int]]]) -> None:
    """Checks that every ShardedLion is given on all ranks of its group.

    Args:
        ranks: for each rank its number, and the ranks of its ShardedLion's group, if it has one.
    """
    given = dict(ranks)
    for rank, group in ranks:
        lacking = [other for other in group if given.get(other) != group]
        if lacking:
            raise ValueError(
                f"the ShardedLion of rank {rank} is that of ranks {group}, but ranks {lacking} have not been given it: "
                "give the same optimizer on every rank of its group, or on none of them"
            )


def params_by_name(optimizer: Optimizer, names: Names) -> dict[str, Tensor]:
    """The optimizer's parameters by name.

    Raises:
        ValueError: a parameter is not in the model.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    unknown = [i for i, p in enumerate(params) if p not in names]
    if unknown:
        raise ValueError(
            f"parameters {unknown[:5]} of the optimizer are not in the model: give the model that holds all of the "
            "optimizer's parameters, wrapped as it is in training"
        )
    return {names.of(p): p for p in params}


def state_by_key(
    optimizer: Optimizer, names: Names, logical: Logical
) -> tuple[dict[str, Tensor | Computed], dict[str, Any]]:
    """The entries of ``optimizer.state`` by key, and master weights.

    Returns:
        Lion's state, and tensors that are sharded like their parameters, in the shapes of these, and weights that take
        the place of the model's; and all other values.

    Raises:
        ValueError: a parameter of the optimizer is not in the model, or the state is another optimizer's.
        TypeError: an entry cannot be saved.
    """
    tensors: dict[str, Tensor | Computed] = {}
    others: dict[str, Any] = {}
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for name, p in params_by_name(optimizer, names).items():
        blocks = {c.name: c.shape(p.shape) for c in state_columns(p, group_of[id(p)]) if c.block > 1}
        entries = optimizer.state.get(p) or {}
        if len(entries) > MAX_ENTRIES:
            raise TypeError(
                f"optimizer.state has {len(entries)} entries for {name}; a checkpoint holds up to {MAX_ENTRIES}"
            )
        computed = _computed(name, p, entries, logical)
        tensors.update(computed)
        done = set()
        if MODEL + name in computed:
            others[MASTER + name] = True
            done.add(REMAINDER)
        if STATE + name + "." + EXP_AVG in computed:
            done |= {EXP_AVG, EXP_AVG_SCALE}
        for entry, value in entries.items():
            if entry in done:
                continue
            key = STATE + name + "." + _check_text(entry, f"the state of {name}")
            check_entry_name(name, entry)
            if isinstance(value, Tensor) and value.shape == blocks.get(entry):
                tensors[key] = value.detach()
            elif isinstance(value, Tensor) and (whole := logical.if_alike(p, value)) is not None:
                tensors[key] = whole
            else:
                others[key] = _check_small(value, key, logical.is_sharded(p), max_entry_bytes(logical.shape(p)))
    beside = {key: value for key, value in optimizer.state.items() if not isinstance(key, Tensor)}
    if len(beside) > MAX_BESIDE:
        raise TypeError(
            f"optimizer.state has {len(beside)} keys that are no parameters; a checkpoint holds up to {MAX_BESIDE}"
        )
    for entry, value in beside.items():
        key = BESIDE + _check_text(entry, "the optimizer's state")
        others[key] = _check_small(value, key, False, max_entry_bytes(()))
    return tensors, others


def _computed(name: str, p: Tensor, entries: Mapping[Any, Any], logical: Logical) -> dict[str, Computed]:
    """The tensors that a save computes for a parameter, by key: its master weight, and its momentum in float32 if the
    blocks of its 8-bit codes are not those of the whole row-major parameter."""
    found: dict[str, Computed] = {}
    remainder, codes, scale = (entries.get(entry) for entry in (REMAINDER, EXP_AVG, EXP_AVG_SCALE))
    if p.dtype == torch.bfloat16 and isinstance(remainder, Tensor) and remainder.dtype == torch.int16:
        shown = logical.if_alike(p, remainder)
        if shown is not None:
            found[MODEL + name] = MasterWeight(of_same_boxes(logical(p, p), shown), shown)
    if isinstance(codes, Tensor) and codes.dtype == torch.int8 and isinstance(scale, Tensor):
        shown = logical.if_alike(p, codes)
        if shown is not None and not has_whole_blocks(p, logical):
            runs = code_runs(parts_of(shown), parts_of(scale))
            found[STATE + name + "." + EXP_AVG] = DecodedMomentum(shown, runs)
    return found


def has_whole_blocks(p: Tensor, logical: Logical) -> bool:
    """Whether blocks of a parameter's 8-bit momentum are those of the whole parameter in row-major order, in which
    checkpoints hold codes and scales."""
    return not logical.is_sharded(p) and p.is_contiguous()


def max_entry_bytes(shape: Sequence[int]) -> int:
    """The size limit for a tensor in the state of a parameter of this shape, if the tensor has another shape."""
    return min(BLOCK_BYTES, max(1 << 16, 8 * prod(shape)))


def check_entry_name(name: str, entry: str) -> None:
    """Raises ValueError for an entry that only other optimizers have.

    Args:
        name: name of the parameter.
        entry: name of the entry of its state.
    """
    if entry in FOREIGN_ENTRIES:
        raise ValueError(
            f"the state of {name} has an entry {entry!r}, so it is another optimizer's and not Lion's: see "
            "lion_dist.checkpoint.convert for what can be converted"
        )


def _check_text(key: Any, where: str) -> str:
    if not isinstance(key, str):
        raise TypeError(f"{where} has an entry {key!r}; a checkpoint holds entries whose keys are strings")
    return key


def _check_small(value: Any, where: str, sharded: bool, limit: int) -> Any:
    if not isinstance(value, Tensor):
        to_json(value, where)  # raises TypeError for a value that cannot be saved
        return value
    if type(value) is not Tensor or (sharded and value.numel() > 1) or value.nbytes > limit:
        raise TypeError(
            f"{where} is a {type(value).__name__} of shape {tuple(value.shape)} and {value.nbytes} bytes, which a "
            "checkpoint cannot hold: a tensor in optimizer.state must have the shape of the parameter (where that is "
            f"sharded, of this rank's part of it), or be small (up to {limit} bytes here; one element where the "
            "parameter is sharded)"
        )
    return value.detach()
