"""Checkpoints that somebody has changed at random: each is refused by an error of ours with nothing changed, or loads
exactly what its manifest says."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import random
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, SequentialLR

from lion_dist import Lion, checkpoint
from lion_dist.checkpoint.__main__ import main
from lion_dist.checkpoint.json_values import from_json
from lion_dist.dtypes import DTYPES
from tests.asserts import bits

SECONDS = 20.0  # that a load may take, on a loaded machine; it takes some 20 ms
MIB = 200.0  # that all loads together may have taken at their peak


class Stateful(nn.Linear):
    """A module with an extra state."""

    def __init__(self) -> None:
        super().__init__(3, 5)
        self.kept: Any = {"seen": 3}

    def get_extra_state(self) -> Any:
        return self.kept

    def set_extra_state(self, state: Any) -> None:
        if isinstance(state, str):  # as users' code may have it
            raise ValueError(f"unknown extra state {state}")
        self.kept = state


class Run:
    """A model with a buffer and a bfloat16 part, an optimizer with two groups and entries of others, schedulers."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), Stateful().bfloat16())
        params = list(self.model.parameters())
        groups: list[dict[str, Any]] = [{"params": params[:1], "weight_decay": 0.5}, {"params": params[1:]}]
        self.optimizer = Lion(groups, lr=seed + 0.5)
        warmup = LambdaLR(self.optimizer, lambda step: 1 / (1 + step))
        self.scheduler = SequentialLR(self.optimizer, [warmup, LambdaLR(self.optimizer, lambda step: 0.5)], [2])
        self.optimizer.init_state()
        for i, (p, entry) in enumerate(self.optimizer.state.items()):
            entry["exp_avg"].normal_()
            entry.update(slow=torch.randn_like(p), count=i, seen=torch.tensor([float(i), 2.0, 3.0, 4.0]))
        state: dict[Any, Any] = self.optimizer.state
        state["rounds"] = 7 + seed
        random.seed(seed)

    def tensors(self) -> dict[str, Tensor]:
        """By the keys of a checkpoint."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        found = {f"model.{name}": t for name, t in self.model.state_dict().items() if isinstance(t, Tensor)}
        for p, entry in self.optimizer.state.items():
            if isinstance(p, Tensor):
                for key, value in entry.items():
                    if isinstance(value, Tensor):
                        found[f"optim.state.{names[id(p)]}.{key}"] = value
        return {key: bits(t) for key, t in found.items()}

    def values(self) -> dict[str, Any]:
        """All else, by the keys of a checkpoint."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        found: dict[str, Any] = {"scheduler.0": copy.deepcopy(self.scheduler.state_dict())}
        found["model.2._extra_state"] = copy.deepcopy(self.model[2].get_extra_state())
        for i, group in enumerate(self.optimizer.param_groups):
            found.update({f"optim.param_groups.{i}.{key}": value for key, value in group.items()})
            found[f"optim.param_groups.{i}.params"] = [names[id(p)] for p in group["params"]]
        for p, entry in self.optimizer.state.items():
            if not isinstance(p, Tensor):
                found[f"optim.beside.{p}"] = entry
                continue
            for key, value in entry.items():
                if not isinstance(value, Tensor):
                    found[f"optim.state.{names[id(p)]}.{key}"] = value
        found["rng.0.python"] = random.getstate()
        return found

    def load(self, path: Path) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return checkpoint.load(path, self.model, self.optimizer, schedulers=self.scheduler)


def save(path: Path) -> None:
    run = Run(0)
    checkpoint.save(path, run.model, run.optimizer, schedulers=run.scheduler, extra={"step": 3, "pair": (1, None)})


# Mutations ------------------------------------------------------------------------------------------

JUNK: list[Any] = [
    None, True, False, -1, 0, 1, 2, 7, 64, 1 << 30, (1 << 63) - 1, 1 << 63, 1 << 80, 10**400, 0.0, -0.5, 1e308, "", "x",
    "\x1b[31mred", "\ud800", "float32", "bfloat16", "complex64", "data-00000.bin", "../data-00000.bin", "0" * 5000,
    [], {}, [[]], [0], [1, 2], [1 << 62, 1 << 62], [0, 1 << 62], {"": 0}, {"$tuple": [1]}, {"$float": "nan"},
    {"$float": "inf"}, {"$dtype": "float32"}, {"$dict": [[1, 2]]}, {"$array": {"dtype": "uint8", "shape": [1],
    "values": [3]}}, {"$tensor": {"dtype": "float32", "shape": [1], "values": [0.5]}}, {"$bytes": "AAE="},
    {"$path": "/etc"}, {"$x": 1}, {"$tuple": 3},
]  # fmt: skip


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        found += places(inner, (*path, key))
    return found


