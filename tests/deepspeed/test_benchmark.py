"""The modes of benchmarks/iteration.py that train through DeepSpeed with our Lion, on a model small enough for a CPU.

Those with DeepSpeed's own run on GPUs only: its FusedLion has no other code.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.harness import device_of, run_ranks
from tests.marks import skip_module_without

from .common import start_deepspeed

skip_module_without("deepspeed")

STEPS = 4
CLIPS = {
    "deepspeed_zero1_lion_dist": 0.0,
    "deepspeed_zero2_lion_dist": 0.0,
    "deepspeed_zero3_lion_dist": 0.0,
    "deepspeed_zero2_lion_dist_clips": 1.0,
}


def body_modes(rank: int, world_size: int) -> dict[str, list[float]]:
    start_deepspeed(rank, world_size)
    from benchmarks.llama import LanguageModel, Llama
    from benchmarks.peers import MODES

    sizes = Llama(vocabulary=61, layers=2, width=32, heads=4, kv_heads=2, ffn=64, seq_len=16)
    device = device_of(rank, world_size)
    losses: dict[str, list[float]] = {}
    for mode, max_norm in CLIPS.items():
        torch.manual_seed(0)
        model = LanguageModel(sizes).to(device)
        trainer = MODES[mode].make(model, Namespace(sequences=2, clip=False))
        engine: Any = trainer.forward
        assert type(engine.basic_optimizer).__name__ == "DeepSpeedLion", mode
        assert engine.gradient_clipping() == max_norm, mode
        tokens = torch.randint(61, (2, 16), generator=torch.Generator().manual_seed(rank)).to(device)
        losses[mode] = []
        for _ in range(STEPS):
            with torch.autocast(device.type, torch.bfloat16):
                loss = trainer.forward(tokens)
            trainer.backward(loss)
            trainer.step()
            losses[mode].append(loss.item())
        engine.destroy()
    return losses


def test_modes_with_our_lion_train_alike_at_every_stage(tmp_path: Path) -> None:
    for losses in run_ranks(body_modes, 2, tmp_path):
        first = losses["deepspeed_zero1_lion_dist"]
        assert first[-1] < first[0]
        for mode, found in losses.items():
            assert found[0] == pytest.approx(first[0], abs=1e-6), mode
            if not CLIPS[mode]:
                assert found == pytest.approx(first, abs=1e-3), mode
