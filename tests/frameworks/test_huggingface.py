"""Accelerate and the Trainer, with the real packages: ShardedLion at both stages."""

from __future__ import annotations

import contextlib
import os
import signal
import warnings
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from packaging.version import Version
from torch import Tensor, nn

from lion_dist import Lion, ShardedLion
from tests.harness import run_ranks, spawn_only
from tests.marks import skip_module_without

skip_module_without("accelerate", "transformers")

WIDTH, STEPS, SAVED = 33, 5, 3  # 33: no even share for two ranks
OPTIMIZERS: dict[str, Any] = {
    "lion": (Lion, {"lr": 0.01}),
    "stage1": (ShardedLion, {"lr": 0.01, "stage": 1}),
    "stage2": (ShardedLion, {"lr": 0.01, "stage": 2}),
}


class Net(nn.Module):
    """``forward(x)`` is {"loss": ...} of a batch, and keeps it.

    Each rank begins with weights, a buffer and a parameter that no optimizer steps of its own.
    """

    shift: Tensor

    def __init__(self, rank: int) -> None:
        super().__init__()
        torch.manual_seed(rank)
        self.net = nn.Sequential(nn.Linear(WIDTH, 30), nn.Tanh(), nn.Linear(30, 5))
        self.unheld = nn.Parameter(torch.randn(5), requires_grad=False)
        self.register_buffer("shift", torch.randn(5))
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        loss = (self.net(x) + self.unheld + self.shift).square().mean()
        self.losses.append(loss.item())
        return {"loss": loss}


