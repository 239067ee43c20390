"""Weights that never get a gradient stay where they are with ours, at every stage, and drift with DeepSpeed's own.

Where c is 0, DeepSpeed's Lion on GPUs takes the sign to be -1 (`c > 0 ? -lr : lr`) and so adds lr to the weight; its
Lion on CPUs takes that of +0 (`-copysign(lr, c)`) and subtracts it.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lion_dist
from tests.asserts import assert_same_bits
from tests.harness import run_ranks
from tests.marks import skip_module_without

from .common import engine_of, make_config, micro_steps, needs_cpu_lion, start_deepspeed, weights

skip_module_without("deepspeed")

STEPS, LR = 8, 1e-2
USED = 7  # of 37 rows


class Words(nn.Module):
    """An embedding of which every rank uses rows below USED alone, under a linear head."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.rows = nn.Embedding(37, 12)
        self.head = nn.Linear(12, 5)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator)
        self.rank = rank

    def forward(self, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(7 * step + self.rank)
        words = torch.randint(USED, (4,), generator=generator).to(self.rows.weight.device)
        return self.head(self.rows(words)).float().square().mean()


def body_unused_rows(rank: int, world_size: int, ours: bool) -> dict[str, float]:
    """How far the unused rows went, by case; the used ones must have moved."""
    deepspeed = start_deepspeed(rank, world_size)
    if ours:
        lion_dist.deepspeed.register()
    drifts = {}
    for stage, offload, dtype in itertools.product(range(4), (False, True), ("fp32", "bf16")):
        if offload and (stage == 0 or dtype == "bf16"):
            continue
        if not ours and not offload:  # that would be its Lion for GPUs
            continue
        case = f"stage {stage}, offload {offload}, {dtype}"
        model = Words(rank)
        config = make_config(stage, dtype, offload, optimizer={"type": "Lion", "params": {"lr": LR}})
        with engine_of(deepspeed, model, config) as engine:
            start = weights(deepspeed, engine)["rows.weight"]
            micro_steps(engine, 0, STEPS)
            end = weights(deepspeed, engine)["rows.weight"]
        assert not torch.equal(end[:USED], start[:USED]), case
        if ours:
            assert_same_bits(end[USED:], start[USED:], case)
        drifts[case] = (end[USED:].float() - start[USED:].float()).abs().max().item()
    return drifts


def test_unused_rows_stay_at_every_stage(tmp_path: Path) -> None:
    for drifts in run_ranks(body_unused_rows, 2, tmp_path, (True,)):
        assert len(drifts) == 11


@pytest.mark.exhaustive  # compiles DeepSpeed's extension, which takes minutes, to show what their optimizer does
@needs_cpu_lion
def test_deepspeeds_own_lion_drifts(tmp_path: Path) -> None:
    for drifts in run_ranks(body_unused_rows, 2, tmp_path, (False,)):
        assert len(drifts) == 3
        for case, drift in drifts.items():
            assert drift == pytest.approx(STEPS * LR, rel=0.05), case
