"""The ways to train with DeepSpeed that benchmarks.iteration measures."""

from __future__ import annotations

import logging
import os
from argparse import Namespace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

import lion_dist

from .llama import LanguageModel
from .peer_steps import BETAS, DECAY, LR, name_plain_architectures
from .trainer import MAX_NORM, Mode, Trainer, on_gpu


def deepspeed_zero(
    model: LanguageModel,
    options: Namespace,
    stage: int,
    ours: bool = False,
    clips: bool = False,
    reduce_bf16: bool = False,
) -> Trainer:
    """
    Args:
        ours: whether `"type": "Lion"` is ours, by lion_dist.deepspeed.register().
        clips: whether gradient_clipping is left at DeepSpeed's default, a norm of 1.0.
        reduce_bf16: whether Linear layers communicate in bfloat16, DeepSpeed's default under torch_autocast.
    """
    # torchrun would set these; without them DeepSpeed looks for MPI.
    gpu = torch.cuda.current_device() if on_gpu(model) else 0
    rank, world_size, local_rank = (str(i) for i in (dist.get_rank(), dist.get_world_size(), gpu))
    os.environ.update(RANK=rank, LOCAL_RANK=local_rank, WORLD_SIZE=world_size, LOCAL_WORLD_SIZE=world_size)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")  # required but not used, since the process group exists
    name_plain_architectures()
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    autocast: dict[str, Any] = {"enabled": True, "dtype": "bfloat16"}
    if not reduce_bf16:
        autocast["lower_precision_safe_modules"] = []
    config = {
        "train_micro_batch_size_per_gpu": options.sequences,
        "optimizer": {"type": "Lion", "params": {"lr": LR, "betas": list(BETAS)}},
        "zero_optimization": {"stage": stage, "overlap_comm": True, "contiguous_gradients": True},
        "torch_autocast": autocast,
        "steps_per_print": 1_000_000,
    }
    if not clips:
        config["gradient_clipping"] = MAX_NORM if options.clip else 0.0
    if ours:
        lion_dist.deepspeed.register()
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.groups(DECAY), config=config)
    return Trainer(engine, engine.step, engine.backward)


FUSED = "FusedLion (where c is 0, p moves by +lr)"

DEEPSPEED = {
    **{
        f"deepspeed_zero{stage}": Mode(
            partial(deepspeed_zero, stage=stage), f"DeepSpeed ZeRO-{stage}, {FUSED}", "deepspeed"
        )
        for stage in (1, 2, 3)
    },
    **{
        f"deepspeed_zero{stage}_lion_dist": Mode(
            partial(deepspeed_zero, stage=stage, ours=True), f"DeepSpeed ZeRO-{stage}, lion_dist's Lion", "deepspeed"
        )
        for stage in (1, 2, 3)
    },
    "deepspeed_zero2_lion_dist_clips": Mode(
        partial(deepspeed_zero, stage=2, ours=True, clips=True),
        "DeepSpeed ZeRO-2, lion_dist's Lion, clipping left to DeepSpeed (to a norm of 1.0)", "deepspeed",
    ),
    "deepspeed_zero2_bf16": Mode(
        partial(deepspeed_zero, stage=2, reduce_bf16=True), f"DeepSpeed ZeRO-2, bf16 reduction, {FUSED}", "deepspeed"
    ),
}  # fmt: skip
