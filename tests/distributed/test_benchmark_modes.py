"""The ways over FSDP that benchmarks/iteration.py measures, at a tiny size: they train alike, ours and the peers'."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from benchmarks.llama import LanguageModel, Llama
from benchmarks.peer_steps import LR, missing
from benchmarks.peers import MODES, Trainer
from benchmarks.step_alone import TwoSets, local_parts, params_of
from tests.harness import device_of, run_ranks

SIZES = Llama(vocabulary=40, layers=2, width=16, heads=4, kv_heads=2, ffn=24, seq_len=8)


def whole_weights(mode: str, rank: int, device: torch.device) -> dict[str, Any]:
    """After three iterations, and one more step of the optimizer alone where it communicates nothing."""
    torch.manual_seed(0)
    with device:
        model = LanguageModel(SIZES)
    trainer = MODES[mode].make(model, Namespace(clip=False, replicas=2, bucket_mb=0.01))
    generator = torch.Generator().manual_seed(rank)
    batches = [torch.randint(SIZES.vocabulary, (2, SIZES.seq_len), generator=generator).to(device) for _ in range(3)]
    for tokens in batches:
        trainer.backward(trainer.forward(tokens))
        trainer.step()
    if trainer.local is not None:
        step_alone(trainer, batches)
    else:
        trainer.backward(trainer.forward(batches[0]))
        trainer.step()
    wrapped: Any = trainer.forward
    return get_model_state_dict(wrapped, options=StateDictOptions(full_state_dict=True))


def step_alone(trainer: Trainer, batches: list[Tensor]) -> None:
    """With the first of two sets of gradients, as benchmarks/step_alone.py takes turns with them."""
    params = params_of(trainer.local)
    gradients = TwoSets(params, lambda number: trainer.backward(trainer.forward(batches[number])))

    def addresses() -> set[int]:
        return {g.data_ptr() for g in local_parts([p.grad for p in params if p.grad is not None]) if g.numel()}

    second = addresses()
    gradients.exchange()
    assert second
    assert not second & addresses()
    trainer.local.step()


def check_modes(rank: int, world_size: int, modes: list[str]) -> None:
    device = device_of(rank, world_size)
    expected = whole_weights("ddp", rank, device)
    for mode in modes:
        got = whole_weights(mode, rank, device)
        assert set(got) == set(expected), mode
        for name, weight in expected.items():
            # Sums of gradients may be rounded otherwise, which changes a sign where it is all but undecided.
            near = torch.isclose(got[name], weight, rtol=0, atol=LR / 10).float().mean()
            alike = 0.95 if "flashlion" in mode or "bf16" in mode else 0.99
            assert near > alike, f"{mode}, {name}: {near:.4f} of it is right"


def body_modes(rank: int, world_size: int) -> None:
    names = [m for m in MODES if m.startswith("fsdp") and "bf16" not in m and not missing(MODES[m].distribution)]
    check_modes(rank, world_size, names)


def body_modes_over_a_mesh(rank: int, world_size: int) -> None:
    check_modes(rank, world_size, ["hsdp", "hsdp_bf16", "hybrid", "hybrid_signs"])


def test_modes_over_fsdp_train_alike(tmp_path: Path) -> None:
    pytest.importorskip("lion_pytorch")
    run_ranks(body_modes, 2, tmp_path)


def test_modes_over_a_mesh_train_alike(tmp_path: Path) -> None:
    """Two replicas of two shards."""
    run_ranks(body_modes_over_a_mesh, 4, tmp_path)
