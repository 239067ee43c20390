"""The storage alone, in one process: what goes in comes out, and what was tampered with does not get in."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.optim.lr_scheduler import LinearLR, LRScheduler, MultiStepLR, SequentialLR

from lion_dist import Lion, checkpoint
from lion_dist.checkpoint import Reader, Writer, blocks, folders, writer
from lion_dist.checkpoint.__main__ import main
from lion_dist.sharding.boxes import Box
from tests.asserts import assert_same_bits
from tests.scenarios.checkpoint_linear import toy
from tests.scenarios.tampering import data, flip

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "BLOCK_BYTES", 64)


# Tensors --------------------------------------------------------------------------------------------


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(33, 17, generator=generator)
    return {
        "rows": rows,
        "turned": rows.t(),
        "kernel": torch.randn(4, 3, 5, 2, generator=generator).contiguous(memory_format=torch.channels_last),
        "half": torch.randn(101, generator=generator).bfloat16(),
        "scalar": torch.tensor(3.5),
        "nothing": torch.empty(0, 3),
        "flags": torch.tensor([True, False, True]),
        "numbers": torch.arange(70),
        "every other": torch.arange(50)[::2],
    }


def test_tensors_come_back(small_blocks: None, tmp_path: Path) -> None:
    saved = {"deep": {"er": tensors()}, "lr": 0.1, "betas": (0.9, 0.99)}
    dcp.save(saved, storage_writer=Writer(tmp_path / "c"))
    loaded: dict[str, Any] = {
        "deep": {"er": {n: torch.zeros_like(t) for n, t in tensors().items()}},
        "lr": 0.0,
        "betas": None,
    }
    dcp.load(loaded, storage_reader=Reader(tmp_path / "c"))
    for name, t in tensors().items():
        assert_same_bits(loaded["deep"]["er"][name], t, name)
    assert (loaded["lr"], loaded["betas"]) == (0.1, (0.9, 0.99))
    # Nothing on disk but what the manifest says, and nothing that pickle would take.
    names = {p.name for p in (tmp_path / "c").iterdir()}
    assert names == {"manifest.json", "manifest.sha256", "data-00000.bin"}
    assert (tmp_path / "c" / "data-00000.bin").stat().st_size == sum(t.nbytes for t in tensors().values())


def test_blocks_of_any_layout_and_part(small_blocks: None) -> None:
    """Every block of a turned tensor, into every box of it."""
    t = torch.arange(120, dtype=torch.int16).view(4, 5, 6).permute(2, 0, 1)
    buffer = bytearray(t.nbytes)
    for start in range(0, t.numel(), 32):
        part = memoryview(buffer)[start * 2 : (start + 32) * 2]
        blocks.copy_out(t, start, part)
    assert torch.equal(torch.frombuffer(buffer, dtype=torch.int16).view(t.shape), t)
    for wanted in (
        Box((1, 0, 2), (4, 3, 2)),
        Box((5, 3, 4), (1, 1, 1)),
        Box((0, 0, 0), (6, 4, 5)),
    ):
        target = torch.full(wanted.sizes, -1, dtype=torch.int16)
        for start in range(0, t.numel(), 32):
            block = t.reshape(-1)[start : start + 32]
            blocks.copy_in(target, wanted, tuple(t.shape), start, block)
        assert torch.equal(target, t[wanted.slices()])


def test_dtypes_change_only_when_asked(tmp_path: Path) -> None:
    saved = {"w": torch.randn(10)}
    dcp.save(saved, storage_writer=Writer(tmp_path / "c"))
    loaded = {"w": torch.zeros(10, dtype=torch.bfloat16)}
    with pytest.raises(CheckpointException, match="cast=True"):
        dcp.load(loaded, storage_reader=Reader(tmp_path / "c"))
    assert not loaded["w"].any()
    dcp.load(loaded, storage_reader=Reader(tmp_path / "c", cast=True))
    assert_same_bits(loaded["w"], saved["w"].bfloat16())


# Folders --------------------------------------------------------------------------------------------


def test_the_last_are_kept_and_leftovers_swept(tmp_path: Path) -> None:
    model, optimizer = toy()
    (tmp_path / "notes").mkdir()
    others = {"best-10", ".best-11.0123abcd.unfinished", ".step-9.0123abcd.unfinished"}  # no leftovers of this save
    checkpoint.save(tmp_path / "best-10", model, optimizer)
    for name in (".best-11.0123abcd.unfinished", ".step-9.0123abcd.unfinished"):
        (tmp_path / name).mkdir()
    for step in (9, 10, 100, 20):
        left = tmp_path / f".step-{step}.0123abcd.unfinished"
        left.mkdir(exist_ok=True)
        (left / "data-00000.bin").write_bytes(b"x")
        checkpoint.save(tmp_path / f"step-{step}", model, optimizer, keep_last=2)
        assert not left.exists()
        (tmp_path / ".step-9.0123abcd.unfinished").mkdir(exist_ok=True)
    # By number, not by name or age; the one just written stays, whatever its number.
    assert {p.name for p in tmp_path.iterdir()} == {"notes", "step-20", "step-100", *others}
    assert checkpoint.latest(tmp_path) == tmp_path / "step-100"
    assert checkpoint.checkpoints(tmp_path) == [tmp_path / name for name in ("best-10", "step-20", "step-100")]
    checkpoint.save(tmp_path / "step-1", model, optimizer, keep_last=1)
    assert {p.name for p in tmp_path.iterdir()} == {"notes", "step-1", "step-100", *others}


def test_nothing_is_overwritten_and_a_failed_save_leaves_nothing(tmp_path: Path) -> None:
    model, optimizer = toy()
    path = tmp_path / "step-1"
    path.mkdir()
    with pytest.raises(FileExistsError, match="step-1 exists"):
        checkpoint.save(path, model, optimizer)
    with pytest.raises(TypeError, match="extra is a object"):
        checkpoint.save(tmp_path / "step-2", model, optimizer, extra=object())
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        checkpoint.latest(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no manifest\.json"):
        checkpoint.load(path, model, optimizer)


def test_an_lr_tensor_stays_one(tmp_path: Path) -> None:
    for saved in (0.5, torch.tensor(0.5)):
        path = tmp_path / f"c-{isinstance(saved, Tensor):d}"
        model, _ = toy()
        checkpoint.save(path, model, Lion(model.parameters(), lr=saved))
        lr = torch.tensor(0.25)
        optimizer = Lion(model.parameters(), lr=lr)
        checkpoint.load(path, model, optimizer)
        found = optimizer.param_groups[0]["lr"]
        assert isinstance(found, Tensor)
        assert found.item() == 0.5
        optimizer = Lion(model.parameters(), lr=0.25)
        checkpoint.load(path, model, optimizer)
        assert type(optimizer.param_groups[0]["lr"]) is float
        assert optimizer.param_groups[0]["lr"] == 0.5


def schedulers(optimizer: Lion, *, warmups: int = 1) -> SequentialLR:
    parts: list[LRScheduler] = [LinearLR(optimizer, 0.1, total_iters=4) for _ in range(warmups)]
    parts.append(MultiStepLR(optimizer, [3, 5]))
    return SequentialLR(optimizer, parts, [4 * (i + 1) for i in range(warmups)])


def test_nested_schedulers_resume(tmp_path: Path) -> None:
    model, optimizer = toy()
    scheduler = schedulers(optimizer)

    def rates(steps: int) -> list[float]:
        found = []
        for _ in range(steps):
            optimizer.step()
            scheduler.step()
            found.append(optimizer.param_groups[0]["lr"])
        return found

    rates(2)
    checkpoint.save(tmp_path / "step-1", model, optimizer, schedulers=scheduler)
    expected = rates(10)
    assert len(set(expected)) == 4
    model, optimizer = toy()
    other = schedulers(optimizer, warmups=2)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with pytest.raises(ValueError, match="not the state of a SequentialLR of these parts"):
        checkpoint.load(tmp_path / "step-1", model, optimizer, schedulers=other)
    for name, p in model.state_dict().items():
        assert_same_bits(p, before[name], name)
    model, optimizer = toy()
    scheduler = schedulers(optimizer)
    checkpoint.load(tmp_path / "step-1", model, optimizer, schedulers=scheduler)
    assert rates(10) == expected


def test_the_commit_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file and folder is on disk before the rename, and the rename before the call returns."""
    done: list[str] = []
    fsync, rename = os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name), fsync(fd)))
    monkeypatch.setattr(Path, "rename", lambda self, to: (done.append("rename"), rename(self, to))[1])
    model, optimizer = toy()
    checkpoint.save(tmp_path / "step-1", model, optimizer)
    assert done[:3] == ["data-00000.bin", "manifest.json", "manifest.sha256"]
    assert done[3].endswith(".unfinished")
    assert done[4:] == ["rename", tmp_path.name]


