"""Weights as safetensors files: read by the package itself, and, byte by byte, by the format's documentation."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lion_dist import Lion
from lion_dist.checkpoint import convert
from lion_dist.checkpoint.convert import safetensors as module
from lion_dist.update.codecs import join
from tests.asserts import assert_same_bits

BF16 = torch.bfloat16
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": BF16, "I64": torch.int64,
    "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool, "C64": torch.complex64, "F8_E4M3": torch.float8_e4m3fn,
}  # fmt: skip


def read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata. Fails where the tensors leave gaps, overlap or are not aligned to their elements."""
    content = file.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:begin])
    assert begin % 8 == 0
    metadata = header.pop("__metadata__")
    at, found = 0, {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        first, last = entry["data_offsets"]
        dtype = DTYPES[entry["dtype"]]
        assert (first, (begin + first) % dtype.itemsize) == (at, 0), name
        raw = bytearray(content[begin + first : begin + last])
        t = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
        found[name], at = t.view(entry["shape"]), last
    assert begin + at == len(content)
    return found, metadata


class Model(nn.Module):
    """Weights in two dtypes, tied ones, one that is channels-last, one without elements, a scalar, and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6).to(BF16)
        self.head = nn.Linear(6, 11, bias=False).to(BF16)
        self.head.weight = self.embedding.weight
        kernel = torch.randn(4, 3, 2, 2).to(BF16).contiguous(memory_format=torch.channels_last)
        self.kernel = nn.Parameter(kernel)
        self.empty = nn.Parameter(torch.zeros(0, 3, dtype=BF16))
        self.frozen = nn.Parameter(torch.randn(5).to(BF16), requires_grad=False)
        self.norm = nn.LayerNorm(6)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("count", torch.arange(3))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("cache", torch.ones(9), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(self.embedding(x)).float().square().mean() + self.kernel.float().square().mean()
        return y + self.norm(torch.ones(6)).square().sum() * self.scale


def trained(model: nn.Module, steps: int = 3, **options: Any) -> Lion:
    optimizer = Lion(model.named_parameters(), lr=1e-4, master_weights=True, **options)
    for _ in range(steps):
        model(torch.arange(11)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def masters(model: nn.Module, optimizer: Lion) -> dict[str, Tensor]:
    return {
        name: join(p.detach(), optimizer.state[p]["remainder"]).contiguous()
        for name, p in model.named_parameters()
        if "remainder" in optimizer.state.get(p, {})
    }


def test_master_weights_are_written_as_float32(tmp_path: Path) -> None:
    model = Model()
    optimizer = trained(model)
    file = tmp_path / "model.safetensors"
    convert.to_safetensors(file, model, optimizer)
    found, metadata = read(file)
    expected = masters(model, optimizer)
    assert expected.keys() == {"embedding.weight", "kernel", "empty"}
    assert (expected["kernel"] != model.kernel.float()).any()
    expected |= {"frozen": model.frozen.float(), "scale": model.scale.detach()}  # frozen: no remainder yet
    expected |= {f"norm.{name}": p.detach() for name, p in model.norm.named_parameters()}
    expected |= {"count": model.get_buffer("count"), "mask": model.get_buffer("mask")}
    assert found.keys() == expected.keys()
    for name, t in expected.items():
        assert_same_bits(found[name], t, name)
    assert metadata == {"format": "pt", "head.weight": "embedding.weight"}
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_the_package_reads_it(tmp_path: Path) -> None:
    """load_file, and load_model with the tied weight, into a float32 model."""
    theirs = pytest.importorskip("safetensors.torch")
    model = Model()
    optimizer = trained(model)
    convert.to_safetensors(tmp_path / "m", model, optimizer)
    found, _ = read(tmp_path / "m")
    loaded = theirs.load_file(tmp_path / "m")
    assert loaded.keys() == found.keys()
    for name, t in found.items():
        assert_same_bits(loaded[name], t, name)
    whole = Model().float()
    assert theirs.load_model(whole, tmp_path / "m") == (set(), [])
    for name, w in masters(model, optimizer).items():
        assert_same_bits(whole.get_parameter(name).detach(), w, name)


def test_without_master_weights_every_tensor_keeps_its_dtype(tmp_path: Path) -> None:
    model = nn.Module()
    for name, dtype in DTYPES.items():
        model.register_buffer(name.lower(), torch.arange(7).to(dtype))
    model.register_parameter("weight", nn.Parameter(torch.randn(3, 5, dtype=BF16).T))
    for optimizer in (None, Lion(model.parameters())):
        convert.to_safetensors(tmp_path / "m", model, optimizer)
        found, _ = read(tmp_path / "m")
        assert {name: t.dtype for name, t in found.items()} == {n.lower(): d for n, d in DTYPES.items()} | {
            "weight": BF16
        }
        for name, t in model.state_dict().items():
            assert_same_bits(found[name], t.contiguous(), name)


def test_tensors_of_several_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", 64)
    model = Model()
    optimizer = trained(model)
    convert.to_safetensors(tmp_path / "m", model, optimizer)
    for name, w in masters(model, optimizer).items():
        assert_same_bits(read(tmp_path / "m")[0][name], w, name)


def test_a_failure_leaves_the_former_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "m"
    file.write_text("former")
    model = Model()

    def fail(descriptor: int) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", fail)
        with pytest.raises(OSError, match="no space left"):
            convert.to_safetensors(file, model)
    assert file.read_text() == "former"
    model.register_buffer("wide", torch.zeros(2, dtype=torch.complex128))
    with pytest.raises(TypeError, match=r"wide is torch\.complex128, which safetensors files cannot hold"):
        convert.to_safetensors(file, model)
    with pytest.raises(TypeError, match="expected lion_dist's Lion or ShardedLion, got SGD"):
        convert.to_safetensors(file, model, torch.optim.SGD(model.parameters()))
    assert (os.listdir(tmp_path), file.read_text()) == (["m"], "former")
    del model.wide
    convert.to_safetensors(file, model)
    assert read(file)[0].keys() >= {"kernel", "count"}
