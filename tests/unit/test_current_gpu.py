"""Parameters on another GPU than the current one. The tensors are fakes, so that no GPU is needed."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lion_dist.checkpoint import api
from lion_dist.meshes import device_on


def test_checkpoints_are_exchanged_on_the_models_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    made_current: list[Any] = []
    monkeypatch.setattr(torch.cuda, "device", lambda gpu: made_current.append(gpu) or nullcontext())
    with FakeTensorMode():
        on_gpu = nn.ParameterList([torch.empty(2), torch.empty(2, device="cuda:1")])
    for model in (on_gpu, nn.Linear(2, 2), nn.Identity(), None):
        with api._on_gpu_of(model):  # type: ignore[arg-type]
            pass
    assert made_current == [torch.device("cuda", 1)]


class Mesh:
    def __init__(self, device_type: str) -> None:
        self.device_type = device_type


def test_sums_over_a_mesh_stay_on_their_gpu() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 1)
    assert device_on(Mesh("cuda"), gpu) == gpu
    assert device_on(Mesh("cuda"), cpu) == torch.device("cuda")
    assert device_on(Mesh("cpu"), cpu) == cpu
