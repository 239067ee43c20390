"""The bytes that runs read: the same in a run and in those that resume it or are compared with it."""

from __future__ import annotations

import py_compile
from pathlib import Path

import pytest
import torch

from lion_dist import Lion, checkpoint
from tests.examples.runs import DATA, ROOT, assert_same_checkpoint


def test_bytecode_is_no_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run may be the first to import modules of the folder that it reads, and can be resumed all the same."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    from data import load_corpus

    module = tmp_path / "package" / "module.py"
    module.parent.mkdir()
    module.write_text("numbers = 1, 2, 3  # a line to read\n" * 40)
    before = load_corpus(tmp_path, 32)
    assert len(before.train) + len(before.validation) == module.stat().st_size
    bytecode = py_compile.compile(str(module), doraise=True)
    assert bytecode is not None
    assert Path(bytecode).is_relative_to(tmp_path)
    assert load_corpus(tmp_path, 32).digest == before.digest


def test_runs_read_what_nobody_edits() -> None:
    assert not Path(ROOT, DATA).is_relative_to(ROOT / "lion_dist")
    assert any(Path(DATA).glob("*.py"))


def test_runs_on_other_data_are_not_compared(tmp_path: Path) -> None:
    """Their weights differ for a reason that says nothing about resuming, or are the same by chance."""
    model = torch.nn.Linear(2, 2)
    optimizer = Lion(model.named_parameters())
    for name, digest in (("a", "0"), ("b", "1"), ("c", "0")):
        extra = {"step": 2, "run": {"data (sha256)": digest}}
        checkpoint.save(tmp_path / name / "step-2", model, optimizer, extra=extra)
    assert_same_checkpoint(tmp_path / "a", tmp_path / "c")
    with pytest.raises(AssertionError, match="differ in data or options"):
        assert_same_checkpoint(tmp_path / "a", tmp_path / "b")
