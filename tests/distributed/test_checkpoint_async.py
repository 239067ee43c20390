"""Saves beside the training: their process group, their failures, and the end of the program."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch import nn

from lion_dist import Lion, ShardedLion, checkpoint
from lion_dist.checkpoint import ranks, writer
from lion_dist.checkpoint.files import write_block
from lion_dist.sharding.collectives import group_timeout
from tests.harness import processes, run_ranks, spawn_only

SHORT = timedelta(seconds=4)  # a time-out that is waited for


class Records(logging.Handler):
    """Records that lion_dist logs at ERROR."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.said: list[str] = []
        logging.getLogger("lion_dist").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def body_group(rank: int, world_size: int, folder: Path) -> None:
    records = Records()
    model = nn.Linear(50, 50)
    optimizer = ShardedLion(model.named_parameters())

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError("no network device")

    # A rank that fails alone before the group is made: the others hear of it at once.
    device = dist.ProcessGroupGloo.create_default_device
    if rank == 1:
        dist.ProcessGroupGloo.create_default_device = fail
    with pytest.raises(OSError, match=r"no network device \(on ranks \[1\]\)"):
        checkpoint.async_save(folder / "step-1", model, optimizer)
    dist.ProcessGroupGloo.create_default_device = device
    assert not folder.exists()
    assert not ranks._gloo_groups

    # Its time-out is the training's; it is made once.
    timeouts = [SHORT, timedelta(seconds=33)]
    training = [dist.new_group(timeout=timeout) for timeout in timeouts]
    for _ in range(2):
        for k, group in enumerate(training):
            checkpoint.async_save(folder / f"{k}-1", model, optimizer, process_group=group).result()
        assert [group_timeout(group) for group in ranks._gloo_groups.values()] == timeouts
        dist.barrier()
        if rank == 0:
            shutil.rmtree(folder)
        dist.barrier()

    # A rank hangs in its writing: the others' saves end with the time-out, without a result() it is logged, and the
    # next save works.
    goes_on, write = threading.Event(), writer.Writer._write

    def hang(*args: Any) -> Any:
        goes_on.wait(100)
        return write(*args)

    if rank == 1:
        setattr(writer.Writer, "_write", hang)  # noqa: B010
    pending = checkpoint.async_save(folder / "step-1", model, optimizer, process_group=training[0])
    if rank == 0:
        pending._thread.join(60)
        assert pending.done()
    dist.barrier()
    goes_on.set()
    pending._thread.join()
    assert len(records.said) == 1
    assert "step-1" in records.said[0]
    assert "asynchronous, has failed" in records.said[0]
    writer.Writer._write = write
    with pytest.raises(RuntimeError):
        checkpoint.async_save(folder / "step-2", model, optimizer, process_group=training[0])  # it is said here
    checkpoint.async_save(folder / "step-1", model, optimizer, process_group=training[0]).result()
    checkpoint.load(folder / "step-1", model, optimizer)
    assert [path.name for path in folder.iterdir()] == ["step-1"]  # what the failed save left is swept

    # One that fails alone while the group is made: the others wait no longer than for any collective.
    ranks._gloo_groups.clear()
    dist.barrier()
    if rank == 1:
        dist.new_group = fail
    began = time.monotonic()
    with pytest.raises((OSError, RuntimeError)):
        checkpoint.async_save(folder / "step-2", model, optimizer, process_group=training[0])
    assert time.monotonic() - began < 60
    assert [path.name for path in folder.iterdir()] == ["step-1"]
    assert not ranks._gloo_groups


def test_the_group_of_asynchronous_saves(tmp_path: Path) -> None:
    run_ranks(body_group, 2, tmp_path, (tmp_path / "runs",), timeout=timedelta(seconds=120), on_cpu=True)


