"""A save, in the three parts that let most of it happen beside the training.

plan     who writes what; collective
stage    only of an asynchronous save: a copy on the CPU of what this rank will write, and of no more
write    bytes, checksums, manifest, rename; collective, on a group of its own if beside the training
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

from .folders import Run
from .ranks import Ranks, as_error
from .writer import Writer

ALIGNED = 64  # bytes

logger = logging.getLogger("lion_dist")


class _Planner(DefaultSavePlanner):
    """torch's, over a flat dict. ``staged``: copies to write, in place of the tensors themselves."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.staged: dict[MetadataIndex, Any] = {}

    def lookup_object(self, index: MetadataIndex) -> Any:
        return self.staged[index] if index in self.staged else super().lookup_object(index)

    def stage(self, items: list[WriteItem]) -> None:
        buffer = _buffer(sum(-(-_nbytes(item) // ALIGNED) * ALIGNED for item in items))
        at = 0
        for item in items:
            found = super().lookup_object(item.index)
            if item.type == WriteItemType.BYTE_IO:
                self.staged[item.index] = copy.deepcopy(found)
                continue
            place = buffer[at : at + found.nbytes].view(found.dtype).view(found.shape)
            self.staged[item.index] = place.copy_(found)
            at += -(-found.nbytes // ALIGNED) * ALIGNED
        self.state_dict = {}  # the training's own tensors are let go of


def _nbytes(item: WriteItem) -> int:
    if item.tensor_data is None:
        return 0
    return prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize


def _buffer(nbytes: int) -> Tensor:
    """All copies lie in one, which goes back to the system as a whole: many small ones would fragment the heap."""
    return torch.empty(nbytes, dtype=torch.uint8)


class Saving:
    """One save.

    Args:
        run: see `folders.Run`; that of the first rank counts.

    Attributes:
        what: the call, for messages.
        written, total: bytes that this rank has written, and will have.
    """

    def __init__(self, path: Path, state: dict[str, Any], ranks: Ranks, keep_last: int | None, run: Run) -> None:
        self.what = f"lion_dist.checkpoint.save({str(path)!r})"
        self._ranks = ranks
        self._planner = _Planner()
        self._writer = Writer(path, keep_last=keep_last, run=run, progress=self._count)
        self._lock = threading.Lock()
        self.written = self.total = 0
        self._metadata: Metadata | None = None
        self._plan: SavePlan = self._together(lambda: ranks.steps.reduce_scatter("plan", self._local(state), self._all))
        self.total = sum(map(_nbytes, self._plan.items))

    def _local(self, state: dict[str, Any]) -> Callable[[], SavePlan]:
        def plan() -> SavePlan:
            self._planner.set_up_planner(state, None, self._ranks.rank == 0)
            self._writer.set_up_storage_writer(self._ranks.rank == 0)
            return self._writer.prepare_local_plan(self._planner.create_local_plan())

        return plan

    def _all(self, plans: list[SavePlan]) -> list[SavePlan]:
        plans, self._metadata = self._planner.create_global_plan(plans)
        return self._writer.prepare_global_plan(plans)

    def stage(self) -> None:
        def copy_all() -> None:
            with torch.no_grad():
                self._planner.stage(self._plan.items)

        self._together(lambda: self._ranks.steps.all_gather("stage", copy_all))  # memory may run out on one rank

    def write(self, ranks: Ranks | None = None) -> None:
        """Until the checkpoint is there; with ``ranks`` on another group of theirs."""

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
        finally:  # whoever keeps a PendingSave does not keep what was saved
            self._planner = _Planner()

    def _together(self, step: Callable[[], Any]) -> Any:
        try:
            return step()
        except CheckpointException as error:
            self._writer.abandon()  # every rank has stopped writing, or there would be no such error
            raise as_error(error, self.what) from None
        except BaseException:  # such as of a collective: other ranks may still be writing, so nothing is removed
            self._writer.release()
            raise

    def _count(self, nbytes: int) -> None:
        with self._lock:
            self.written += nbytes


class PendingSave:
    """An asynchronous save that is under way.

    A failure is logged at ERROR on the logger "lion_dist" when it happens, whether or not `result` is called.

    The end of the interpreter waits for it, but not for one that hangs: where nothing has been written for as long as
    collectives of the ranks' process group wait, the process ends without it, and says so at ERROR.
    """

    def __init__(self, saving: Saving, ranks: Ranks) -> None:
        self._saving = saving
        self._future: Future[None] = Future()
        self._told = False
        self._process = os.getpid()
        name = "lion_dist.checkpoint.async_save"
        self._thread = threading.Thread(target=self._run, args=(ranks,), name=name, daemon=True)
        self._thread.start()
        # No daemon: what waits for it is the interpreter's end, also in processes of multiprocessing.
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
            elif time.monotonic() - since > timeout + 2:  # the group's own time-out says more
                logger.error(
                    "%s, asynchronous, has not ended, and has written nothing for %g s: the process ends without it, "
                    "and there is no checkpoint",
                    self._saving.what,
                    timeout,
                )
                return

    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._future.done()

    def progress(self) -> tuple[int, int]:
        """Bytes that this rank has written, and will have written."""
        return self._saving.written, self._saving.total

    def result(self, timeout: float | None = None) -> None:
        """Waits for its end; raises what went wrong, which is the same on every rank.

        Raises:
            TimeoutError: it has not ended within ``timeout`` seconds.
        """
        error = self._future.exception(timeout)
        if error is not None:
            self._told = True
            raise error

    def settle(self) -> None:
        """Waits for its end; raises what went wrong, if `result` has not told yet."""
        if self._process != os.getpid():
            return  # the thread is the parent's
        error = self._future.exception()
        if error is not None and not self._told:
            self.result()
