"""A save, in three parts, of which all but the first can happen beside the training.

plan     who writes what; collective
stage    only for an asynchronous save: copies to the CPU what this rank will write, and no more
write    bytes, checksums, manifest, rename; collective, on a process group of its own if beside the training
"""

from __future__ import annotations

import copy
import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from .blocks import copy_elements
from .computed import Computed, ComputedPart
from .ranks import Ranks, as_error
from .runs import Run
from .writer import Writer

_ALIGN = 64  # bytes

logger = logging.getLogger("lion_dist")


class _Planner(DefaultSavePlanner):
    """torch's planner for a flat dict.

    Attributes:
        staged: copies to write in place of the tensors and values themselves.
    """

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.staged: dict[MetadataIndex, Any] = {}

    def lookup_object(self, index: MetadataIndex) -> Any:
        if index in self.staged:
            return self.staged[index]
        value = self.state_dict.get(index.fqn)
        return value.part(index) if isinstance(value, Computed) else super().lookup_object(index)

    def stage(self, items: list[WriteItem]) -> None:
        """Copies or computes what these items refer to, and drops the references to the training's tensors."""
        buffer = _buffer(sum(-(-_nbytes(item) // _ALIGN) * _ALIGN for item in items))
        at = 0
        for item in items:
            found = self.lookup_object(item.index)
            if item.type == WriteItemType.BYTE_IO:
                self.staged[item.index] = copy.deepcopy(found)
                continue
            place = buffer[at : at + found.nbytes].view(found.dtype).view(found.shape)
            if isinstance(found, ComputedPart):
                copy_elements(found, 0, place.view(-1))
            else:
                place.copy_(found)
            self.staged[item.index] = place
            at += -(-found.nbytes // _ALIGN) * _ALIGN
        self.state_dict = {}


def _nbytes(item: WriteItem) -> int:
    if item.tensor_data is None:
        return 0
    return prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize


def _buffer(nbytes: int) -> Tensor:
    """Memory for all copies. One large allocation goes back to the system as a whole; many small ones would fragment
    the heap."""
    return torch.empty(nbytes, dtype=torch.uint8, device="cpu")


class Saving:
    """One save.

    Args:
        path: the checkpoint's folder.
        state: what this rank saves, by key.
        ranks: the ranks that save.
        keep_last: as in `lion_dist.checkpoint.save`.
        run: the run that the checkpoint belongs to; that of the first rank counts.

    Attributes:
        what: the call, for messages.
        written, total: number of bytes that this rank has written, and will have written at the end.
    """

    def __init__(self, path: Path, state: dict[str, Any], ranks: Ranks, keep_last: int | None, run: Run) -> None:
        self.what = f"lion_dist.checkpoint.save({str(path)!r})"
        self._ranks = ranks
        self._planner = _Planner()
        self._writer = Writer(path, keep_last=keep_last, run=run, progress=self._count)
        self._lock = threading.Lock()
        self.written = self.total = 0
        self._metadata: Metadata | None = None

        def plan() -> SavePlan:
            self._planner.set_up_planner(state, None, ranks.rank == 0)
            self._writer.set_up_storage_writer(ranks.rank == 0)
            return self._writer.prepare_local_plan(self._planner.create_local_plan())

        self._plan: SavePlan = self._together(lambda: ranks.steps.reduce_scatter("plan", plan, self._plan_of_all))
        self.total = sum(map(_nbytes, self._plan.items))

    def _plan_of_all(self, plans: list[SavePlan]) -> list[SavePlan]:
        plans, self._metadata = self._planner.create_global_plan(plans)
        return self._writer.prepare_global_plan(plans)

    def stage(self) -> None:
        """Copies what this rank will write to the CPU. A collective call, because memory may run out on one rank."""

        def copy_all() -> None:
            with torch.no_grad():
                self._planner.stage(self._plan.items)

        self._together(lambda: self._ranks.steps.all_gather("stage", copy_all))

    def write(self, ranks: Ranks | None = None) -> None:
        """Writes the checkpoint; when it returns, the checkpoint exists. A collective call.

        Args:
            ranks: the same ranks on another process group; None: as given to the constructor.
        """

        def local() -> list[WriteResult]:
            plan = self._planner.finish_plan(self._plan)
            results: list[WriteResult] = self._writer.write_data(plan, self._planner).wait()
            return results

        def finish(results: list[list[WriteResult]]) -> None:
            assert self._metadata is not None
            self._writer.finish(self._metadata, results)

        steps = (ranks or self._ranks).steps
        try:
            self._together(lambda: steps.all_reduce("write", local, finish))
        finally:  # so that a PendingSave that is kept does not keep the tensors
            self._planner = _Planner()

    def _together(self, step: Callable[[], Any]) -> Any:
        try:
            return step()
        except CheckpointException as error:
            self._writer.abandon()  # this error means that every rank has stopped writing
            raise as_error(error, self.what) from None
        except BaseException:  # a collective has failed: other ranks may still be writing, so nothing is removed
            self._writer.release()
            raise

    def _count(self, nbytes: int) -> None:
        with self._lock:
            self.written += nbytes


class PendingSave:
    """An asynchronous save that is under way, returned by `async_save`.

    A failure is logged at ERROR on the logger "lion_dist" when it happens, whether or not `result` is called.

    The end of the interpreter waits for the save, but not for one that hangs: if this rank has written nothing for as
    long as collectives of its process group wait, the process ends without it and logs that at ERROR.
    """

    def __init__(self, saving: Saving, ranks: Ranks) -> None:
        self._saving = saving
        self._future: Future[None] = Future()
        self._raised = False
        self._process = os.getpid()
        name = "lion_dist.checkpoint.async_save"
        self._thread = threading.Thread(target=self._run, args=(ranks,), name=name, daemon=True)
        self._thread.start()
        # This thread is no daemon: the interpreter's end waits for it, also in processes of multiprocessing.
        threading.Thread(target=self._hold_exit, args=(ranks.timeout.total_seconds(),), name=f"{name}.exit").start()

    def _run(self, ranks: Ranks) -> None:
        try:
            self._saving.write(ranks)
        except BaseException as error:
            logger.error("%s, asynchronous, has failed, and there is no checkpoint: %s", self._saving.what, error)
            ranks.forget_gloo()
            self._future.set_exception(error)
        else:
            self._future.set_result(None)

    def _hold_exit(self, timeout: float) -> None:
        main, written, since = threading.main_thread(), -1, 0.0
        while self._thread.is_alive():
            self._thread.join(1.0)
            if main.is_alive() or self._saving.written != written:
                written, since = self._saving.written, time.monotonic()
            elif time.monotonic() - since > timeout + 2:  # the group's own time-out, whose error says more, comes first
                logger.error(
                    "%s, asynchronous, has not ended, and has written nothing for %g s: the process ends without it, "
                    "and there is no checkpoint",
                    self._saving.what,
                    timeout,
                )
                return

    def done(self) -> bool:
        """Whether the save has ended, with or without an error."""
        return self._future.done()

    def progress(self) -> tuple[int, int]:
        """Number of bytes that this rank has written, and that it will have written at the end."""
        return self._saving.written, self._saving.total

    def result(self, timeout: float | None = None) -> None:
        """Waits until the save has ended, and raises its error, if any. All ranks raise the same error.

        Args:
            timeout: seconds to wait at most; None: no limit.

        Raises:
            TimeoutError: the save has not ended within ``timeout`` seconds.
            ValueError, TypeError, OSError: the save has failed, and there is no checkpoint.
        """
        error = self._future.exception(timeout)
        if error is not None:
            self._raised = True
            raise error

    def settle(self) -> None:
        """Waits until the save has ended, and raises its error, unless `result` has raised it before."""
        if self._process != os.getpid():
            return  # this process was forked, and the thread is its parent's
        error = self._future.exception()
        if error is not None and not self._raised:
            self.result()