def holder(raw: Any, path: tuple[Any, ...]) -> Any:
    for key in path[:-1]:
        raw = raw[key]
    return raw


def replace(raw: Any, draw: random.Random) -> None:
    path = draw.choice(places(raw))
    holder(raw, path)[path[-1]] = copy.deepcopy(draw.choice([*JUNK, nested(150), nested(250)]))


def remove(raw: Any, draw: random.Random) -> None:
    path = draw.choice(places(raw))
    del holder(raw, path)[path[-1]]


def swap(raw: Any, draw: random.Random) -> None:
    one, other = draw.choices(places(raw), k=2)
    if one != other[: len(one)] and other != one[: len(other)]:
        a, b = holder(raw, one), holder(raw, other)
        a[one[-1]], b[other[-1]] = b[other[-1]], a[one[-1]]


def nudge(raw: Any, draw: random.Random) -> None:
    """A number by one, or by a power of two."""
    numbers = [p for p in places(raw) if type(holder(raw, p)[p[-1]]) in (int, float)]
    for path in draw.sample(numbers, min(1, len(numbers))):
        holder(raw, path)[path[-1]] += draw.choice([-1, 1, 8, 1 << 20])


def rename(raw: Any, draw: random.Random) -> None:
    path = draw.choice(places(raw))
    of = holder(raw, path)
    if not isinstance(of, dict):
        return
    new = draw.choice(["", "x", path[-1] + "x", path[-1][:-1], "\x1b[2J", "optim.state.0.weight.exp_avg_sq",
                       "optim.param_groups.00.lr", "optim.param_groups.²." , "scheduler.7", "n" * 5000])  # fmt: skip
    of[new] = of.pop(path[-1])


def double(raw: Any, draw: random.Random) -> None:
    path = draw.choice(places(raw))
    of = holder(raw, path)
    if isinstance(of, list):
        of.append(copy.deepcopy(of[path[-1]]))
    else:
        of[str(path[-1]) + draw.choice(["2", ".more"])] = copy.deepcopy(of[path[-1]])


def escape(raw: Any, draw: random.Random) -> None:
    """A string that acts upon terminals, where users' code or a list of names has one: at the place itself, or added
    to one or two lists."""
    red = "\x1b[31mred"
    lists = [p for p in places(raw) if isinstance(holder(raw, p)[p[-1]], list)]
    kind = draw.randrange(3)
    if kind and lists:
        for path in draw.choices(lists, k=kind):
            holder(raw, path)[path[-1]].append(red)
        return
    for path in places(raw):
        if path[-1] == "model.2._extra_state":
            holder(raw, path)[path[-1]] = red


EDITS = (escape, replace, replace, remove, swap, nudge, rename, double)


def edit_manifest(path: Path, draw: random.Random) -> None:
    raw = json.loads((path / "manifest.json").read_text())
    part = draw.choice([raw, raw, raw["tensors"], raw["objects"], *raw["tensors"].values()])
    for _ in range(draw.choice([1, 1, 2, 4])):
        if places(part):
            draw.choice(EDITS)(part, draw)
    seal(path, json.dumps(raw).encode())


def edit_text(path: Path, draw: random.Random) -> None:
    text = bytearray((path / "manifest.json").read_bytes())
    at = draw.randrange(len(text))
    kind = draw.randrange(5)
    if kind == 0:
        text[at] ^= 1 << draw.randrange(8)
    elif kind == 1:
        del text[at : at + draw.randrange(1, 50)]
    elif kind == 2:
        text[at:at] = draw.choice([b"[" * 5000, b"9" * 5000, b"NaN", b"1e999", b'"\\ud800"', b"\xff\xfe", b"{", b"-"])
    elif kind == 3:
        del text[at:]
    else:
        text[at:at] = text[at : at + 200]
    seal(path, bytes(text))


def edit_data(path: Path, draw: random.Random) -> None:
    file = path / draw.choice(["data-00000.bin", "data-00000.bin", "manifest.sha256", "manifest.json"])
    content = bytearray(file.read_bytes())
    kind = draw.randrange(6)
    if kind == 0:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    elif kind == 1:
        del content[draw.randrange(len(content)) :]
    elif kind == 2:
        content += b"x" * draw.randrange(1, 100)
    file.unlink()
    if kind == 3:
        file.mkdir()
    elif kind == 4:
        os.mkfifo(file)
    elif kind != 5:
        file.write_bytes(content)


