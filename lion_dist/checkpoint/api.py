"""save, async_save and load; see the package."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import LoadPlan
from torch.optim import Optimizer

from ..fsdp import reshard
from ..lion import Lion
from ..sharded_lion import ShardedLion
from .folders import Key, continue_run, local_path, run_of
from .incoming import EXTRA, Incoming, check_claimed
from .manifest import Manifest
from .named import Names, check_optimizer, parameters, unwrapped
from .outgoing import Outgoing
from .plain import from_plain
from .ranks import Ranks, as_error
from .reader import Reader
from .saving import PendingSave, Saving
from .undo import remember
from .union import RankState, unite

T = TypeVar("T")
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
        model: as it is trained, wrapped in DDP or FSDP or not at all, or this rank's part of it, such as a stage of a
            pipeline, with the names of the whole. Buffers are those of the first rank that has them.
        optimizer: `Lion` or `ShardedLion`, of parameters of the model; None: only the model is saved. Entries that
            others keep in its state are saved too.
        schedulers: one, or several in a tuple or list: whatever has a state_dict of plain values.
        extra: plain values (numbers, strings, bytes, paths, lists, tuples, dicts, small tensors and NumPy arrays) that
            `load` returns, those of the first rank: the step, a place in the data.
        keep_last: removes, once the new one is there, the checkpoints of the same run in the same folder whose names
            differ from its in the number at the end, but this many: those of the largest numbers (step-300 and
            step-200, not step-100; best-7 stays). None: keeps all. A run is what this optimizer or this model has
            saved there, and what was saved there by the run that it was loaded from, as before a restart, and by those
            before that. Other jobs' checkpoints stay, also those of another job that went on from the same checkpoint
            (both remove the common ones before it), and those of versions that recorded no run; a warning on the
            logger "lion_dist" names some. One that somebody reads stays until the next save.
        process_group: of all ranks that hold a part; None: ShardedLion's group, else all ranks. Where each stage of a
            pipeline has a ShardedLion of its own, give the group of all stages.

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
    optimizer = unwrapped(optimizer)
    ranks = Ranks.of(optimizer, process_group)
    with ranks.agreeing("lion_dist.checkpoint.save()") as agreement:
        folder = local_path(path)
        previous, _running = _running, None
        if previous is not None:
            previous.settle()
        _check(model, optimizer)
        if agreement is not None:
            agreement.says([f"path {os.fspath(path)!r}, keep_last {keep_last}"])
    _init_state("save", path, optimizer, ranks)
    outgoing: list[Outgoing] = []

    def hold() -> RankState:
        outgoing.append(Outgoing(model, optimizer, _as_list(schedulers), extra, ranks))
        return outgoing[0].held

    share = _together("save", path, lambda: ranks.steps.reduce_scatter("gather names", hold, unite))
    writing = ranks.on_gloo() if beside else ranks
    run = run_of([model] if optimizer is None else [optimizer, model], folder)
    return Saving(folder, outgoing[0].state(share), ranks, keep_last, run), writing


def _together(call: str, path: Key, step: Callable[[], T]) -> T:
    """Runs a collective step. Where it fails on any rank, every rank raises the same."""
    try:
        return step()
    except CheckpointException as error:
        raise as_error(error, f"lion_dist.checkpoint.{call}({os.fspath(path)!r})") from None


def _check(model: nn.Module, optimizer: Optimizer | None) -> None:
    """Raises TypeError or ValueError for what is wrong before anything is compared."""
    reshard(model)
    check_optimizer(optimizer)
    if optimizer is not None:
        parameters(optimizer, Names.read(model))


def _init_state(call: str, path: Key, optimizer: Optimizer | None, ranks: Ranks) -> None:
    """Makes the state that the next step would make, of parameters that were unfrozen since the last one. Before, it
    makes sure that no rank of a ShardedLion's group would wait for one that has been given no optimizer."""

    def group() -> tuple[int, list[int]]:
        if ranks.group is None:
            return 0, []
        of = optimizer.process_group if isinstance(optimizer, ShardedLion) else None
        return dist.get_rank(), [] if of is None else dist.get_process_group_ranks(of)

    _together(call, path, lambda: ranks.steps.all_reduce("groups", group, _check_groups))

    def init() -> None:
        if isinstance(optimizer, (Lion, ShardedLion)):
            optimizer.init_state()  # of a ShardedLion a collective call of its own group, so not within an Agreement

    _together(call, path, lambda: ranks.steps.all_gather("init state", init))


