"""save, async_save and load; see the package."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import LoadPlan
from torch.optim import Optimizer

from ..fsdp import reshard
from ..sharded_lion import ShardedLion
from .folders import RUN, Key, continue_run, local_path, run_of
from .incoming import EXTRA, RANKS, SCHEDULER, Incoming, generators
from .manifest import Manifest
from .named import GROUPS, Logical, Names, groups_by_name, model_tensors, momenta
from .plain import from_plain
from .ranks import Ranks, as_error
from .reader import Reader
from .saving import PendingSave, Saving

_running: PendingSave | None = None


def save(
    path: Key,
    model: nn.Module,
    optimizer: Optimizer | None = None,
    *,
    schedulers: Any = (),
    extra: Any = None,
    keep_last: int | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> None:
    """Saves a model's weights and its optimizer's state under their names and in their own shapes, whatever shards
    them; a collective call. Each rank writes its own part, block by block, and the whole appears by one rename.

    Args:
        path: the checkpoint's folder, on a file system that all ranks share. It must not exist.
        model: as it is trained, wrapped in DDP or FSDP or not at all. Buffers are those of the first rank.
        optimizer: `Lion` or `ShardedLion`, of parameters of the model; None: only the model is saved.
        schedulers: one, or several in a tuple or list: whatever has a state_dict of plain values.
        extra: plain values (numbers, strings, lists, tuples, dicts, small tensors) that `load` returns, those of the
            first rank: the step, a place in the data.
        keep_last: removes, once the new one is there, the checkpoints of the same run in the same folder whose names
            differ from its in the number at the end, but this many: those of the largest numbers (step-300 and
            step-200, not step-100; best-7 stays). None: keeps all. A run is what this optimizer (without one: this
            model) has saved there under such names, and what was there when it was loaded from there, before a restart:
            other jobs' checkpoints stay, as do those of versions that recorded no run. One that somebody reads stays
            until the next save.
        process_group: of all ranks that hold a part; None: ShardedLion's group, else all ranks.

    Random number generators are saved too: torch's on the CPU and the current GPU and Python's, of every rank.

    Jobs that know nothing of each other may save into one folder at the same time. Of two that save to one path one
    raises.

    Raises:
        FileExistsError: there is something at ``path``.
        ValueError, TypeError, OSError: on every rank, where any of them cannot save. There is no checkpoint then.
    """
    saving, _ = _begin(path, model, optimizer, schedulers, extra, keep_last, process_group)
    saving.write()


def async_save(
    path: Key,
    model: nn.Module,
    optimizer: Optimizer | None = None,
    *,
    schedulers: Any = (),
    extra: Any = None,
    keep_last: int | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> PendingSave:
    """`save`, in a thread beside the training. Returns once each rank has copied what it will write to its CPU's
    memory, so that parameters may be stepped; a collective call, as is the first one's making of a gloo group, with the
    time-out of the ranks' own.

    One at a time: a save before it is waited for, and if it failed and its ``result()`` has not said so, it is said
    here. A failure is logged at ERROR on the logger "lion_dist" when it happens. Call ``result()`` on the last one
    before the process group is destroyed. The end of the program waits for a save as long as it gets on: see
    `PendingSave`.
    """
    saving, beside = _begin(path, model, optimizer, schedulers, extra, keep_last, process_group, beside=True)
    saving.stage()
    global _running
    _running = PendingSave(saving, beside)
    return _running


def _begin(
    path: Key,
    model: nn.Module,
    optimizer: Optimizer | None,
    schedulers: Any,
    extra: Any,
    keep_last: int | None,
    process_group: dist.ProcessGroup | None,
    *,
    beside: bool = False,
) -> tuple[Saving, Ranks]:
    """The save, and the ranks on the group that is to write it: one of its own ``beside`` the training."""
    global _running
    ranks = Ranks.of(optimizer, process_group)
    with ranks.agreeing("lion_dist.checkpoint.save()") as agreement:
        folder = local_path(path)
        previous, _running = _running, None
        if previous is not None:
            previous.settle()
        state = _to_save(model, optimizer, _as_list(schedulers), extra, ranks)
        if agreement is not None:
            agreement.says([f"path {os.fspath(path)!r}, keep_last {keep_last}"])
    writing = ranks.on_gloo() if beside else ranks
    run = run_of(model if optimizer is None else optimizer, folder)
    return Saving(folder, state, ranks, keep_last, run), writing


def _as_list(schedulers: Any) -> list[Any]:
    return list(schedulers) if isinstance(schedulers, (list, tuple)) else [schedulers]


def _to_save(
    model: nn.Module, optimizer: Optimizer | None, schedulers: Sequence[Any], extra: Any, ranks: Ranks
) -> dict[str, Any]:
    """By key; what every rank gives alike is written by one of them."""
    reshard(model)
    names, logical = Names.read(model), Logical(model)
    first = ranks.rank == 0
    state: dict[str, Any] = {
        key: t for key, t, is_buffer in model_tensors(model, names, logical) if first or not is_buffer
    }
    if optimizer is not None:
        if isinstance(optimizer, ShardedLion):
            optimizer.state_dict()  # raises where the last steps were not the same on all ranks
        state.update(momenta(optimizer, names, logical))
    if first:
        for i, group in enumerate(groups_by_name(optimizer, names) if optimizer is not None else []):
            state.update({f"{GROUPS}{i}.{key}": value for key, value in group.items()})
        for i, scheduler in enumerate(schedulers):
            state[f"{SCHEDULER}{i}"] = scheduler.state_dict()
        state[EXTRA], state[RANKS] = extra, ranks.size
    state.update(generators(ranks.rank))
    return state


def read_extra(path: Key) -> Any:
    """The ``extra`` of `save`, of a checkpoint that is there, and nothing else of it; not a collective call.

    Raises:
        FileNotFoundError, ValueError: as `load`.
    """
    return from_plain(Manifest.read(Path(path)).objects.get(EXTRA))


def load(
    path: Key,
    model: nn.Module,
    optimizer: Optimizer | None = None,
    *,
    schedulers: Any = (),
    cast: bool = False,
    process_group: dist.ProcessGroup | None = None,
) -> Any:
    """Loads what `save` saved, under any strategy and number of ranks, into the tensors that are there; a collective
    call. All of it is read and verified first: where anything is wrong on any rank, nothing has been changed.

    What the checkpoint has and what the model, the optimizer and the schedulers have must be the same: names, shapes,
    dtypes, parameter groups (in any order). The groups' values, such as lr, are those of the checkpoint.

    Args:
        optimizer: None: the weights alone are loaded, and what else there is in the checkpoint is left.
        cast: convert tensors that were saved in another dtype into that of the model or momentum here.
        process_group: as for `save`.

    Random number generators are set only if as many ranks load as saved.

    Returns:
        The ``extra`` of `save`.

    Raises:
        FileNotFoundError: there is no checkpoint at ``path``.
        ValueError, TypeError: on every rank, where it is damaged or does not fit on any.
    """
    ranks = Ranks.of(optimizer, process_group)
    with ranks.agreeing("lion_dist.checkpoint.load()") as agreement:
        reader = Reader(path, cast=cast)
        reshard(model)
        incoming = Incoming(reader, model, optimizer, _as_list(schedulers), cast, ranks)
        if agreement is not None:
            agreement.says([f"path {os.fspath(path)!r}", f"manifest {reader.digest}"])
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)

    def plan() -> LoadPlan:
        planner.set_up_planner(incoming.tensors, reader.read_metadata(), ranks.rank == 0)
        return reader.prepare_local_plan(planner.create_local_plan())  # verifies what this rank will read

    try:
        final = ranks.steps.reduce_scatter("plan", plan, planner.create_global_plan)
        with torch.no_grad():
            ranks.steps.all_gather("read", lambda: reader.read_data(final, planner).wait())
    except CheckpointException as error:
        raise as_error(error, f"lion_dist.checkpoint.load({os.fspath(path)!r})") from None
    incoming.apply()
    run = reader.manifest.objects.get(RUN)
    continue_run(model if optimizer is None else optimizer, local_path(path), run)
    return incoming.extra
