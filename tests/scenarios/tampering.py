"""Checkpoints that were damaged or written by an attacker, and the error that each must raise."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any


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
    "object for lr": (say({"optim.param_groups.0.lr": {"$x": 1}}), "is nothing that"),
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


# Whole checkpoints, but not of this model.
FIT_FOR_ANOTHER = {
    "other shape", "other dtype", "group of others", "bad lr", "object for lr", "other generators", "no objects",
    "huge lr", "values as a tuple", "numbers of groups", "other digits", "a scheduler too many",
    "a scheduler", "state of another", "state of a stranger", "many entries", "many entries beside", "a group twice",
}  # fmt: skip
