"""The public functions: save, async_save, load and read_extra."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from ..fsdp import reshard
from ..lion import Lion
from ..sharded_access import refuse_offloaded
from ..sharded_lion import ShardedLion
from .folders import Key, local_path
from .json_values import from_json
from .keys import EXTRA
from .loading import Loading
from .manifest import Manifest
from .names import Names
from .optimizer_state import check_optimizer, init_state, params_by_name, unwrapped
from .outgoing import Outgoing
from .ranks import Ranks, together
from .reader import Reader
from .runs import continue_run, run_of
from .saving import PendingSave, Saving
from .undo import remember
from .union import RankState, unite

OneOrSeveral: TypeAlias = Any  # an object with state_dict() and load_state_dict(), or a tuple or list of them
_running: PendingSave | None = None


def save(
    path: Key,
    model: nn.Module,
    optimizer: Optimizer | None = None,
    *,
    schedulers: OneOrSeveral = (),
    extra: Any = None,
    keep_last: int | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> None:
    """Saves a model's weights and its optimizer's state, by name and in the parameters' own shapes.

    A collective call. Each rank writes its own part, block by block, and the checkpoint appears by one rename once it
    is whole. The states of the random number generators of every rank are saved too: Python's, and torch's on the CPU
    and on the model's GPU.

    Independent jobs may save into one folder at the same time. If two save to one path, one of them raises.

    Args:
        path: The checkpoint's folder, on a file system that all ranks share. It must not exist.
        model: The model as it is trained, wrapped in DDP or FSDP or not at all; or this rank's part of it, such as a
            pipeline stage, with the names of the whole model. Buffers are saved from the first rank that has
            them.
        optimizer: `Lion` or `ShardedLion` over parameters of the model. Entries that other code keeps in its state are
            saved too. None saves only the model.
        schedulers: One object with a state_dict() of plain values, such as a scheduler, or a tuple or list of them.
        extra: Values that `load` returns, such as the step and the position in the data: None, numbers, strings, bytes,
            paths, lists, tuples, dicts, small tensors and small NumPy arrays. Those of the first rank are saved.
        keep_last: Number of checkpoints to keep. After the save, older checkpoints of the same run are removed from the
            folder, if their names differ from this one's only in the number at the end: with 2, step-400 keeps step-300
            and removes step-200, and best-7 stays. A run is everything that this optimizer or model has saved there,
            and what was saved there by the run that it was loaded from (as before a restart), and by the runs before
            that. Checkpoints of other jobs stay, also of a job that continued from the same checkpoint (both remove
            the common ones before it), and so do checkpoints that record no run; a warning on the logger "lion_dist"
            names some. A checkpoint that is being read stays until the next save. None keeps all.
        process_group: The group of all ranks that hold a part. None: the ShardedLion's group if its parameters are
            plain tensors, or else all ranks. Where each pipeline stage has a ShardedLion of its own, give the group of
            all stages.

    Raises:
        FileExistsError: There is something at ``path``.
        ValueError: Raised on every rank, as are the following, if any rank cannot save. There is no checkpoint then.
        TypeError: A value has a type that a checkpoint cannot hold.
        OSError: A file cannot be written.
    """
    with _on_gpu_of(model):
        saving, _ = _begin(path, model, optimizer, schedulers, extra, keep_last, process_group)
        saving.write()


def async_save(
    path: Key,
    model: nn.Module,
    optimizer: Optimizer | None = None,
    *,
    schedulers: OneOrSeveral = (),
    extra: Any = None,
    keep_last: int | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> PendingSave:
    """Saves as `save` does, in a thread beside the training.

    A collective call, which returns once each rank has copied what it will write to CPU memory; then parameters may be
    stepped. The first call makes a gloo group with the time-out of the ranks' own group.

    One save runs at a time: the call first waits for the one before, and raises its error if ``result()`` has not
    raised it. An error is also logged at ERROR on the logger "lion_dist" when it happens. Call ``result()`` on the last
    save before you destroy the process group. The end of the program waits for a save that makes progress; see
    `PendingSave`.

    Args:
        path: As for `save`.
        model: As for `save`.
        optimizer: As for `save`.
        schedulers: As for `save`.
        extra: As for `save`.
        keep_last: As for `save`.
        process_group: As for `save`.

    Returns:
        The save that is under way.

    Raises:
        FileExistsError: There is something at ``path``.
        ValueError: As for `save`, or an earlier save has failed.
        TypeError: As for `save`.
        OSError: As for `save`, or an earlier save has failed.
    """
    with _on_gpu_of(model):
        saving, writing_ranks = _begin(path, model, optimizer, schedulers, extra, keep_last, process_group, beside=True)
        saving.stage()
    global _running
    _running = PendingSave(saving, writing_ranks)
    return _running


def _begin(
    path: Key,
    model: nn.Module,
    optimizer: Optimizer | None,
    schedulers: OneOrSeveral,
    extra: Any,
    keep_last: int | None,
    process_group: dist.ProcessGroup | None,
    *,
    beside: bool = False,
) -> tuple[Saving, Ranks]:
    """Everything up to the plan of a save.

    Args:
        beside: whether a thread will write the checkpoint beside the training.

    Returns:
        The save, and the ranks on the process group that is to write it.
    """
    optimizer = unwrapped(optimizer)
    ranks = Ranks.of(optimizer, process_group)
    what = f"lion_dist.checkpoint.save({os.fspath(path)!r})"

    def check() -> tuple[Path, list[str]]:
        folder = local_path(path)
        global _running
        previous, _running = _running, None
        if previous is not None:
            previous.settle()
        _check_inputs(model, optimizer)
        return folder, [f"path {os.fspath(path)!r}, keep_last {keep_last}"]

    folder = ranks.agree("lion_dist.checkpoint.save()", check)
    init_state(what, optimizer, ranks)
    outgoing: list[Outgoing] = []

    def describe() -> RankState:
        outgoing.append(Outgoing(model, optimizer, _as_list(schedulers), extra, ranks))
        return outgoing[0].rank_state

    share = together(what, lambda: ranks.steps.reduce_scatter("gather names", describe, unite))
    writing_ranks = ranks.on_gloo() if beside else ranks
    run = run_of(_owners(model, optimizer), folder)
    return Saving(folder, outgoing[0].state(share), ranks, keep_last, run), writing_ranks


def read_extra(path: Key) -> Any:
    """Reads the ``extra`` of a checkpoint, and nothing else of it. Not a collective call.

    Args:
        path: The checkpoint's folder.

    Returns:
        The ``extra`` that was given to `save`.

    Raises:
        FileNotFoundError: There is no checkpoint at ``path``.
        ValueError: The checkpoint is damaged.
    """
    return from_json(Manifest.read(Path(path)).objects.get(EXTRA))


def load(
    path: Key,
    model: nn.Module,
    optimizer: Optimizer | None = None,
    *,
    schedulers: OneOrSeveral = (),
    cast: bool = False,
    process_group: dist.ProcessGroup | None = None,
) -> Any:
    """Loads what `save` saved, under any strategy and any number of ranks, into existing tensors.

    A collective call. Everything is verified first, and whatever may fail is tried: if anything is wrong on any rank,
    the call raises and nothing has been changed. There is one exception: if files that were just verified can no longer
    be read, the error says what has been changed. If the optimizer has hooks on load_state_dict, which may raise at the
    very end, a copy of this rank's part is kept until they have run, and put back if one raises.

    The checkpoint must hold what the models, optimizers and schedulers of all ranks together have, and nothing else:
    the same names, shapes, dtypes and parameter groups. Groups may come in another order, and take the checkpoint's
    values, such as lr. The momentum of a parameter that is frozen here is loaded if the checkpoint holds one. The
    momentum of a parameter that is trained here and was frozen when it was saved starts at zero, with a warning.

    Whether weights have remainders (master_weights) and whether momenta have 8 bits stays as it is in this optimizer:
    master weights are saved in float32, and float32 weights and master weights are loaded into each other exactly;
    8-bit momenta and others are converted into each other.

    Random number generators are set only if as many ranks load as saved.

    Args:
        path: The checkpoint's folder.
        model: The model to load into, wrapped as it is trained; or this rank's part of it.
        optimizer: `Lion` or `ShardedLion` over parameters of the model. None loads only the weights, and ignores what
            else the checkpoint holds.
        schedulers: As many schedulers, in the same order, as were saved.
        cast: Convert tensors that were saved in another dtype to the dtype of the model or momentum here. Master
            weights are loaded into bfloat16 parameters without a remainder only so; these are then the bfloat16
            weights of the run that was saved.
        process_group: As for `save`.

    Returns:
        The ``extra`` that was given to `save`.

    Raises:
        FileNotFoundError: There is no checkpoint at ``path``.
        ValueError: Raised on every rank, if the checkpoint is damaged or does not fit on any rank.
        TypeError: The optimizer is neither `Lion` nor `ShardedLion`, or the model has tensors that are not dense.
    """
    optimizer = unwrapped(optimizer)
    ranks = Ranks.of(optimizer, process_group)
    what = f"lion_dist.checkpoint.load({os.fspath(path)!r})"

    def check() -> tuple[Reader, list[str]]:
        if isinstance(optimizer, ShardedLion):
            refuse_offloaded(optimizer, "lion_dist.checkpoint.load()")
        reader = Reader(path, cast=cast)
        reader.open()
        _check_inputs(model, optimizer)
        return reader, [f"path {os.fspath(path)!r}", f"manifest {reader.digest}"]

    reader = ranks.agree("lion_dist.checkpoint.load()", check)
    with _on_gpu_of(model), ExitStack() as undo:
        undo.callback(reader.close)
        if isinstance(optimizer, Lion):  # before `init_state`, which makes its missing state
            remember(undo, optimizer)
        init_state(what, optimizer, ranks)
        if isinstance(optimizer, ShardedLion):  # after `init_state`, which may replace its shards; the new ones stay
            remember(undo, optimizer)
        extra = Loading(what, reader, model, optimizer, _as_list(schedulers), cast, ranks, undo).run()
        continue_run(_owners(model, optimizer), local_path(path), reader.manifest.objects)
        undo.pop_all()
        reader.close()
    return extra


@contextmanager
def _on_gpu_of(model: nn.Module) -> Iterator[None]:
    """Makes the GPU of a model's parameters the current one, if they are on a GPU. Over NCCL torch exchanges objects on
    the current GPU, which must be another one for each rank, and it is the current GPU's generator that is saved."""
    params = model.parameters() if isinstance(model, nn.Module) else ()
    gpu = next((p.device for p in params if p.is_cuda), None)
    with nullcontext() if gpu is None else torch.cuda.device(gpu):
        yield


def _check_inputs(model: nn.Module, optimizer: Optimizer | None) -> None:
    """Raises TypeError or ValueError for an optimizer that cannot be saved or loaded together with the model."""
    reshard(model)
    check_optimizer(optimizer)
    if optimizer is not None:
        params_by_name(optimizer, Names.read(model))


def _owners(model: nn.Module, optimizer: Optimizer | None) -> list[object]:
    """The objects that a run is recorded for; see `runs.run_of`."""
    return [model] if optimizer is None else [optimizer, model]


def _as_list(schedulers: OneOrSeveral) -> Sequence[Any]:
    return list(schedulers) if isinstance(schedulers, (list, tuple)) else [schedulers]
