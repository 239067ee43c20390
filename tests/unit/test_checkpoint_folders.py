"""Who may remove what: unfinished folders, their locks, and the checkpoints that ``keep_last`` leaves."""

from __future__ import annotations

import gc
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from lion_dist import Lion, checkpoint
from lion_dist.checkpoint import Reader, Writer, writer
from lion_dist.checkpoint.__main__ import main
from tests.asserts import assert_same_bits
from tests.scenarios.checkpoint_linear import filled, names_in

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


# keep_last ------------------------------------------------------------------------------------------


def test_keep_last_knows_its_own_run(tmp_path: Path) -> None:
    """Jobs that save seed-0, seed-1, ... with keep_last=1 beside each other, in one process or in several."""
    seeds = [filled(float(seed)) for seed in range(3)]
    for seed, (model, optimizer) in enumerate(seeds):
        checkpoint.save(tmp_path / f"seed-{seed}", model, optimizer, keep_last=1)
    assert names_in(tmp_path) == {"seed-0", "seed-1", "seed-2"}
    # Without an optimizer the model says which run it is.
    models = [filled()[0], filled()[0]]
    for i in range(4):
        checkpoint.save(tmp_path / f"model-{i}", models[i % 2], keep_last=1)
    assert names_in(tmp_path) == {"seed-0", "seed-1", "seed-2", "model-2", "model-3"}

    # A run goes on where it is loaded from: the same folder and stem.
    model, optimizer = filled()
    checkpoint.load(tmp_path / "seed-1", model, optimizer)
    checkpoint.save(tmp_path / "sub" / "seed-5", model, optimizer, keep_last=1)
    checkpoint.save(tmp_path / "step-6", model, optimizer, keep_last=1)
    assert {"seed-0", "seed-1", "seed-2"} < names_in(tmp_path)
    checkpoint.save(tmp_path / "seed-7", model, optimizer, keep_last=1)
    assert names_in(tmp_path) - {"sub", "step-6"} == {"seed-0", "seed-2", "seed-7", "model-2", "model-3"}
    # One who loads it only to go on elsewhere is another run.
    others = [filled(), filled()]
    for i, (model, optimizer) in enumerate(others):
        checkpoint.load(tmp_path / "step-6", model, optimizer)
        checkpoint.save(tmp_path / f"tuned-{i}", model, optimizer, keep_last=1)
    assert {"tuned-0", "tuned-1", "step-6"} < names_in(tmp_path)


