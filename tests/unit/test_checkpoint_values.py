"""Values of a checkpoint that are no tensors: they come back, or are refused by name."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter, defaultdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy
import pytest
import torch
from torch import nn

from lion_dist import checkpoint
from lion_dist.checkpoint import json_values
from lion_dist.checkpoint.json_values import from_json, to_json
from tests.asserts import assert_same_bits

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


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


def test_numpys_generators_resume(tmp_path: Path) -> None:
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


def test_arrays_without_numpy_raise_value_error(monkeypatch: pytest.MonkeyPatch) -> None:
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