# The command line, and names of folders ---------------------------------------------------


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, optimizer = toy()
    checkpoint.save(tmp_path / "step-3", model, optimizer, extra={"step": 3})
    assert main([str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    for line in ("model.weight: float32 [5, 7]", "optim.state.weight.exp_avg: float32 [5, 7]", 'extra = {"step": 3}',
                 "optim.param_groups.0.lr = 0.5", "step-3: whole"):  # fmt: skip
        assert line in shown
    flip(data(tmp_path / "step-3"), 4)
    assert main([str(tmp_path / "step-3")]) == 1
    assert "is damaged" in capsys.readouterr().err
    assert main([str(tmp_path / "absent")]) == 1


def test_only_folders_and_names_are_taken(tmp_path: Path) -> None:
    assert not Writer.validate_checkpoint_id("s3://bucket/step-1")
    model, optimizer = toy()
    for use in (checkpoint.save, checkpoint.async_save, checkpoint.load):
        with pytest.raises(ValueError, match="s3://bucket/step-1 is not a folder"):
            use("s3://bucket/step-1", model, optimizer)
    with pytest.raises(ValueError, match="is not a folder"):
        Writer("s3://bucket/step-1")
    with pytest.raises(ValueError, match="keep_last"):
        Writer(tmp_path, keep_last=0)
    assert folders.number_of("step-0100") == 100
    assert folders.number_of("best") is None