def body_victim(rank: int, world_size: int, folder: Path) -> None:
    """The folder vanishes while it is being written: every rank says so."""
    model = nn.Linear(50, 50)
    optimizer = ShardedLion(model.named_parameters())
    write = writer.Writer._write

    def lose(self: writer.Writer, path: Path, *args: Any) -> Any:
        dist.barrier()
        if rank == 0:
            path.parent.rename(folder / "elsewhere")
        dist.barrier()
        return write(self, path, *args)

    setattr(writer.Writer, "_write", lose)  # noqa: B010
    with pytest.raises(FileNotFoundError, match=r"is not there, though it is being saved.*\(on ranks \[0, 1\]\)"):
        checkpoint.save(folder / "step-1", model, optimizer)
    assert [path.name for path in folder.iterdir()] == ["elsewhere"]


def test_every_rank_raises_if_the_folder_vanished(tmp_path: Path) -> None:
    run_ranks(body_victim, 2, tmp_path, (tmp_path / "runs",), on_cpu=True)


# The end of the program -----------------------------------------------------------------------------


def leave_at_once(folder: Path, hangs: bool, log: Path) -> None:
    """Ends while its save is held back: for a while, or for good."""
    logging.getLogger("lion_dist").addHandler(logging.FileHandler(log))
    model = nn.Linear(50, 50)
    optimizer = Lion(model.parameters())
    optimizer.init_state()
    main = threading.main_thread()
    vars(ranks)["default_pg_timeout"] = timedelta(seconds=1 if hangs else 60)

    def held_back(*args: Any) -> None:
        main.join()
        if hangs:
            threading.Event().wait()
        write_block(*args)

    vars(writer)["write_block"] = held_back
    checkpoint.async_save(folder / "step-1", model, optimizer)


def assert_saved(path: Path) -> None:
    model = nn.Linear(50, 50)
    checkpoint.load(path, model, Lion(model.parameters()))


@spawn_only
def test_the_program_waits_for_its_save_but_not_for_one_that_hangs(tmp_path: Path) -> None:
    outcomes = [(tmp_path / kind, kind == "hangs", tmp_path / f"{kind}.log") for kind in ("ends", "hangs")]
    for process in processes(leave_at_once, outcomes):
        process.join(200)
        assert process.exitcode == 0
    assert (tmp_path / "ends.log").read_text() == ""
    assert_saved(tmp_path / "ends" / "step-1")
    said = (tmp_path / "hangs.log").read_text()
    assert "step-1" in said
    assert "has written nothing for 1 s: the process ends without it, and there is no checkpoint" in said
    # What it left is dead.
    checkpoint.save(tmp_path / "hangs" / "step-1", nn.Linear(50, 50))
    assert [path.name for path in (tmp_path / "hangs").iterdir()] == ["step-1"]


@spawn_only
@pytest.mark.exhaustive
@pytest.mark.parametrize("hangs", [False, True])
def test_an_interpreter_of_its_own_ends_too(tmp_path: Path, hangs: bool) -> None:
    """The interpreter is started without multiprocessing."""
    log = tmp_path / "log"
    command = (
        "from pathlib import Path; from tests.distributed.test_checkpoint_async import leave_at_once; "
        f"leave_at_once(Path({str(tmp_path / 'runs')!r}), {hangs}, Path({str(log)!r}))"
    )
    subprocess.run([sys.executable, "-c", command], timeout=200, check=True)
    assert bool(log.read_text()) == hangs
    if not hangs:
        assert_saved(tmp_path / "runs" / "step-1")


def test_a_failure_that_nobody_asks_for_is_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = Records()

    def fail(*_: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(writer, "write_block", fail)
    model = nn.Linear(5, 5)
    pending = checkpoint.async_save(tmp_path / "step-1", model)
    pending._thread.join()
    assert len(records.said) == 1
    assert "step-1" in records.said[0]
    assert "the disk is full" in records.said[0]
    monkeypatch.undo()
    with pytest.raises(OSError, match="the disk is full"):
        checkpoint.save(tmp_path / "step-2", model)
    assert not any(tmp_path.iterdir())
    logging.getLogger("lion_dist").removeHandler(records)
