"""Folders that unfinished saves leave behind, and which saves may remove them."""

from __future__ import annotations

import errno
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lion_dist import checkpoint
from lion_dist.checkpoint import locks, unfinished, writer
from lion_dist.checkpoint.unfinished import Unfinished
from tests.harness import processes, spawn_only
from tests.scenarios.checkpoint_linear import assert_holds, filled, leave_unfinished, names_in

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def test_only_the_dead_of_the_same_name_are_swept(tmp_path: Path) -> None:
    alive = [Unfinished.make(tmp_path / name) for name in ("step-1", "step-2", "other")]
    dead = [leave_unfinished(tmp_path / name) for name in ("step-2", "step-10", "step-1.x", "other")]
    own = leave_unfinished(tmp_path / "step-1")
    of_an_older_version = tmp_path / ".step-1.0123abcd.unfinished"
    of_an_older_version.mkdir()
    checkpoint.save(tmp_path / "step-1", *filled())
    assert names_in(tmp_path) == {"step-1", *(folder.name for folder in (*(u.folder for u in alive), *dead))}
    assert not own.exists()
    # Those that were alive go on, and find out who was faster.
    alive[1].commit()
    with pytest.raises(FileExistsError, match="another save to the same path was faster"):
        alive[0].commit()
    assert_holds(tmp_path / "step-1", 1.0)
    # A name that is taken is swept too.
    alive[0].lock.release()
    with pytest.raises(FileExistsError, match="step-1 exists"):
        checkpoint.save(tmp_path / "step-1", *filled())
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
    checkpoint.save(tmp_path / "step-1", *filled())
    assert len(set(taken)) == len(taken) == 2
    assert names_in(tmp_path) == {"step-1"}
    assert_holds(tmp_path / "step-1", 1.0)


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


def test_one_of_two_saves_to_one_path_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
            checkpoint.save(path, *filled())
        monkeypatch.setattr(where, moment, original)
        assert names_in(path.parent) == {"step-1"}
        assert names_in(path) == {"manifest.json", "data"}


def test_a_save_whose_folder_was_removed_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folder is removed by somebody who asks for no lock, at any moment."""

    def lose() -> None:
        (unfinished,) = tmp_path.glob(".*.unfinished")
        shutil.rmtree(unfinished)

    def swap() -> None:
        shutil.rmtree(tmp_path / "step-1")
        shutil.copytree(tmp_path / "good", tmp_path / "step-1")

    checkpoint.save(tmp_path / "good", *filled())
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
            checkpoint.save(tmp_path / "step-1", *filled(2.0))
        monkeypatch.setattr(where, function, original)
        shutil.rmtree(tmp_path / "step-1", ignore_errors=True)
        assert names_in(tmp_path) == {"good"}


def test_without_locks_age_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_lock(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr("fcntl.flock", no_lock)
    for no_fcntl in (False, True):
        if no_fcntl:
            monkeypatch.setattr(locks, "fcntl", None)
        young, old = leave_unfinished(tmp_path / "step-1"), leave_unfinished(tmp_path / "step-1")
        for path in (old / "data-00000.bin", old / "manifest.json", old):
            os.utime(path, (time.time() - 25 * 3600,) * 2)
        model, optimizer = filled()
        checkpoint.save(tmp_path / "step-1", model, optimizer)
        assert names_in(tmp_path) == {"step-1", young.name}
        checkpoint.save(tmp_path / "step-2", model, optimizer, keep_last=1)
        assert names_in(tmp_path) == {"step-2", young.name}
        shutil.rmtree(tmp_path / "step-2")
        shutil.rmtree(young)


def test_where_an_open_file_keeps_its_folder_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SMB behaves so."""
    rename = Path.rename

    def strict(self: Path, target: Path) -> Path:
        for fd in os.listdir("/proc/self/fd"):
            if os.path.realpath(f"/proc/self/fd/{fd}").startswith(f"{self}/"):
                raise PermissionError(errno.EACCES, "a file in it is open", str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", strict)
    model, optimizer = filled()
    leave_unfinished(tmp_path / "step-1")
    for step in (1, 2):
        checkpoint.save(tmp_path / f"step-{step}", model, optimizer, keep_last=1)
    assert names_in(tmp_path) == {"step-2"}
    assert_holds(tmp_path / "step-2", 1.0)


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
        assert len(names_in(folder)) == 1
        checkpoint.save(folder / "step-1", *filled())
        assert names_in(folder) == {"step-1"}
    finally:
        os.kill(child, 9)