def test_keep_last_continues_over_restarts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whichever of its checkpoints a training is resumed from, and with whatever optimizer."""
    model, optimizer = filled()
    for step in range(6):
        if step in (2, 4):
            model, optimizer = filled()
            checkpoint.load(checkpoint.latest(tmp_path, stem="step"), model, optimizer)
        for stem in ("step", "best"):
            checkpoint.save(tmp_path / f"{stem}-{step}", model, optimizer, keep_last=1)
        assert names_in(tmp_path) == {f"step-{step}", f"best-{step}"}
    # The optimizer is made anew; or the weights alone are loaded.
    optimizer = Lion(model.parameters())
    checkpoint.save(tmp_path / "step-6", model, optimizer, keep_last=1)
    model, optimizer = filled()
    checkpoint.load(tmp_path / "step-6", model)
    checkpoint.save(tmp_path / "step-7", model, optimizer, keep_last=1)
    assert names_in(tmp_path) == {"step-7", "best-5"}
    assert not caplog.records


def test_keep_last_of_two_runs_from_one_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint.save(tmp_path / "step-10", *filled())
    siblings = [filled(), filled()]
    for model, optimizer in siblings:
        checkpoint.load(tmp_path / "step-10", model, optimizer)
    for step in range(11, 17):
        checkpoint.save(tmp_path / f"step-{step}", *siblings[step % 2], keep_last=1)
    assert names_in(tmp_path) == {"step-15", "step-16"}
    assert [
        record.getMessage()
        for record in caplog.records
        if "keep_last does not remove 1 checkpoints" in record.getMessage()
    ]
    assert len(caplog.records) == 1


def test_keep_last_leaves_what_records_no_run(tmp_path: Path) -> None:
    dcp.save({"model": {"w": torch.ones(3)}}, storage_writer=Writer(tmp_path / "step-1"))
    (tmp_path / "step-2").mkdir()
    (tmp_path / "step-2" / "manifest.json").write_text('{"objects": {"lion_dist.run": "damaged"}}')
    model, optimizer = filled()
    for step in (3, 4):
        checkpoint.save(tmp_path / f"step-{step}", model, optimizer, keep_last=1)
    assert names_in(tmp_path) == {"step-1", "step-2", "step-4"}


def test_keep_last_with_torchs_save(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'keep_last .* needs .* run="..."'):
        Writer(tmp_path / "step-1", keep_last=1)
    state = {"w": torch.ones(3)}
    for step in range(4):
        dcp.save(state, storage_writer=Writer(tmp_path / f"step-{step}", keep_last=1, run=f"sweep {step % 2}"))
    assert names_in(tmp_path) == {"step-2", "step-3"}
    loaded = {"w": torch.zeros(3)}
    dcp.load(loaded, storage_reader=Reader(tmp_path / "step-3"))
    assert_same_bits(loaded["w"], state["w"])


def test_leftovers_of_a_crash_are_swept_by_the_resumed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save that a signal asked for, whose number never comes again; and a removal that was cut short."""
    model, optimizer = filled()
    checkpoint.save(tmp_path / "step-1", model, optimizer)
    with monkeypatch.context() as patch:
        patch.setattr(writer.Writer, "finish", lambda *_: os.kill(os.getpid(), 0) or pytest.fail("dies"))
        patch.setattr(writer.Writer, "abandon", writer.Writer.release)
        with pytest.raises(BaseException, match="dies"):
            checkpoint.save(tmp_path / "step-17", model, optimizer)
        patch.undo()
        patch.setattr("shutil.rmtree", lambda *_, **__: None)
        checkpoint.save(tmp_path / "step-20", model, optimizer, keep_last=1)
    assert [n.rpartition("-")[0][:8] for n in sorted(names_in(tmp_path))[:2]] == [".step-1.", ".step-17"]
    stranger = filled()
    checkpoint.save(tmp_path / "step-30", *stranger, keep_last=1)  # another run's
    assert len(names_in(tmp_path)) == 4
    model, optimizer = filled()
    checkpoint.load(tmp_path / "step-20", model, optimizer)
    checkpoint.save(tmp_path / "step-31", model, optimizer)  # without keep_last it removes no other name
    assert len(names_in(tmp_path)) == 5
    checkpoint.save(tmp_path / "step-40", model, optimizer, keep_last=1)
    assert names_in(tmp_path) == {"step-30", "step-40"}


def test_a_checkpoint_that_is_being_read_is_not_removed(tmp_path: Path) -> None:
    model, optimizer = filled()
    checkpoint.save(tmp_path / "step-1", model, optimizer)
    readers = [Reader(tmp_path / "step-1") for _ in range(2)]
    for reader in readers:
        assert reader.manifest
    checkpoint.save(tmp_path / "step-2", model, optimizer, keep_last=1)
    assert names_in(tmp_path) == {"step-1", "step-2"}
    for reader in readers:
        reader.verify()
    del reader, readers
    checkpoint.save(tmp_path / "step-3", model, optimizer, keep_last=1)
    assert names_in(tmp_path) == {"step-3"}
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
    assert names_in(tmp_path) == {"step-4"}


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
    future: Any
    for future in pending:
        future.result()
    assert names_in(tmp_path) == {"step-0", "step-1", "step-2"}
    for k in range(3):
        loaded = {"w": torch.zeros(1000)}
        dcp.load(loaded, storage_reader=Reader(tmp_path / f"step-{k}"))
        assert_same_bits(loaded["w"], state["w"])


# Finding --------------------------------------------------------------------------------------------


def test_latest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, optimizer = filled()
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
