"""Accelerate and the Trainer, with the real packages: both call deepspeed.initialize themselves."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

import lion_dist
from lion_dist.deepspeed_config import arguments
from tests.examples.runs import DATA
from tests.harness import run_ranks
from tests.marks import skip_module_without

from .common import make_config, start_deepspeed

skip_module_without("deepspeed", "accelerate", "transformers")

ROOT = Path(__file__).parents[2]


def body_hugging_face(rank: int, world_size: int, out: Path) -> list[str]:
    start_deepspeed(rank, world_size)
    sys.path.insert(0, str(ROOT / "examples"))
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.state import AcceleratorState
    from accelerate.utils import DummyOptim

    import hf_trainer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    lines = []
    for name in ("zero2", "zero3"):
        options = {"device": device, "steps": 10, "width": 32, "seq-len": 32, "data": DATA, "out": out}
        argv = [str(ROOT / "launch/deepspeed" / f"{name}.json"), *(f"--{k}={v}" for k, v in options.items())]
        lines.append(hf_trainer.train(hf_trainer.parse(argv)))
        AcceleratorState._reset_state(reset_partial_state=True)

    # What the Trainer makes of "auto": Adam's own, where its arguments say nothing else.
    from transformers import TrainingArguments
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    auto = make_config(2, optimizer={"params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")})
    filled = HfTrainerDeepSpeedConfig(auto)
    filled.trainer_config_process(TrainingArguments(str(out), use_cpu=True, learning_rate=0.02, weight_decay=0.3))
    params = filled.config["optimizer"]["params"]
    with pytest.warns(UserWarning, match="are Adam's"), pytest.warns(UserWarning, match="meaning for Lion: eps"):
        assert arguments(params) == {"lr": 0.02, "betas": [0.9, 0.999], "weight_decay": 0.3}

    # What accelerate makes of a config: "auto" filled in from what it is given.
    params = {"lr": "auto", "betas": [0.95, 0.98], "weight_decay": "auto"}
    config = make_config(2, optimizer={"type": "Lion", "params": params})
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))
    model = torch.nn.Linear(7, 3)
    model, optimizer = accelerator.prepare(model, DummyOptim(model.parameters(), lr=0.03, weight_decay=0.2))
    basic = model.basic_optimizer
    assert type(basic) is lion_dist.deepspeed.DeepSpeedLion
    group = basic.param_groups[0]
    assert (group["lr"], tuple(group["betas"]), group["weight_decay"]) == (0.03, (0.95, 0.98), 0.2)
    before = model.module.weight.detach().clone()
    x = torch.ones(2, 7, device=before.device)  # the Trainer above has set accelerate's own device to the CPU
    accelerator.backward(model(x).square().mean())
    optimizer.step()
    step = (model.module.weight.detach() - before * (1 - 0.03 * 0.2)).abs()
    assert torch.allclose(step, torch.full_like(step, 0.03), atol=1e-6)
    return lines


def test_the_trainer_and_accelerate_build_our_lion(tmp_path: Path) -> None:
    """examples/hf_trainer.py at stages 2 and 3, and Accelerator.prepare; and what both fill in for "auto"."""
    for lines in run_ranks(body_hugging_face, 2, tmp_path, (tmp_path / "out",)):
        for line in lines:
            found = re.fullmatch(r"optimizer=DeepSpeedLion first_loss=(\S+) last_loss=(\S+)", line)
            assert found, line
            first, last = map(float, found.groups())
            assert last < first
        assert len(lines) == 2
