"""Lightning, with the real package: ShardedLion under DDPStrategy (stage 1) and under our strategy (stage 2)."""

from __future__ import annotations

import os
import signal
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lion_dist import Lion, ShardedLion
from tests.harness import run_ranks, spawn_only
from tests.marks import skip_module_without

skip_module_without("lightning")

WIDTH, STEPS_AN_EPOCH, EPOCHS = 33, 2, 3  # 33: no even share for two ranks
OPTIONS: list[dict[str, Any]] = [
    {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05},
    {"precision": "bf16-mixed", "gradient_clip_val": 0.05},
]
KINDS = ("lion", "stage1", "stage2")


def lightning() -> tuple[Any, Any]:
    """lightning.pytorch, and the plugin for ranks that are there already. The ranks alone import them."""
    environments = import_module("lightning.pytorch.plugins.environments")
    return import_module("lightning.pytorch"), environments.LightningEnvironment()


def fit(rank: int, kind: str, options: dict[str, Any], ckpt: Path | None = None, callbacks: Any = ()) -> list[float]:
    """Trains on CPUs, from a checkpoint or from the start; the loss of every batch on this rank.

    Each rank begins with weights, a buffer and a parameter that no optimizer holds of its own.
    """
    pl, environment = lightning()
    from lion_dist.lightning import ShardedLionStrategy

    os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0")  # as Lightning's own launcher leaves them
    losses: list[float] = []

    class Net(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(rank)
            self.net = nn.Sequential(nn.Linear(WIDTH, 30), nn.Tanh(), nn.Linear(30, 5))
            self.unheld = nn.Parameter(torch.randn(5), requires_grad=False)
            self.register_buffer("shift", torch.randn(5))

        def training_step(self, batch: Tensor) -> Tensor:
            loss = (self.net(batch) + self.unheld + self.shift).square().mean()
            losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            named = self.net.named_parameters()
            return Lion(named, lr=0.01) if kind == "lion" else ShardedLion(named, lr=0.01, stage=int(kind[-1]))

    batches = 2 * STEPS_AN_EPOCH * options.get("accumulate_grad_batches", 1)
    data = torch.randn(4 * batches, WIDTH, generator=torch.Generator().manual_seed(0))
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, max_epochs=EPOCHS, callbacks=list(callbacks), logger=False,
        enable_checkpointing=bool(callbacks), enable_progress_bar=False, enable_model_summary=False,
        **{"strategy": ShardedLionStrategy() if kind == "stage2" else "ddp", "plugins": [environment]} | options,
    )  # fmt: skip
    loader: Any = torch.utils.data.DataLoader(data, batch_size=4)  # type: ignore[arg-type]
    trainer.fit(Net(), loader, ckpt_path=ckpt, weights_only=True)
    return losses


def body_trains(rank: int, world_size: int) -> None:
    pl, environment = lightning()
    from lion_dist.lightning import ShardedLionStrategy

    for options in OPTIONS:
        expected, *others = (fit(rank, kind, options) for kind in KINDS)
        assert len(expected) == EPOCHS * STEPS_AN_EPOCH * options.get("accumulate_grad_batches", 1)
        assert expected[-1] < expected[0]
        assert others == [expected, expected]

    with pytest.raises(ValueError, match=r"configure_optimizers returned ShardedLion\(stage=1\)"):
        fit(rank, "stage1", {"strategy": ShardedLionStrategy()})
    with pytest.raises(TypeError, match="does not take find_unused_parameters"):
        ShardedLionStrategy(find_unused_parameters=True)
    scaled = pl.plugins.MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    with pytest.raises(ValueError, match="does not support precision='16-mixed'"):
        fit(rank, "stage2", {"plugins": [environment, scaled]})
    with pytest.raises(ValueError, match="gradient_clip_algorithm='value' needs whole gradients"):
        fit(rank, "stage2", {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"})
    with pytest.raises(RuntimeError, match=r"DDPStrategy, .* by lion_dist\.lightning\.ShardedLionStrategy"):
        fit(rank, "stage2", {**OPTIONS[1], "strategy": "ddp"})


def test_trains_as_lion_under_ddp(tmp_path: Path) -> None:
    """The same losses, digit for digit, with accumulation, clipping and bf16-mixed; errors by name."""
    run_ranks(body_trains, 2, tmp_path, on_cpu=True)


def body_killed(rank: int, world_size: int, folder: Path, kind: str) -> None:
    pl, _ = lightning()

    class Kill(pl.Callback):  # type: ignore[misc, name-defined]
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step == STEPS_AN_EPOCH + 1:
                dist.barrier()
                os.kill(os.getpid(), signal.SIGKILL)

    save = pl.callbacks.ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    fit(rank, kind, OPTIONS[0], callbacks=[save, Kill()])


def body_resumed(rank: int, world_size: int, folder: Path) -> None:
    """Under each optimizer, whichever of them saved."""
    undisturbed = fit(rank, "lion", OPTIONS[0])
    rest = undisturbed[len(undisturbed) // EPOCHS :]
    for kind in KINDS:
        assert fit(rank, kind, OPTIONS[0], ckpt=folder / "epoch=0.ckpt") == rest, kind


@spawn_only
@pytest.mark.parametrize("kind", [pytest.param("stage1", marks=pytest.mark.exhaustive), "stage2"])
def test_killed_and_resumed(kind: str, tmp_path: Path) -> None:
    """kill -9 after a checkpoint: new processes go on with the losses of a run that nobody disturbed."""
    with pytest.raises(pytest.fail.Exception, match="exit code -9"):
        run_ranks(body_killed, 2, tmp_path, (tmp_path, kind), on_cpu=True)
    run_ranks(body_resumed, 2, tmp_path, (tmp_path,), on_cpu=True)
