"""The storage alone, in one process: what goes in comes out, and what was tampered with does not get in."""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import sys
import time
import tracemalloc
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.optim.lr_scheduler import LinearLR, MultiStepLR, SequentialLR

from lion_dist import Lion, checkpoint
from lion_dist.checkpoint import Reader, Writer, blocks, folders, json_values, writer
from lion_dist.checkpoint.__main__ import main
from lion_dist.checkpoint.json_values import from_json, to_json
from tests.bits import assert_same_bits

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "BLOCK_BYTES", 64)


# Values that are no tensors -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        None, True, -3, 2**70, 0.1, math.inf, "x", [], [1, [2]], (1, (2, "a")), {}, {"a": {"b": 1}}, {3: 4, "x": (5,)},
        {"$a": 1}, torch.bfloat16, {"lr": [torch.float16]}, Counter({3: 1, 7: 2}), b"", bytes(range(256)),
        Path("runs/1"), {"b": (b"x", [Path("/")])}, 2**4000, -(2**4000), {(1, (2, "x")): 1, 2.5: {}, None: ()},
    ],
    ids=lambda value: repr(value)[:40],
)  # fmt: skip
def test_plain_values_come_back(value: Any) -> None:
    back = from_json(json.loads(json.dumps(to_json(value, "it"), allow_nan=False)))
    assert back == value
    assert type(back) is type(value)


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def test_numpys_generators_go_on(tmp_path: Path) -> None:
    """By way of a file; each kind of NumPy's, and arrays by themselves."""
    kinds = (numpy.random.PCG64, numpy.random.MT19937, numpy.random.Philox, numpy.random.SFC64)
    generators = [numpy.random.Generator(kind(7)) for kind in kinds]
    numpy.random.seed(3)
    arrays = [numpy.arange(6, dtype=name).reshape(2, 3) for name in sorted(json_values.ARRAY_DTYPES - {"bool"})]
    arrays += [numpy.array([True, False]), numpy.array([1.5, numpy.inf, -0.0], dtype="f2"), numpy.zeros((0, 3))]
    for generator in generators:
        generator.standard_normal(5)
    extra = {
        "legacy": numpy.random.get_state(), "arrays": arrays, "number": numpy.float32(0.1), "flag": numpy.bool_(True),
        "new": [generator.bit_generator.state for generator in generators], "path": tmp_path, "key": b"\x00\xff",
    }  # fmt: skip
    checkpoint.save(tmp_path / "c", nn.Linear(2, 2), extra=extra)
    expected = [numpy.random.random(), *(generator.random() for generator in generators)]
    for found in (checkpoint.load(tmp_path / "c", nn.Linear(2, 2)), checkpoint.read_extra(tmp_path / "c")):
        numpy.random.set_state(found["legacy"])
        for generator, kind, state in zip(generators, kinds, found["new"], strict=True):
            generator.bit_generator.state = kind().state  # another
            generator.bit_generator.state = state
        assert [numpy.random.random(), *(generator.random() for generator in generators)] == expected
        for got, array in zip(found["arrays"], arrays, strict=True):
            assert (got.dtype, got.shape, got.tobytes()) == (array.dtype, array.shape, array.tobytes())
        assert (found["path"], found["key"], found["flag"]) == (tmp_path, b"\x00\xff", True)
        assert numpy.float32(found["number"]) == numpy.float32(0.1)


def test_values_that_no_load_would_take_are_refused_when_they_are_saved() -> None:
    with pytest.raises(TypeError, match="nested more than 100 deep"):
        to_json(nested(200), "extra")
    with pytest.raises(TypeError, match="extra is a number of 5001 bits"):
        to_json(1 << 5000, "extra")
    value: Any = "x"
    for i in range(99):  # the deepest that are saved come back
        value = {i: value} if i % 2 else (value,)
    assert from_json(json.loads(json.dumps(to_json(value, "extra")))) == value


