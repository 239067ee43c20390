"""Checkpoints that are damaged or hostile are refused, and change nothing."""

from __future__ import annotations

import json
import os
import pickle
import time
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

from lion_dist import checkpoint
from lion_dist.checkpoint import Reader
from lion_dist.checkpoint.__main__ import main
from tests.asserts import assert_same_bits
from tests.scenarios.checkpoint_linear import toy
from tests.scenarios.tampering import ATTACKS, FIT_FOR_ANOTHER, Bomb, data, flip, rewrite

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_are_refused_and_change_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LION_DIST_TEST_BOMB", str(tmp_path / "exploded"))
    attack, message = ATTACKS[name]
    model, optimizer = toy()
    path = tmp_path / "c"
    checkpoint.save(path, model, optimizer, extra=1)
    model, optimizer = toy()
    optimizer.init_state()
    for entry in optimizer.state.values():
        entry["exp_avg"].fill_(7)
    before = [t.clone() for t in (*model.parameters(), *(e["exp_avg"] for e in optimizer.state.values()))]
    groups = [{**group, "params": None} for group in optimizer.param_groups]
    generators = torch.get_rng_state()
    attack(path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        checkpoint.load(path, model, optimizer)
    after = [*model.parameters(), *(e["exp_avg"] for e in optimizer.state.values())]
    for a, b in zip(after, before, strict=True):
        assert_same_bits(a, b, name)
    assert [{**group, "params": None} for group in optimizer.param_groups] == groups
    assert torch.equal(torch.get_rng_state(), generators)
    assert not (tmp_path / "exploded").exists()
    # Those that say that the files are not what was saved are found by the command line, too.
    assert main([str(path), "--quiet"]) == (0 if name in FIT_FOR_ANOTHER else 1)


def stairs(columns: int) -> tuple[dict[str, Any], int]:
    """A manifest that makes a sweep along either dimension compare all boxes with all, and the bytes of its file:
    column i of a tensor of shape (2 * columns, columns) is parted below its row i."""
    chunks, at = [], 0
    for i in range(columns):
        for start, stop in ((0, i + 1), (i + 1, 2 * columns)):
            chunks.append({
                "offsets": [start, i], "sizes": [stop - start, 1], "file": "data-00000.bin", "start": at,
                "checksums": [zlib.crc32(bytes(stop - start))],
            })  # fmt: skip
            at += stop - start
    tensors = {"model.weight": {"dtype": "uint8", "shape": [2 * columns, columns], "chunks": chunks}}
    return {
        "format": "lion_dist.checkpoint", "version": 1, "block_bytes": 1 << 30, "files": {"data-00000.bin": at},
        "objects": {}, "tensors": tensors,
    }, at  # fmt: skip


def test_a_small_manifest_is_checked_quickly(tmp_path: Path) -> None:
    raw, nbytes = stairs(4000)  # 0.9 MB; comparing all with all would take minutes
    tmp_path.joinpath("data-00000.bin").write_bytes(b"")
    os.truncate(tmp_path / "data-00000.bin", nbytes)
    (tmp_path / "manifest.json").write_text("{}")
    rewrite(tmp_path, lambda _: None, json.dumps(raw).encode())
    begin = time.monotonic()
    Reader(tmp_path).manifest  # noqa: B018
    assert time.monotonic() - begin < 20  # it takes 0.3 s
    # And it is still looked at: one box that lies on another.
    chunk = raw["tensors"]["model.weight"]["chunks"][-1]
    chunk["offsets"][1] -= 1
    rewrite(tmp_path, lambda _: None, json.dumps(raw).encode())
    with pytest.raises(ValueError, match="8000 boxes overlap"):
        Reader(tmp_path).manifest  # noqa: B018


def test_the_size_of_blocks_costs_no_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Blocks larger than the data, and data of which one block is large but holds nothing on the disk."""
    model, optimizer = toy()
    checkpoint.save(tmp_path / "c", model, optimizer)
    rewrite(tmp_path / "c", lambda raw: raw.update(block_bytes=1 << 30))
    tracemalloc.start()
    try:
        other, loaded = toy()
        checkpoint.load(tmp_path / "c", other, loaded)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
        assert_same_bits(other.weight.detach(), model.weight.detach())
        large = 100 << 20

        def grow(raw: dict[str, Any]) -> None:
            at = raw["files"]["data-00000.bin"]
            total, zeros = 0, bytes(1 << 20)
            for _ in range(large >> 20):
                total = zlib.crc32(zeros, total)
            chunk = {"offsets": [0], "sizes": [large], "file": "data-00000.bin", "start": at, "checksums": [total]}
            raw["tensors"]["model.more"] = {"dtype": "uint8", "shape": [large], "chunks": [chunk]}
            raw["files"]["data-00000.bin"] = at + large

        rewrite(tmp_path / "c", grow)
        os.truncate(data(tmp_path / "c"), data(tmp_path / "c").stat().st_size + large)
        tracemalloc.reset_peak()
        assert main([str(tmp_path / "c")]) == 0
        assert tracemalloc.get_traced_memory()[1] < 50 << 20  # four threads, 8 MiB each
    finally:
        tracemalloc.stop()
    flip(data(tmp_path / "c"), -1)
    assert main([str(tmp_path / "c")]) == 1


def test_the_command_line_prints_no_terminal_escapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil = "\x1b]0;title\x07\u202e\x9b31m"
    model, optimizer = toy()
    optimizer.param_groups[0]["name"] = evil
    checkpoint.save(tmp_path / "c", model, optimizer, extra={evil: evil})
    assert main([str(tmp_path / "c")]) == 0
    assert checkpoint.read_extra(tmp_path / "c") == {evil: evil}
    for edit in (
        {evil: 1},
        {"optim.param_groups.0.params": [evil]},
        {"optim.param_groups.0.betas": evil},
        {"optim.param_groups.0.lr": evil},
        {"scheduler.0": evil},
        {"optim.state." + evil: 1},
        {"extra": {"$" + evil: 1}},
    ):
        rewrite(tmp_path / "c", lambda raw, edit=edit: raw["objects"].update(edit))  # type: ignore[misc]
        with pytest.raises((ValueError, TypeError)) as error:
            checkpoint.load(tmp_path / "c", model, optimizer)
        assert str(error.value).isprintable()
        main([str(tmp_path / "c")])
        rewrite(tmp_path / "c", lambda raw, edit=edit: [raw["objects"].pop(key) for key in edit])  # type: ignore[misc]
    shown = capsys.readouterr()
    assert (shown.out + shown.err).replace("\n", "").isprintable()
    model.register_buffer("a\x1b", torch.zeros(1))
    with pytest.raises(ValueError, match=r"'model\.a\\x1b' cannot be a name"):
        checkpoint.save(tmp_path / "d", model, optimizer)


def test_the_bomb_explodes_when_it_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above could fail."""
    monkeypatch.setenv("LION_DIST_TEST_BOMB", str(tmp_path / "exploded"))
    pickle.loads(pickle.dumps(Bomb()))
    assert (tmp_path / "exploded").exists()