def _check_groups(ranks: list[tuple[int, list[int]]]) -> None:
    """
    Args:
        ranks: of each rank, its number and the ranks of its ShardedLion's group, or none.

    Raises:
        ValueError: a ShardedLion is not given on all ranks of its group.
    """
    given = dict(ranks)
    for rank, group in ranks:
        lacking = [other for other in group if given.get(other) != group]
        if lacking:
            raise ValueError(
                f"the ShardedLion of rank {rank} is that of ranks {group}, but ranks {lacking} have not been given it: "
                "give the same optimizer on every rank of its group, or on none of them"
            )


def _as_list(schedulers: Any) -> list[Any]:
    return list(schedulers) if isinstance(schedulers, (list, tuple)) else [schedulers]


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
    call. All of it is read and verified first, and whatever may fail is tried: where anything is wrong on any rank,
    nothing has been changed. (If files that have just been verified can no longer be read, the error says so, and what
    has been changed. If the optimizer has hooks on load_state_dict, a copy of this rank's part is kept until they have
    run, and put back if one raises.)

    What the checkpoint has and what the models, the optimizers and the schedulers of all ranks together have must be
    the same: names, shapes, dtypes, parameter groups (in any order; see `named.match_groups`). The groups' values, such
    as lr, are those of the checkpoint. The momentum of a parameter that is frozen here is loaded if there is one. The
    momentum of a parameter that is trained here and was frozen when the checkpoint was saved starts at zero, with a
    warning.

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
    optimizer = unwrapped(optimizer)
    ranks = Ranks.of(optimizer, process_group)
    with ranks.agreeing("lion_dist.checkpoint.load()") as agreement:
        reader = Reader(path, cast=cast)
        reader.manifest  # noqa: B018  reads and checks it
        _check(model, optimizer)
        if agreement is not None:
            agreement.says([f"path {os.fspath(path)!r}", f"manifest {reader.digest}"])
    with ExitStack() as undo:
        undo.callback(reader.close)
        if isinstance(optimizer, Lion):  # whose state may be made only now
            remember(undo, optimizer)
        _init_state("load", path, optimizer, ranks)
        if isinstance(optimizer, ShardedLion):  # which keeps the shards that it has now
            remember(undo, optimizer)
        extra = _load(reader, model, optimizer, _as_list(schedulers), cast, ranks, undo, path)
        undo.pop_all()
        reader.close()
    return extra


def _load(
    reader: Reader,
    model: nn.Module,
    optimizer: Optimizer | None,
    schedulers: Sequence[Any],
    cast: bool,
    ranks: Ranks,
    undo: ExitStack,
    path: Key,
) -> Any:
    """In steps, each of which every rank has done before any begins the next. ``undo`` puts back all that they have
    changed but the tensors, which are read last."""
    found: list[Incoming] = []
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)

    def compare() -> tuple[set[str], bool]:
        found.append(Incoming(reader, model, optimizer, schedulers, cast, ranks))
        return found[0].unclaimed, found[0].hooked

    def claimed(of_ranks: list[tuple[set[str], bool]]) -> bool:
        check_claimed([unclaimed for unclaimed, _ in of_ranks])
        return any(hooked for _, hooked in of_ranks)

    def plan() -> LoadPlan:
        planner.set_up_planner(incoming.tensors, reader.read_metadata(), ranks.rank == 0)
        return reader.prepare_local_plan(planner.create_local_plan())  # verifies what this rank will read

    def tell(step: Callable[[], Any], how: str) -> None:
        """Runs a step that changes tensors; its error says so if there is no copy to put back."""
        try:
            step()
        except Exception as error:
            if hooked:
                raise
            raise (ValueError if isinstance(error, (OSError, ValueError)) else RuntimeError)(
                f"{error}. The checkpoint was whole when it was verified just before. Weights and momenta are {how} "
                "those of the checkpoint now, and all else is as it was: load a checkpoint before going on"
            ) from error

    def read() -> None:
        tell(lambda: reader.read_data(final, planner).wait(), "in part")

    def apply() -> None:
        tell(incoming.apply, "all")

    steps = ranks.steps
    hooked = _together("load", path, lambda: steps.all_reduce("compare", compare, claimed))
    incoming = found[0]
    with torch.no_grad():
        _together("load", path, lambda: steps.all_gather("make room", lambda: incoming.make_room(undo)))
        final = _together("load", path, lambda: steps.reduce_scatter("plan", plan, planner.create_global_plan))
        _together("load", path, lambda: steps.all_gather("try out", lambda: incoming.try_out(undo, hooked)))
        _together("load", path, lambda: steps.all_gather("read", read))
    _together("load", path, lambda: steps.all_gather("apply", apply))
    incoming.finish()
    continue_run([model] if optimizer is None else [optimizer, model], local_path(path), reader.manifest.objects)
    return incoming.extra
