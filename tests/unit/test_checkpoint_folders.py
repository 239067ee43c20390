"""Who may remove what: unfinished folders, their locks, and the checkpoints that ``keep_last`` leaves."""

from __future__ import annotations

import errno
import gc
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from lion_dist import Lion, checkpoint
from lion_dist.checkpoint import Reader, Writer, locks, unfinished, writer
from lion_dist.checkpoint.__main__ import main
from lion_dist.checkpoint.unfinished import Unfinished
from tests.bits import assert_same_bits
from tests.harness import processes, spawn_only

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def toy(value: float = 1.0) -> tuple[nn.Module, Lion]:
    model = nn.Linear(7, 5)
    for p in model.parameters():
        p.data.fill_(value)
    return model, Lion(model.parameters(), lr=0.5)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def leave(path: Path) -> Path:
    """What a save to ``path`` leaves that dies."""
    unfinished = Unfinished.make(path)
    (unfinished.folder / "data-00000.bin").write_bytes(b"x")
    unfinished.lock.release()
    return unfinished.folder


def assert_is(path: Path, value: float) -> None:
    model, optimizer = toy(-7.0)
    checkpoint.load(path, model, optimizer)
    assert (next(model.parameters()) == value).all()


# Leftovers ------------------------------------------------------------------------------------------


def test_only_the_dead_of_the_same_name_are_swept(tmp_path: Path) -> None:
    alive = [Unfinished.make(tmp_path / name) for name in ("step-1", "step-2", "other")]
    dead = [leave(tmp_path / name) for name in ("step-2", "step-10", "step-1.x", "other")]
    own = leave(tmp_path / "step-1")
    of_an_older_version = tmp_path / ".step-1.0123abcd.unfinished"
    of_an_older_version.mkdir()
    checkpoint.save(tmp_path / "step-1", *toy())
    assert names(tmp_path) == {"step-1", *(folder.name for folder in (*(u.folder for u in alive), *dead))}
    assert not own.exists()
    # Those that were alive go on, and find out who was faster.
    alive[1].commit()
    with pytest.raises(FileExistsError, match="another save to the same path was faster"):
        alive[0].commit()
    assert_is(tmp_path / "step-1", 1.0)
    # A name that is taken is swept too.
    alive[0].lock.release()
    with pytest.raises(FileExistsError, match="step-1 exists"):
        checkpoint.save(tmp_path / "step-1", *toy())
    assert not alive[0].folder.exists()


def test_a_folder_that_is_swept_before_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two saves to one path: one has made its folder, or opened the file in it, when the other finds it unlocked."""
    mkdir, opened, taken = Path.mkdir, os.open, []

    def take(folder: Path) -> None:
        taken.append(folder)
        unfinished.remove_if_dead(folder)
        assert not folder.exists()

    def sweep_after_mkdir(self: Path, *args: Any, **kwargs: Any) -> None:
        mkdir(self, *args, **kwargs)
        if self.name.endswith(".unfinished") and not taken:
            take(self)

    def sweep_after_open(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        fd = opened(path, flags, *args, **kwargs)
        if flags & os.O_CREAT and len(taken) == 1 and taken[0] != Path(path).parent:
            take(Path(path).parent)
        return fd

    monkeypatch.setattr(Path, "mkdir", sweep_after_mkdir)
    monkeypatch.setattr(os, "open", sweep_after_open)
    checkpoint.save(tmp_path / "step-1", *toy())
    assert len(set(taken)) == len(taken) == 2
    assert names(tmp_path) == {"step-1"}
    assert_is(tmp_path / "step-1", 1.0)


def once(act: Callable[[], Any]) -> Callable[[], None]:
    """The act, at the first call from any thread."""
    lock = threading.Lock()

    def call() -> None:
        if lock.acquire(blocking=False):
            act()

    return call


def before(function: Callable[..., Any], act: Callable[[], Any]) -> Callable[..., Any]:
    return lambda *args: (act(), function(*args))[1]


def after(function: Callable[..., Any], act: Callable[[], Any]) -> Callable[..., Any]:
    return lambda *args: (function(*args), act())[0]


def test_of_two_saves_to_one_path_one_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever the other one commits."""

    def other(path: Path) -> Callable[[], None]:
        def commit() -> None:
            unfinished = Unfinished.make(path)
            (unfinished.folder / "data").touch()
            unfinished.commit()

        return commit

    for where, moment in ((writer, "write_block"), (unfinished, "sync_folder"), (unfinished, "_rename")):
        path = tmp_path / moment / "step-1"
        path.parent.mkdir()
        original = getattr(where, moment)
        monkeypatch.setattr(where, moment, before(original, once(other(path))))
        with pytest.raises(FileExistsError, match="another save to the same path was faster"):
            checkpoint.save(path, *toy())
        monkeypatch.setattr(where, moment, original)
        assert names(path.parent) == {"step-1"}
        assert names(path) == {"manifest.json", "data"}