def start(rank: int) -> None:
    """What torchrun tells its ranks."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="localhost", MASTER_PORT="0")


def accelerated(rank: int, kind: str, folder: Path, steps: range, mixed_precision: str = "no") -> list[float]:
    """Trains by Accelerate; a checkpoint after step SAVED, or from it where the steps begin there.

    Args:
        kind: of OPTIMIZERS, or "alone": stage 1 and a hook, with Accelerate's own Accelerator.
    """
    accelerate: Any = import_module("accelerate")
    from lion_dist.huggingface import ShardedLionAccelerator

    accelerator_cls = accelerate.Accelerator if kind == "alone" else ShardedLionAccelerator
    accelerator = accelerator_cls(cpu=True, gradient_accumulation_steps=2, mixed_precision=mixed_precision)
    net = Net(rank)
    cls, options = OPTIMIZERS["stage1" if kind == "alone" else kind]
    model, optimizer = accelerator.prepare(net, cls(net.net.parameters(), **options))
    if kind == "alone":
        hooked(optimizer.optimizer)
    if steps.start:
        accelerator.load_state(str(folder / kind))
    batches = torch.randn(2 * STEPS, 2, 4, WIDTH, generator=torch.Generator().manual_seed(0))
    for step in steps:
        for x in batches[2 * step : 2 * step + 2, rank]:
            with accelerator.accumulate(model):
                accelerator.backward(model(x)["loss"])
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.05)
                optimizer.step()
                optimizer.zero_grad()
        if step + 1 == SAVED:
            accelerator.save_state(str(folder / kind))
    accelerator.free_memory()
    accelerator.state._reset_state(reset_partial_state=True)
    return net.losses


def trained(
    rank: int, kind: str, folder: Path, resume: str | None = None, callbacks: Any = (), **options: Any
) -> list[float]:
    """Trains by the Trainer, which saves after step SAVED; or from there."""
    transformers: Any = import_module("transformers")
    from lion_dist.huggingface import ShardedLionTrainerMixin

    class Trainer(ShardedLionTrainerMixin, transformers.Trainer):  # type: ignore[misc]
        pass

    arguments = transformers.TrainingArguments(
        str(folder / f"trainer-{kind}"), use_cpu=True, max_steps=STEPS, per_device_train_batch_size=4, save_steps=SAVED,
        gradient_accumulation_steps=2, max_grad_norm=0.05, report_to="none", disable_tqdm=True, seed=0,
        dataloader_pin_memory=False, **options,
    )  # fmt: skip
    data = torch.randn(8 * 2 * STEPS, WIDTH, generator=torch.Generator().manual_seed(0))
    net = Net(rank)
    trainer = Trainer(
        model=net, args=arguments, train_dataset=[{"x": x} for x in data], callbacks=list(callbacks),
        optimizer_cls_and_kwargs=OPTIMIZERS[kind],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    import_module("accelerate.state").AcceleratorState._reset_state(reset_partial_state=True)
    return net.losses


def refused(rank: int) -> None:
    """Errors by name. It leaves gradients under way."""
    from lion_dist.huggingface import ShardedLionAccelerator

    accelerator = ShardedLionAccelerator(cpu=True)
    net = Net(rank)
    optimizer = ShardedLion(net.net.parameters(), lr=0.01)
    accelerator.scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(ValueError, match="does not support mixed_precision='fp16'"):
        accelerator.prepare(net, optimizer)
    accelerator.scaler = None
    other = nn.Linear(2, 2)
    for stranger in (torch.optim.SGD(other.parameters()), ShardedLion(other.parameters(), stage=1)):
        with pytest.raises(ValueError, match=rf"got ShardedLion\(stage=2\) and {type(stranger).__name__}, for which"):
            accelerator.prepare(net, other, optimizer, stranger)
    model, optimizer = accelerator.prepare(net, optimizer)
    accelerator.backward(model(torch.ones(2, WIDTH))["loss"])
    with pytest.raises(ValueError, match=r"got norm_type=1 and 5 parameters, where the optimizer has 4"):
        accelerator.clip_grad_norm_(net.parameters(), 1.0, norm_type=1)
    with pytest.raises(ValueError, match="got norm_type=2 and 2 parameters, where the optimizer has 4"):
        accelerator.clip_grad_norm_(net.net[0].parameters(), 1.0)
    with pytest.raises(ValueError, match="clip_grad_value_ needs whole gradients"):
        accelerator.clip_grad_value_(net.parameters(), 1.0)


def hooked(optimizer: Any) -> Any:
    """The optimizer, with a hook that makes each state_dict() whole."""
    optimizer.register_state_dict_pre_hook(ShardedLion.consolidate_state_dict)
    return optimizer


def refused_saves(rank: int, folder: Path) -> None:
    """Saves that would fail are refused, or warned of, in the first step at the latest."""
    accelerate: Any = import_module("accelerate")
    transformers: Any = import_module("transformers")
    from lion_dist.huggingface import ShardedLionAccelerator, ShardedLionTrainerMixin

    class Trainer(ShardedLionTrainerMixin, transformers.Trainer):  # type: ignore[misc]
        pass

    def arguments(**options: Any) -> Any:
        options |= {"max_steps": 1, "report_to": "none", "dataloader_pin_memory": False}
        return transformers.TrainingArguments(str(folder / "refused"), use_cpu=True, **options)

    net = Net(rank)
    optimizer = ShardedLion(net.net.parameters(), lr=0.01, stage=1)
    each_node = accelerate.utils.ProjectConfiguration(save_on_each_node=True)
    with pytest.raises(ValueError, match="save_on_each_node=True is not supported with ShardedLion"):
        ShardedLionAccelerator(cpu=True, project_config=each_node).prepare(net, optimizer)
    with pytest.raises(ValueError, match="save_on_each_node=True is not supported with ShardedLion"):
        Trainer(model=net, args=arguments(save_on_each_node=True))

    for warns in (True, False):
        net = Net(rank)
        optimizer = ShardedLion(net.net.parameters(), lr=0.01, stage=1)
        model, wrapped = accelerate.Accelerator(cpu=True).prepare(net, optimizer)
        if not warns:
            hooked(optimizer)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                model(torch.ones(2, WIDTH))["loss"].backward()
                wrapped.step()
        found = [str(warning.message) for warning in caught if "save_state() fails" in str(warning.message)]
        assert len(found) == warns
    other = Net(rank)
    other(torch.ones(2, WIDTH))["loss"].backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ShardedLion(other.net.parameters(), lr=0.01).step()  # not by Accelerate

    class Own(transformers.Trainer):  # type: ignore[misc]
        def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
            self.optimizer.optimizer.consolidate_state_dict()
            super()._save_optimizer_and_scheduler(output_dir)

    class Hook(transformers.TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *args: Any, optimizer: Any, **kwargs: Any) -> None:
            hooked(optimizer.optimizer)

    data: Any = [{"x": torch.ones(WIDTH)}] * 16
    plain = transformers.Trainer
    for trainer_cls, saves, refused in (
        (plain, {"save_steps": 1}, True),
        (plain, {"save_strategy": "epoch"}, True),
        (plain, {"save_strategy": "no"}, False),
        (plain, {"save_steps": 1, "save_only_model": True}, False),
        (Own, {"save_steps": 1}, False),
    ):
        net = Net(0)  # on every rank, so that the optimizer changes nothing when it is made
        trainer = trainer_cls(
            model=net, args=arguments(**saves), train_dataset=data, optimizer_cls_and_kwargs=OPTIMIZERS["stage1"]
        )
        if refused:  # it would leave the other ranks waiting in the first rank's save
            trainer.add_callback(Hook())
        before = [p.detach().clone() for p in net.parameters()]
        with pytest.raises(RuntimeError, match="ShardedLionTrainerMixin") if refused else contextlib.nullcontext():
            trainer.train()
        assert all(map(torch.equal, net.parameters(), before)) == refused
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(transformers.Trainer, "_save_optimizer_and_scheduler")
        with pytest.raises(RuntimeError, match=r"no Trainer\._save_optimizer_and_scheduler"):
            Trainer(model=net, args=arguments())


def wraps_other_models(rank: int) -> None:
    """A scheduler of the optimizer of stage 2 leaves no other model of a call of `prepare` unwrapped."""
    from lion_dist.huggingface import ShardedLionAccelerator

    accelerator = ShardedLionAccelerator(cpu=True)
    net, other = Net(rank), nn.Linear(2, 2)
    optimizer = ShardedLion(net.net.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    assert accelerator.prepare(net, optimizer)[0] is net
    prepared = accelerator.prepare(other, scheduler)[0]
    assert type(prepared) is nn.parallel.DistributedDataParallel


def body_trains(rank: int, world_size: int, folder: Path) -> None:
    start(rank)
    for mixed in ("no", "bf16"):
        expected, *others = (accelerated(rank, kind, folder, range(STEPS), mixed) for kind in OPTIMIZERS)
        assert len(expected) == 2 * STEPS
        assert expected[-1] < expected[0]
        assert others == [expected, expected]
        expected, *others = (trained(rank, kind, folder, bf16=mixed == "bf16") for kind in OPTIMIZERS)
        assert len(expected) == 2 * STEPS
        assert others == [expected, expected]
    refused(rank)
    wraps_other_models(rank)
    refused_saves(rank, folder)


def test_trains_as_lion_under_ddp(tmp_path: Path) -> None:
    """The same losses, digit for digit, with accumulation, clipping and bf16; errors by name."""
    run_ranks(body_trains, 2, tmp_path, (tmp_path,), on_cpu=True)


def body_killed(rank: int, world_size: int, folder: Path) -> None:
    transformers: Any = import_module("transformers")

    class Kill(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == SAVED + 1:
                dist.barrier()
                os.kill(os.getpid(), signal.SIGKILL)

    start(rank)
    for kind in (*OPTIMIZERS, "alone"):
        accelerated(rank, kind, folder, range(SAVED + 1))
    trained(rank, "stage1", folder)
    trained(rank, "stage2", folder, callbacks=[Kill()])


def body_resumed(rank: int, world_size: int, folder: Path) -> None:
    start(rank)
    undisturbed = accelerated(rank, "lion", folder / "undisturbed", range(STEPS))
    for kind in (*OPTIMIZERS, "alone"):
        assert accelerated(rank, kind, folder, range(SAVED, STEPS)) == undisturbed[2 * SAVED :], kind
    undisturbed = trained(rank, "lion", folder)
    for kind, saved_by in {"lion": "stage2", "stage1": "stage1", "stage2": "stage2"}.items():
        checkpoint = folder / f"trainer-{saved_by}" / f"checkpoint-{SAVED}"
        assert trained(rank, kind, folder, resume=str(checkpoint)) == undisturbed[2 * SAVED :], kind


@spawn_only
@pytest.mark.skipif(
    Version(metadata.version("transformers")) < Version("5.18"),
    reason="older Trainers cannot load any optimizer on several CPU ranks",
)
def test_killed_and_resumed(tmp_path: Path) -> None:
    """kill -9 after a checkpoint: new processes go on with the losses of a run that nobody disturbed."""
    with pytest.raises(pytest.fail.Exception, match="exit code -9"):
        run_ranks(body_killed, 2, tmp_path, (tmp_path,), on_cpu=True)
    run_ranks(body_resumed, 2, tmp_path, (tmp_path,), on_cpu=True)