def seal(path: Path, text: bytes) -> None:
    (path / "manifest.json").write_bytes(text)
    (path / "manifest.sha256").write_text(f"{hashlib.sha256(text).hexdigest()}  manifest.json\n")


WAYS: list[Callable[[Path, random.Random], None]] = [*[edit_manifest] * 6, *[edit_text] * 2, edit_data]


# What is expected -----------------------------------------------------------------------------------


def read_by_hand(path: Path, held: dict[str, Any]) -> Tensor:
    """A tensor of the manifest, by nothing of lion_dist's."""
    dtype = DTYPES[held["dtype"]]
    found = torch.zeros(held["shape"], dtype=dtype)
    for chunk in held["chunks"]:
        count = math.prod(chunk["sizes"])
        with (path / chunk["file"]).open("rb") as file:
            file.seek(chunk["start"])
            raw = bytearray(file.read(count * dtype.itemsize))
        if count:
            where = tuple(slice(o, o + n) for o, n in zip(chunk["offsets"], chunk["sizes"], strict=True))
            found[where] = torch.frombuffer(raw, dtype=dtype).view(chunk["sizes"])
    return bits(found)


def canonical(value: Any) -> str:
    """Equal for equal values, tensors, NaN and all."""
    return repr(value)


def check_loaded(run: Run, path: Path, extra: Any) -> None:
    raw = json.loads((path / "manifest.json").read_text())
    tensors, values = run.tensors(), run.values()
    for key, t in tensors.items():
        if key in raw["tensors"]:
            assert torch.equal(t, read_by_hand(path, raw["tensors"][key])), key
        else:  # a small tensor among the values; or a momentum that the checkpoint lacks, which starts at zero
            assert key in raw["objects"] or not t.any(), key
    for key in raw["tensors"]:
        assert key in tensors or not key.startswith(("model.", "optim.state.")), key
    objects = {key: from_json(value) for key, value in raw["objects"].items()}
    assert canonical(extra) == canonical(objects.get("extra"))
    for key, value in objects.items():
        if key in values and not key.endswith((".betas", ".momentum_dtype")):  # which may be stored in another form
            if key.startswith("rng."):
                assert values[key] == value or objects.get("ranks") != 1, key
            elif key.startswith("scheduler."):  # LambdaLR takes from lr_lambdas what it has objects for
                for state in [*values[key]["_schedulers"], *value["_schedulers"]]:
                    state["lr_lambdas"] = None
                assert canonical(values[key]) == canonical(value), key
            else:
                assert canonical(values[key]) == canonical(value), key


def check_mutation(good: Path, path: Path, seed: int) -> str:
    """Returns how it went."""
    shutil.copytree(good, path)
    draw = random.Random(seed)
    draw.choice(WAYS)(path, draw)
    run = Run(1)
    tensors, values, generator = run.tensors(), run.values(), torch.get_rng_state()
    begin = time.monotonic()
    refusal, extra = "", None
    try:
        extra = run.load(path)
    except (ValueError, FileNotFoundError, TypeError) as error:
        refusal = str(error)
    if refusal:
        assert refusal.replace("\n", "").isprintable(), f"{refusal!r} acts upon a terminal"
        after = run.tensors()
        assert after.keys() == tensors.keys()
        assert all(torch.equal(after[key], t) for key, t in tensors.items()), f"tensors changed: {refusal}"
        assert canonical(run.values()) == canonical(values), f"values changed: {refusal}"
        assert torch.equal(torch.get_rng_state(), generator)
        outcome = "refused"
    else:
        check_loaded(run, path, extra)
        outcome = "loaded"
    main([str(path)])
    assert time.monotonic() - begin < SECONDS
    shutil.rmtree(path)
    return outcome


def try_mutations(seeds: Sequence[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "good")
    Run(1).load(tmp_path / "good")
    before = resident_peak()
    outcomes = []
    for seed in seeds:
        try:
            outcomes.append(check_mutation(tmp_path / "good", tmp_path / f"bad-{seed}", seed))
            shown = capsys.readouterr()
            assert (shown.out + shown.err).replace("\n", "").isprintable()
        except BaseException as error:
            raise AssertionError(f"mutation {seed}: {type(error).__name__}: {error}") from error
    assert outcomes.count("refused") > 0.6 * len(outcomes)
    assert outcomes.count("loaded") > 0.02 * len(outcomes)  # or nothing of check_loaded has been tried
    assert resident_peak() - before < MIB


def resident_peak() -> float:
    """MiB."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def test_mutations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try_mutations([*range(60), 3249], tmp_path, capsys)


@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
def test_many_mutations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try_mutations(range(1000, 3500), tmp_path, capsys)