def test_a_victim_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folder is removed by somebody who asks for no lock, at any moment."""

    def lose() -> None:
        (unfinished,) = tmp_path.glob(".*.unfinished")
        shutil.rmtree(unfinished)

    def swap() -> None:
        shutil.rmtree(tmp_path / "step-1")
        shutil.copytree(tmp_path / "good", tmp_path / "step-1")

    checkpoint.save(tmp_path / "good", *toy())
    moments: list[tuple[Any, str, Callable[..., Any], Callable[[], Any]]] = [
        (writer.Writer, "_write", before, lose),
        (writer, "write_block", before, lose),
        (Unfinished, "write_manifest", after, lose),
        (writer, "write_durably", after, lose),
        (unfinished, "_rename", before, lose),
        (unfinished, "_rename", after, lambda: shutil.rmtree(tmp_path / "step-1")),
        (unfinished, "_rename", after, lambda: (tmp_path / "step-1" / "data-00000.bin").unlink()),
        (unfinished, "_rename", after, swap),
    ]
    for where, function, when, act in moments:
        original = getattr(where, function)
        monkeypatch.setattr(where, function, when(original, once(act)))
        message = "has replaced" if act is swap else "is not there, though it is being saved: another process"
        with pytest.raises(OSError, match=message):
            checkpoint.save(tmp_path / "step-1", *toy(2.0))
        monkeypatch.setattr(where, function, original)
        shutil.rmtree(tmp_path / "step-1", ignore_errors=True)
        assert names(tmp_path) == {"good"}


def test_where_there_are_no_locks_age_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_lock(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(locks.fcntl, "flock", no_lock)
    for no_fcntl in (False, True):
        if no_fcntl:
            monkeypatch.setattr(locks, "fcntl", None)
        young, old = leave(tmp_path / "step-1"), leave(tmp_path / "step-1")
        for path in (old / "data-00000.bin", old / "manifest.json", old):
            os.utime(path, (time.time() - 25 * 3600,) * 2)
        model, optimizer = toy()
        checkpoint.save(tmp_path / "step-1", model, optimizer)
        assert names(tmp_path) == {"step-1", young.name}
        checkpoint.save(tmp_path / "step-2", model, optimizer, keep_last=1)
        assert names(tmp_path) == {"step-2", young.name}
        shutil.rmtree(tmp_path / "step-2")
        shutil.rmtree(young)


def test_where_an_open_file_keeps_its_folder_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As SMB does."""
    rename = Path.rename

    def strict(self: Path, target: Path) -> Path:
        for fd in os.listdir("/proc/self/fd"):
            if os.path.realpath(f"/proc/self/fd/{fd}").startswith(f"{self}/"):
                raise PermissionError(errno.EACCES, "a file in it is open", str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", strict)
    model, optimizer = toy()
    leave(tmp_path / "step-1")
    for step in (1, 2):
        checkpoint.save(tmp_path / f"step-{step}", model, optimizer, keep_last=1)
    assert names(tmp_path) == {"step-2"}
    assert_is(tmp_path / "step-2", 1.0)


def hold(path: Path, answer: Path) -> None:
    """Begins a save, forks, and is killed; the child lives on."""
    unfinished = Unfinished.make(path)
    child = os.fork()
    if child == 0:
        answer.write_text(str(os.getpid()))
        time.sleep(600)
        os._exit(0)
    while not answer.exists() or not answer.read_text():
        time.sleep(0.01)
    assert unfinished.lock.fd >= 0
    os.kill(os.getpid(), 9)


@spawn_only
def test_a_fork_does_not_keep_a_dead_save_alive(tmp_path: Path) -> None:
    """Such as a DataLoader's worker, which may outlive its parent."""
    folder = tmp_path / "runs"
    (process,) = processes(hold, [(folder / "step-1", tmp_path / "child")])
    process.join(60)
    child = int((tmp_path / "child").read_text())
    try:
        assert process.exitcode == -9
        assert len(names(folder)) == 1
        checkpoint.save(folder / "step-1", *toy())
        assert names(folder) == {"step-1"}
    finally:
        os.kill(child, 9)


# keep_last ------------------------------------------------------------------------------------------


def test_keep_last_knows_its_own_run(tmp_path: Path) -> None:
    """Jobs that save seed-0, seed-1, ... with keep_last=1 beside each other, in one process or in several."""
    seeds = [toy(float(seed)) for seed in range(3)]
    for seed, (model, optimizer) in enumerate(seeds):
        checkpoint.save(tmp_path / f"seed-{seed}", model, optimizer, keep_last=1)
    assert names(tmp_path) == {"seed-0", "seed-1", "seed-2"}
    # Without an optimizer the model says which run it is.
    models = [toy()[0], toy()[0]]
    for i in range(4):
        checkpoint.save(tmp_path / f"model-{i}", models[i % 2], keep_last=1)
    assert names(tmp_path) == {"seed-0", "seed-1", "seed-2", "model-2", "model-3"}

    # A run goes on where it is loaded from: the same folder and stem.
    model, optimizer = toy()
    checkpoint.load(tmp_path / "seed-1", model, optimizer)
    checkpoint.save(tmp_path / "sub" / "seed-5", model, optimizer, keep_last=1)
    checkpoint.save(tmp_path / "step-6", model, optimizer, keep_last=1)
    assert {"seed-0", "seed-1", "seed-2"} < names(tmp_path)
    checkpoint.save(tmp_path / "seed-7", model, optimizer, keep_last=1)
    assert names(tmp_path) - {"sub", "step-6"} == {"seed-0", "seed-2", "seed-7", "model-2", "model-3"}
    # One who loads it only to go on elsewhere is another run.
    others = [toy(), toy()]
    for i, (model, optimizer) in enumerate(others):
        checkpoint.load(tmp_path / "step-6", model, optimizer)
        checkpoint.save(tmp_path / f"tuned-{i}", model, optimizer, keep_last=1)
    assert {"tuned-0", "tuned-1", "step-6"} < names(tmp_path)


def test_keep_last_goes_on_over_restarts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whichever of its checkpoints a training is resumed from, and with whatever optimizer."""
    model, optimizer = toy()
    for step in range(6):
        if step in (2, 4):
            model, optimizer = toy()
            checkpoint.load(checkpoint.latest(tmp_path, stem="step"), model, optimizer)
        for stem in ("step", "best"):
            checkpoint.save(tmp_path / f"{stem}-{step}", model, optimizer, keep_last=1)
        assert names(tmp_path) == {f"step-{step}", f"best-{step}"}
    # The optimizer is made anew; or the weights alone are loaded.
    optimizer = Lion(model.parameters())
    checkpoint.save(tmp_path / "step-6", model, optimizer, keep_last=1)
    model, optimizer = toy()
    checkpoint.load(tmp_path / "step-6", model)
    checkpoint.save(tmp_path / "step-7", model, optimizer, keep_last=1)
    assert names(tmp_path) == {"step-7", "best-5"}
    assert not caplog.records


def test_keep_last_of_two_that_go_on_from_one_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint.save(tmp_path / "step-10", *toy())
    siblings = [toy(), toy()]
    for model, optimizer in siblings:
        checkpoint.load(tmp_path / "step-10", model, optimizer)
    for step in range(11, 17):
        checkpoint.save(tmp_path / f"step-{step}", *siblings[step % 2], keep_last=1)
    assert names(tmp_path) == {"step-15", "step-16"}
    (record,) = caplog.records
    assert "keep_last does not remove 1 checkpoints" in record.getMessage()


def test_keep_last_leaves_what_records_no_run(tmp_path: Path) -> None:
    dcp.save({"model": {"w": torch.ones(3)}}, storage_writer=Writer(tmp_path / "step-1"))
    (tmp_path / "step-2").mkdir()
    (tmp_path / "step-2" / "manifest.json").write_text('{"objects": {"lion_dist.run": "damaged"}}')
    model, optimizer = toy()
    for step in (3, 4):
        checkpoint.save(tmp_path / f"step-{step}", model, optimizer, keep_last=1)
    assert names(tmp_path) == {"step-1", "step-2", "step-4"}


def test_keep_last_of_torchs_own_door(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'keep_last .* needs .* run="..."'):
        Writer(tmp_path / "step-1", keep_last=1)
    state = {"w": torch.ones(3)}
    for step in range(4):
        dcp.save(state, storage_writer=Writer(tmp_path / f"step-{step}", keep_last=1, run=f"sweep {step % 2}"))
    assert names(tmp_path) == {"step-2", "step-3"}
    loaded = {"w": torch.zeros(3)}
    dcp.load(loaded, storage_reader=Reader(tmp_path / "step-3"))
    assert_same_bits(loaded["w"], state["w"])


def test_what_a_crash_left_is_swept_by_the_run_that_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save that a signal asked for, whose number never comes again; and a removal that was cut short."""
    model, optimizer = toy()
    checkpoint.save(tmp_path / "step-1", model, optimizer)
    with monkeypatch.context() as patch:
        patch.setattr(writer.Writer, "finish", lambda *_: os.kill(os.getpid(), 0) or pytest.fail("dies"))
        patch.setattr(writer.Writer, "abandon", writer.Writer.release)
        with pytest.raises(BaseException, match="dies"):
            checkpoint.save(tmp_path / "step-17", model, optimizer)
        patch.undo()
        patch.setattr(unfinished.shutil, "rmtree", lambda *_, **__: None)
        checkpoint.save(tmp_path / "step-20", model, optimizer, keep_last=1)
    assert [n.rpartition("-")[0][:8] for n in sorted(names(tmp_path))[:2]] == [".step-1.", ".step-17"]
    stranger = toy()
    checkpoint.save(tmp_path / "step-30", *stranger, keep_last=1)  # another run's
    assert len(names(tmp_path)) == 4
    model, optimizer = toy()
    checkpoint.load(tmp_path / "step-20", model, optimizer)
    checkpoint.save(tmp_path / "step-31", model, optimizer)  # without keep_last it removes no other name
    assert len(names(tmp_path)) == 5
    checkpoint.save(tmp_path / "step-40", model, optimizer, keep_last=1)
    assert names(tmp_path) == {"step-30", "step-40"}


def test_what_is_read_stays(tmp_path: Path) -> None:
    model, optimizer = toy()
    checkpoint.save(tmp_path / "step-1", model, optimizer)
    readers = [Reader(tmp_path / "step-1") for _ in range(2)]
    for reader in readers:
        assert reader.manifest
    checkpoint.save(tmp_path / "step-2", model, optimizer, keep_last=1)
    assert names(tmp_path) == {"step-1", "step-2"}
    for reader in readers:
        reader.verify()
    del reader, readers
    checkpoint.save(tmp_path / "step-3", model, optimizer, keep_last=1)
    assert names(tmp_path) == {"step-3"}
    # A load leaves no lock behind, neither one that fails.
    gc.disable()
    try:
        checkpoint.load(tmp_path / "step-3", model, optimizer)
        with pytest.raises(ValueError, match="has shape"):
            checkpoint.load(tmp_path / "step-3", nn.Linear(7, 6))
        with (tmp_path / "step-3" / "data-00000.bin").open("r+b") as file:
            file.write(b"damaged")
        with pytest.raises(ValueError, match="is damaged"):
            checkpoint.load(tmp_path / "step-3", model, optimizer)
        checkpoint.save(tmp_path / "step-4", model, optimizer, keep_last=1)
    finally:
        gc.enable()
    assert names(tmp_path) == {"step-4"}


def test_torchs_asynchronous_saves_overlap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each waits in its writing until all have begun."""
    together, write = threading.Barrier(3), writer.Writer._write

    def wait(self: Writer, *args: Any) -> Any:
        together.wait(60)
        return write(self, *args)

    monkeypatch.setattr(writer.Writer, "_write", wait)
    state = {"w": torch.arange(1000.0)}
    pending = [
        dcp.async_save(state, storage_writer=Writer(tmp_path / f"step-{k}", keep_last=3, run="r"), no_dist=True)
        for k in range(3)
    ]
    for future in pending:
        future.result()
    assert names(tmp_path) == {"step-0", "step-1", "step-2"}
    for k in range(3):
        loaded = {"w": torch.zeros(1000)}
        dcp.load(loaded, storage_reader=Reader(tmp_path / f"step-{k}"))
        assert_same_bits(loaded["w"], state["w"])


# Finding --------------------------------------------------------------------------------------------


def test_latest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, optimizer = toy()
    assert checkpoint.latest(tmp_path / "absent", default=None) is None
    assert checkpoint.latest(tmp_path, default="nothing") == "nothing"
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint in .*"):
        checkpoint.latest(tmp_path)
    checkpoint.save(tmp_path / "best", model, optimizer)
    assert checkpoint.latest(tmp_path, default=None) is None
    with pytest.raises(FileNotFoundError, match=r"ends in a number in .*, but 'best': give its path, or stem='best'"):
        checkpoint.latest(tmp_path)
    assert main([str(tmp_path)]) == 1
    assert "stem='best'" in capsys.readouterr().err
    assert checkpoint.latest(tmp_path, stem="best") == tmp_path / "best"
    for name in ("best-9", "best-100", "step-20", "step-3", "bestial-500"):
        checkpoint.save(tmp_path / name, model, optimizer)
    shutil.rmtree(tmp_path / "bestial-500")
    (tmp_path / "best-999").mkdir()  # no checkpoint
    assert checkpoint.latest(tmp_path) == tmp_path / "best-100"
    for stem in ("best", "best-"):
        assert checkpoint.latest(tmp_path, stem=stem, default=None) == tmp_path / "best-100"
    assert checkpoint.checkpoints(tmp_path, stem="best") == [tmp_path / name for name in ("best", "best-9", "best-100")]
    assert checkpoint.checkpoints(tmp_path, stem="best-") == [tmp_path / name for name in ("best-9", "best-100")]
    assert checkpoint.latest(tmp_path, stem="step") == tmp_path / "step-20"
    assert checkpoint.latest(tmp_path, stem="b", default=None) is None
    with pytest.raises(FileNotFoundError, match="no checkpoint of the stem 'epoch'"):
        checkpoint.latest(tmp_path, stem="epoch")