def test_arrays_without_numpy_are_an_error_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    saved = to_json(numpy.zeros(3), "it")
    monkeypatch.setitem(sys.modules, "numpy", None)
    with pytest.raises(ValueError, match=r"cannot be read: (ModuleNotFound|Import)Error"):
        from_json(saved)
    assert from_json(to_json({"a": [1]}, "it")) == {"a": [1]}


def test_plain_nan_and_tensors_come_back() -> None:
    assert math.isnan(from_json(to_json(math.nan, "it")))
    for t in (torch.tensor(0.1), torch.tensor([1.5, math.inf, -0.0], dtype=torch.bfloat16), torch.tensor([[2**60, 1]])):
        assert_same_bits(from_json(json.loads(json.dumps(to_json(t, "it")))), t)


@pytest.mark.parametrize(
    "value",
    [
        object(), {1, 2}, lambda: 0, nn.Linear(1, 1), torch.zeros(9000), defaultdict(int), MappingProxyType({}),
        bytes((1 << 20) + 1), memoryview(b"x"), numpy.zeros(9000), numpy.array([None]), numpy.array(["x"]),
        numpy.zeros(2, dtype="m8[s]"), numpy.longdouble(1), numpy.datetime64(1, "s"), numpy.zeros(1, dtype="c8"),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_other_values_are_refused_by_name(value: Any) -> None:
    with pytest.raises(TypeError, match=r"extra\.a\[1\] is a .* cannot hold"):
        to_json({"a": [0, value]}, "extra")


@pytest.mark.parametrize(
    "value",
    [
        {"$pickle": "x"}, {"$tuple": 1}, {"$dtype": "Tensor"}, {"$dtype": "load"}, {"$float": []}, {"$a": 1, "b": 2},
        {"$tensor": {"dtype": "float32", "shape": [2**40], "values": [0]}}, {"$dict": [[[], 1]]},
        {"$dict": [[1, 2, 3]]},
        {"$tensor": {"dtype": "float32", "shape": [1], "values": ["x"]}},
        {"$tensor": {"dtype": "int64", "shape": [1], "values": [1.5]}}, {"$tensor": [1]}, {"$float": "1e5"},
        {"$tensor": {"dtype": "float32", "shape": [-1], "values": [0.5]}}, {"$bytes": "x"}, {"$bytes": [1]},
        {"$tensor": {"dtype": "float32", "shape": [1, 1], "values": [[0.5]]}}, {"$path": 1}, {"$dtype": ["float32"]},
        {"$tensor": {"dtype": "uint8", "shape": [1], "values": [256]}}, {"$path": []}, {"$counter": [1]},
        {"$array": {"dtype": "object", "shape": [1], "values": [1]}}, {"$array": {"dtype": "uint8", "shape": [1],
        "values": [300]}}, {"$array": {"dtype": ["uint8"], "shape": [], "values": [1]}}, {"$array": {}},
        {"$array": {"dtype": "uint8", "shape": [], "values": [1], "kind": "x"}}, {"$tuple": nested(300)},
        {"$dict": [[k * (2**61 - 1), 0] for k in range(200)]}, {"$dict": [[{"$tuple": [[]]}, 1]]},
    ],
    ids=lambda value: str(value)[:60],
)  # fmt: skip
def test_hostile_values_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"cannot be read|is nothing that|nested more than"):
        from_json([value])


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
    loaded = {"deep": {"er": {n: torch.zeros_like(t) for n, t in tensors().items()}}, "lr": 0.0, "betas": None}
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
        blocks.Box((1, 0, 2), (4, 3, 2)),
        blocks.Box((5, 3, 4), (1, 1, 1)),
        blocks.Box((0, 0, 0), (6, 4, 5)),
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


def toy() -> tuple[nn.Module, Lion]:
    model = nn.Linear(7, 5)
    return model, Lion(model.parameters(), lr=0.5)


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
    parts = [LinearLR(optimizer, 0.1, total_iters=4) for _ in range(warmups)] + [MultiStepLR(optimizer, [3, 5])]
    return SequentialLR(optimizer, parts, [4 * (i + 1) for i in range(warmups)])


def test_schedulers_within_schedulers_go_on(tmp_path: Path) -> None:
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


# What is hostile or damaged -------------------------------------------------------------------------


def rewrite(path: Path, edit: Callable[[dict[str, Any]], Any], text: bytes = b"") -> None:
    """Changes a manifest as an attacker would: with a digest that fits."""
    raw = json.loads((path / "manifest.json").read_text())
    edit(raw)
    text = text or json.dumps(raw).encode()
    (path / "manifest.json").write_bytes(text)
    (path / "manifest.sha256").write_text(f"{hashlib.sha256(text).hexdigest()}  manifest.json\n")


def weight(raw: dict[str, Any]) -> dict[str, Any]:
    return raw["tensors"]["model.weight"]


def bias(raw: dict[str, Any]) -> dict[str, Any]:
    return raw["tensors"]["model.bias"]


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 16
    path.write_bytes(content)


def data(path: Path) -> Path:
    return path / "data-00000.bin"


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["LION_DIST_TEST_BOMB"],)


def rename_data(raw: dict[str, Any], name: str) -> None:
    raw["files"] = {name: raw["files"]["data-00000.bin"]}
    for held in raw["tensors"].values():
        held["chunks"][0]["file"] = name


def link(path: Path) -> None:
    real = path.parent / "real"
    data(path).rename(real)
    data(path).symlink_to(real)


def pipe(path: Path) -> None:
    data(path).unlink()
    os.mkfifo(data(path))


def halve(raw: dict[str, Any]) -> None:
    weight(raw)["chunks"][0]["sizes"][0] -= 1


def overlap(raw: dict[str, Any]) -> None:
    chunks = weight(raw)["chunks"]
    chunks[0]["sizes"][0] -= 1
    chunks.append({**chunks[0], "sizes": [1, chunks[0]["sizes"][1]]})


def bomb_file(name: str) -> Callable[[Path], None]:
    def put(path: Path) -> None:
        (path / name).write_bytes(pickle.dumps(Bomb()))

    return put


def manifest_edit(edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda path: rewrite(path, edit)


def put_anywhere(text: bytes, key: str = '"extra"') -> Callable[[Path], None]:
    """Text that json.dumps would not write, as a value."""

    def put(path: Path) -> None:
        whole = (path / "manifest.json").read_bytes()
        assert key.encode() + b":1" in whole
        rewrite(path, str, whole.replace(key.encode() + b":1", key.encode() + b":" + text))

    return put


def say(edit: dict[str, Any]) -> Callable[[Path], None]:
    return manifest_edit(lambda raw: raw["objects"].update(edit))


# What is done to a checkpoint, and what is to be said of it.
ATTACKS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "flipped first byte": (lambda p: flip(data(p), 0), "is damaged"),
    "flipped last byte": (lambda p: flip(data(p), -1), "is damaged"),
    "truncated": (lambda p: os.truncate(data(p), data(p).stat().st_size - 1), "bytes, not"),
    "longer": (lambda p: data(p).write_bytes(data(p).read_bytes() + b"x"), "bytes, not"),
    "empty": (lambda p: data(p).write_bytes(b""), "bytes, not"),
    "no data": (lambda p: data(p).unlink(), r"there is no data-00000\.bin"),
    "no manifest": (lambda p: (p / "manifest.json").unlink(), r"there is no manifest\.json"),
    "no digest": (lambda p: (p / "manifest.sha256").unlink(), r"there is no manifest\.sha256"),
    "flipped manifest": (lambda p: flip(p / "manifest.json", 100), "sha256"),
    "link": (link, "cannot be loaded"),
    "pipe": (pipe, "not a regular file"),
    "pickled manifest": (bomb_file("manifest.json"), "sha256"),
    "pickled data": (bomb_file("data-00000.bin"), "bytes, not"),
    "torch's metadata, pickled": (lambda p: (bomb_file(".metadata")(p), (p / "manifest.json").unlink()), "pickled"),
    "not JSON": (lambda p: rewrite(p, str, b"{"), "cannot be loaded"),
    "no dict": (lambda p: rewrite(p, str, b"[]"), "format"),
    "nested deeply": (lambda p: rewrite(p, str, b"[" * 100_000), "nested too deeply"),
    "a key twice": (lambda p: rewrite(p, str, b'{"format": 1, "format": 2}'), "occurs twice"),
    "infinite": (lambda p: rewrite(p, str, b'{"format": Infinity}'), "format"),
    "other format": (manifest_edit(lambda raw: raw.update(format="x")), "format"),
    "later version": (manifest_edit(lambda raw: raw.update(version=2)), "version 2"),
    "no objects": (manifest_edit(lambda raw: raw.update(objects={"a": 1})), "in no parameter group"),
    "absolute path": (manifest_edit(lambda raw: rename_data(raw, "/etc/passwd")), "not the name of a data file"),
    "path upwards": (manifest_edit(lambda raw: rename_data(raw, "../data-00000.bin")), "not the name of a data file"),
    "hidden file": (manifest_edit(lambda raw: rename_data(raw, "data-00000.bin\n")), "not the name of a data file"),
    "file not listed": (manifest_edit(lambda raw: weight(raw)["chunks"][0].update(file="data-00001.bin")), "not among"),
    "half covered": (manifest_edit(halve), "is not whole"),
    "overlapping": (manifest_edit(overlap), "is not whole"),
    "no chunks": (manifest_edit(lambda raw: weight(raw).update(chunks=[])), "is not whole"),
    "out of bounds": (manifest_edit(lambda raw: weight(raw)["chunks"][0].update(offsets=[1, 0])), "is not whole"),
    "negative": (manifest_edit(lambda raw: weight(raw)["chunks"][0].update(offsets=[-1, 0])), "not negative"),
    "shared bytes": (manifest_edit(lambda raw: bias(raw)["chunks"][0].update(start=4)), "begins at byte"),
    "huge": (manifest_edit(lambda raw: weight(raw).update(shape=[2**62, 2**62])), "is not whole"),
    "huge number": (manifest_edit(lambda raw: weight(raw).update(shape=[2**80])), "expected a whole number"),
    "float shape": (manifest_edit(lambda raw: weight(raw).update(shape=[5.0, 7.0])), "expected a whole number"),
    "other shape": (manifest_edit(lambda raw: (weight(raw).update(shape=[7, 5]),
                                               weight(raw)["chunks"][0].update(sizes=[7, 5]))), "has shape"),
    "other dtype": (manifest_edit(lambda raw: weight(raw).update(dtype="int32")), "cast=True"),
    "no dtype": (manifest_edit(lambda raw: weight(raw).update(dtype="os.system")), "name of a torch.dtype"),
    "fewer checksums": (manifest_edit(lambda raw: weight(raw)["chunks"][0].update(checksums=[])), "0 checksums"),
    "no blocks": (manifest_edit(lambda raw: raw.update(block_bytes=0)), "block_bytes"),
    "missing tensor": (manifest_edit(lambda raw: raw["tensors"].pop("model.bias")), "begins at byte|belong"),
    "group of others": (manifest_edit(lambda raw: raw["objects"].update({"optim.param_groups.0.params": ["x"]})),
                        "in no parameter group"),
    "bad lr": (manifest_edit(lambda raw: raw["objects"].update({"optim.param_groups.0.lr": -1.0})), "lr must be"),
    "object for lr": (manifest_edit(lambda raw: raw["objects"].update({"optim.param_groups.0.lr": {"$x": 1}})), "noth"),
    "not UTF-8": (lambda p: rewrite(p, str, b"\xff\xfe{}"), "cannot be loaded"),
    "NaN": (put_anywhere(b"NaN"), "NaN is not a finite number"),
    "infinite float": (put_anywhere(b"1e999"), "1e999 is not a finite"),
    "number of 1e6 digits": (put_anywhere(b"9" * 1_000_000), "1000000 digits"),
    "value nested deeply": (put_anywhere(b"[" * 400 + b"]" * 400), "nested more than 100 deep"),
    "value of dicts nested deeply": (put_anywhere(b'{"a":' * 500 + b"1" + b"}" * 500), "nested"),
    "value for a tensor": (say({"model.weight": 1}), "a tensor and a value"),
    "name that clears the screen": (say({"\x1b[2Jmodel": 1}), r"'\\x1b\[2Jmodel' cannot be a name"),
    "tensor that turns text round": (manifest_edit(lambda raw: raw["tensors"].update({"\u202e": bias(raw)})), "a name"),
    "long name": (say({"n" * 5000: 1}), "cannot be a name"),
    "file with an escape": (manifest_edit(lambda raw: rename_data(raw, "\x1b[31m")), r"'\\x1b\[31m' is not the name"),
    "chunk with an escape": (manifest_edit(lambda raw: weight(raw)["chunks"][0].update(file="\x1b]")), r"'\\x1b\]'"),
    "version with an escape": (manifest_edit(lambda raw: raw.update(version="\x1b[31m")), r"version '\\x1b"),
    "dtype is a list": (manifest_edit(lambda raw: weight(raw).update(dtype=["float32"])), "name of a torch.dtype"),
    "many dimensions": (manifest_edit(lambda raw: weight(raw).update(shape=[1] * 100_000)), "100000 dimensions"),
    "large block": (manifest_edit(lambda raw: raw.update(block_bytes=1 << 31)), "block_bytes"),
    "long digest": (lambda p: (p / "manifest.sha256").write_bytes(b" " * 5000), "at most 4096"),
    "huge lr": (say({"optim.param_groups.0.lr": 10**400}), "too large|finite"),
    "values as a tuple": (manifest_edit(lambda raw: raw.update(objects={"$tuple": [1]})), "in no parameter group"),
    "numbers of groups": (say({"optim.param_groups.00.lr": 1}), "names no value of a parameter group"),
    "other digits": (say({"optim.param_groups.\u0663.lr": 1}), "names no value of a parameter group"),
    "a scheduler too many": (say({"scheduler.7": {}}), "numbered from 0"),
    "a scheduler": (say({"scheduler.0": {}}), "1 schedulers, and 0 were given"),
    "state of another": (say({"optim.state.weight.exp_avg_sq": 1}), "another optimizer's"),
    "state of a stranger": (say({"optim.state.other.exp_avg": 1}), r"optim\.state\.other\.exp_avg"),
    "many entries": (say({f"optim.state.weight.{i}": i for i in range(99)}), "has 100 entries"),
    "many entries beside": (say({f"optim.beside.{i}": i for i in range(999)}), "more than 256 entries"),
    "a group twice": (say({f"optim.param_groups.1.{key}": value for key, value in
                           {"params": ["weight"], "lr": 1.0}.items()}), "is in the parameter groups 0 and 1"),
    "other generators": (manifest_edit(lambda raw: raw["objects"].update({"rng.0.python": {"$tuple": [1]}})), "gener"),
}  # fmt: skip


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


# Whole checkpoints, but not of this model.
FIT_FOR_ANOTHER = {
    "other shape", "other dtype", "group of others", "bad lr", "object for lr", "other generators", "no objects",
    "huge lr", "values as a tuple", "numbers of groups", "other digits", "a scheduler too many",
    "a scheduler", "state of another", "state of a stranger", "many entries", "many entries beside", "a group twice",
}  # fmt: skip


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


def test_a_small_manifest_takes_no_long_time(tmp_path: Path) -> None:
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


def test_what_is_shown_of_a_checkpoint_acts_upon_no_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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


def test_a_bomb_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above could fail."""
    monkeypatch.setenv("LION_DIST_TEST_BOMB", str(tmp_path / "exploded"))
    pickle.loads(pickle.dumps(Bomb()))
    assert (tmp_path / "exploded").exists()


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
        with pytest.raises(ValueError, match="s3://bucket/step-1 is no folder"):
            use("s3://bucket/step-1", model, optimizer)
    with pytest.raises(ValueError, match="is no folder"):
        Writer("s3://bucket/step-1")
    with pytest.raises(ValueError, match="keep_last"):
        Writer(tmp_path, keep_last=0)
    assert folders.number_of("step-0100") == 100
    assert folders.number_of("best") is None
