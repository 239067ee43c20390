"""The ways to train that benchmarks.iteration measures: ours, and those of other implementations and frameworks.

Mode: a function that makes a Trainer from the model on the current device, inside an initialised process group. All
    have float32 parameters, the same two groups (matrices decay, gains do not), and float32 communication, so all
    end near the same loss. A mode's entry in MODES says where its rule differs.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from lion_dist import Lion, ShardedLion

from .llama import Block, LanguageModel
from .peer_steps import BETAS, DECAY, LR
from .peers_deepspeed import DEEPSPEED
from .trainer import Mode, Trainer, device_type, make_trainer, on_gpu, torch_clip

FULL = MixedPrecisionPolicy()  # gathers and reduces in the parameters' dtype
BF16_REDUCED, BF16 = MixedPrecisionPolicy(None, torch.bfloat16), MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16)


# Ours ---------------------------------------------------------------------------------------------------------


def compute(model: LanguageModel, options: Namespace) -> Trainer:
    return Trainer(model, model.zero_grad)


def ddp(model: LanguageModel, options: Namespace) -> Trainer:
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    return make_trainer(wrapped, Lion(model.groups(DECAY), lr=LR, betas=BETAS), torch_clip(model), options)


def zero1(model: LanguageModel, options: Namespace, param_sync: str) -> Trainer:
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = ShardedLion(model.groups(DECAY), lr=LR, betas=BETAS, stage=1, param_sync=param_sync)
    return make_trainer(wrapped, optimizer, optimizer.clip_grad_norm_, options)


def zero2(
    model: LanguageModel, options: Namespace, param_sync: str, reduce_dtype: torch.dtype | None = None
) -> Trainer:
    optimizer = ShardedLion(
        model.groups(DECAY), lr=LR, betas=BETAS, stage=2, param_sync=param_sync, bucket_mb=options.bucket_mb,
        reduce_dtype=reduce_dtype,
    )  # fmt: skip
    return make_trainer(model, optimizer, optimizer.clip_grad_norm_, options)


def fsdp1(model: LanguageModel, options: Namespace) -> Trainer:
    groups = model.groups(DECAY)
    wrapped = shard_fsdp1(model)
    return make_trainer(wrapped, Lion(groups, lr=LR, betas=BETAS), wrapped.clip_grad_norm_, options, local=True)


def fsdp2(model: LanguageModel, options: Namespace, reshard: bool) -> Trainer:
    shard_fsdp2(model, reshard)
    optimizer = Lion(model.groups(DECAY), lr=LR, betas=BETAS)
    return make_trainer(model, optimizer, torch_clip(model), options, local=True)


def mesh_of(model: LanguageModel, options: Namespace) -> DeviceMesh:
    """A mesh of options.replicas rows; the model is sharded over the ranks of a row."""
    shards = dist.get_world_size() // options.replicas
    return init_device_mesh(device_type(model), (options.replicas, shards), mesh_dim_names=("replicate", "shard"))


def hsdp(model: LanguageModel, options: Namespace, policy: MixedPrecisionPolicy = FULL) -> Trainer:
    mesh = mesh_of(model, options)
    shard_fsdp2(model, reshard=False, mesh=mesh, policy=policy)
    optimizer = Lion(model.groups(DECAY), lr=LR, betas=BETAS)
    trainer = make_trainer(model, optimizer, torch_clip(model), options, local=True)
    return replace(trainer, between=mesh["replicate"].get_group())


def hybrid(
    model: LanguageModel, options: Namespace, param_sync: str, reduce_dtype: torch.dtype | None = None
) -> Trainer:
    mesh = mesh_of(model, options)
    shard_fsdp2(model, reshard=False, mesh=mesh["shard"])
    between = mesh["replicate"].get_group()
    optimizer = ShardedLion(
        model.groups(DECAY), lr=LR, betas=BETAS, process_group=between, param_sync=param_sync,
        bucket_mb=options.bucket_mb, reduce_dtype=reduce_dtype,
    )  # fmt: skip
    return replace(make_trainer(model, optimizer, optimizer.clip_grad_norm_, options), between=between)


# torch's sharding, and lion-pytorch -----------------------------------------------------------------


def ddp_lion_pytorch(model: LanguageModel, options: Namespace, reduce_bf16: bool = False) -> Trainer:
    import lion_pytorch

    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    if reduce_bf16:
        wrapped.register_comm_hook(None, bf16_compress_hook)
    optimizer = lion_pytorch.Lion(model.groups(DECAY), lr=LR, betas=BETAS, use_triton=on_gpu(model))
    return make_trainer(wrapped, optimizer, torch_clip(model), options)


def zero_redundancy(model: LanguageModel, options: Namespace) -> Trainer:
    import lion_pytorch

    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = ZeroRedundancyOptimizer(
        model.groups(DECAY), lion_pytorch.Lion, lr=LR, betas=BETAS, use_triton=on_gpu(model)
    )
    return make_trainer(wrapped, optimizer, torch_clip(model), options)


def shard_fsdp1(model: LanguageModel) -> Any:
    """Wraps the model. Parameters stay the same objects but become flat, so groups, which depend on shapes, are made
    before."""
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    return FullyShardedDataParallel(
        model,
        sharding_strategy=ShardingStrategy.SHARD_GRAD_OP,
        auto_wrap_policy=ModuleWrapPolicy({Block}),
        device_id=next(model.parameters()).device,
        use_orig_params=True,
    )


def fsdp1_lion_pytorch(model: LanguageModel, options: Namespace, use_triton: bool) -> Trainer:
    import lion_pytorch

    groups = model.groups(DECAY)
    use_triton = use_triton and on_gpu(model)
    wrapped = shard_fsdp1(model)
    optimizer = lion_pytorch.Lion(groups, lr=LR, betas=BETAS, use_triton=use_triton)
    return make_trainer(wrapped, optimizer, wrapped.clip_grad_norm_, options, local=True)


def fsdp1_lion_pytorch_foreach(model: LanguageModel, options: Namespace) -> Trainer:
    from lion_pytorch.foreach import Lion

    groups = model.groups(DECAY)
    wrapped = shard_fsdp1(model)
    return make_trainer(wrapped, Lion(groups, lr=LR, betas=BETAS), wrapped.clip_grad_norm_, options, local=True)


def fsdp1_flashlion(model: LanguageModel, options: Namespace) -> Trainer:
    from flashoptim import FlashLion

    groups = model.groups(DECAY)
    wrapped = shard_fsdp1(model)
    optimizer = FlashLion(groups, lr=LR, betas=BETAS, master_weight_bits=None)
    return make_trainer(wrapped, optimizer, wrapped.clip_grad_norm_, options, local=True)


def shard_fsdp2(
    model: LanguageModel, reshard: bool, mesh: DeviceMesh | None = None, policy: MixedPrecisionPolicy = FULL
) -> None:
    """Shards the model.

    Args:
        reshard: whether parameters are dropped after the forward and gathered again in the backward, as in ZeRO-3.
        mesh: of the ranks that shard, and in two dimensions of those that replicate; None: all ranks shard.
    """
    # The mesh that fully_shard makes itself is on GPUs if torch was built for them, even if the model is on the CPU.
    mesh = mesh or init_device_mesh(device_type(model), (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard, mp_policy=policy)
    fully_shard(model, mesh=mesh, reshard_after_forward=False, mp_policy=policy)


def fsdp2_lion_pytorch(model: LanguageModel, options: Namespace, reshard: bool) -> Trainer:
    import lion_pytorch

    shard_fsdp2(model, reshard)
    optimizer = lion_pytorch.Lion(model.groups(DECAY), lr=LR, betas=BETAS)
    return make_trainer(model, optimizer, torch_clip(model), options, local=True)


class OnLocalParts:
    """Steps the local parts of DTensors with an optimizer that takes no DTensors, as users would have to by hand."""

    def __init__(self, groups: list[dict[str, Any]], make: Callable[..., torch.optim.Optimizer]) -> None:
        self.param_groups = groups
        plain = [{**g, "params": [torch.nn.Parameter(p.to_local().detach()) for p in g["params"]]} for g in groups]
        self.pairs = [
            pair
            for group, own in zip(groups, plain, strict=True)
            for pair in zip(group["params"], own["params"], strict=True)
        ]
        self.optimizer = make(plain)

    def step(self) -> None:
        for p, own in self.pairs:
            own.grad = None if p.grad is None else p.grad._local_tensor
        self.optimizer.step()

    def zero_grad(self) -> None:
        for p, own in self.pairs:
            p.grad = own.grad = None


def fsdp2_lion_pytorch_triton(model: LanguageModel, options: Namespace, reshard: bool) -> Trainer:
    import lion_pytorch

    shard_fsdp2(model, reshard)
    make = partial(lion_pytorch.Lion, lr=LR, betas=BETAS, use_triton=on_gpu(model))
    return make_trainer(model, OnLocalParts(model.groups(DECAY), make), torch_clip(model), options, local=True)


def fsdp2_flashlion(
    model: LanguageModel, options: Namespace, reshard: bool, policy: MixedPrecisionPolicy = FULL
) -> Trainer:
    from flashoptim import FlashLion

    shard_fsdp2(model, reshard, policy=policy)
    optimizer = FlashLion(model.groups(DECAY), lr=LR, betas=BETAS, master_weight_bits=None)
    return make_trainer(model, optimizer, torch_clip(model), options, local=True)


FSDP1, FSDP2 = "FSDP1 SHARD_GRAD_OP", "FSDP2"
HSDP = f"{FSDP2} over both dimensions of a mesh (HSDP), reshard_after_forward=False"
HYBRID = f"{FSDP2} over shards, reshard_after_forward=False + ShardedLion over replicas"

MODES = {
    "compute": Mode(compute, "forward and backward alone"),
    "ddp": Mode(ddp, "DDP + Lion"),
    "zero1": Mode(partial(zero1, param_sync="params"), "DDP + ShardedLion stage 1, parameters gathered"),
    "zero1_signs": Mode(partial(zero1, param_sync="signs"), "DDP + ShardedLion stage 1, signs gathered"),
    "zero2": Mode(partial(zero2, param_sync="params"), "ShardedLion stage 2, parameters gathered"),
    "zero2_signs": Mode(partial(zero2, param_sync="signs"), "ShardedLion stage 2, signs gathered"),
    "zero2_signs_bf16": Mode(
        partial(zero2, param_sync="signs", reduce_dtype=torch.bfloat16),
        "ShardedLion stage 2, bf16 reduction, signs gathered",
    ),
    "ddp_lion_pytorch": Mode(ddp_lion_pytorch, "DDP + lion-pytorch, use_triton=True", "lion-pytorch"),
    "ddp_lion_pytorch_bf16": Mode(
        partial(ddp_lion_pytorch, reduce_bf16=True), "DDP, bf16 reduction + lion-pytorch, use_triton=True",
        "lion-pytorch",
    ),
    "zero_redundancy": Mode(
        zero_redundancy, "DDP + ZeroRedundancyOptimizer of lion-pytorch, use_triton=True", "lion-pytorch"
    ),
    "fsdp1": Mode(fsdp1, f"{FSDP1} + Lion"),
    "fsdp1_lion_pytorch": Mode(fsdp1_lion_pytorch_foreach, f"{FSDP1} + lion-pytorch, foreach", "lion-pytorch"),
    "fsdp1_lion_pytorch_eager": Mode(
        partial(fsdp1_lion_pytorch, use_triton=False), f"{FSDP1} + lion-pytorch, eager", "lion-pytorch"
    ),
    "fsdp1_lion_pytorch_triton": Mode(
        partial(fsdp1_lion_pytorch, use_triton=True), f"{FSDP1} + lion-pytorch, use_triton=True", "lion-pytorch"
    ),
    "fsdp1_flashlion": Mode(fsdp1_flashlion, f"{FSDP1} + FlashLion (8-bit momentum)", "flashoptim"),
    "fsdp2": Mode(partial(fsdp2, reshard=True), f"{FSDP2} + Lion"),
    "fsdp2_grad_op": Mode(partial(fsdp2, reshard=False), f"{FSDP2} reshard_after_forward=False + Lion"),
    "hsdp": Mode(hsdp, f"{HSDP} + Lion"),
    "hsdp_bf16": Mode(partial(hsdp, policy=BF16_REDUCED), f"{HSDP}, bf16 reduction + Lion"),
    "hybrid": Mode(partial(hybrid, param_sync="params"), f"{HYBRID}, parameters gathered"),
    "hybrid_signs": Mode(partial(hybrid, param_sync="signs"), f"{HYBRID}, signs gathered"),
    "hybrid_signs_bf16": Mode(
        partial(hybrid, param_sync="signs", reduce_dtype=torch.bfloat16),
        f"{HYBRID}, bf16 reduction, signs gathered",
    ),
    "fsdp2_lion_pytorch": Mode(
        partial(fsdp2_lion_pytorch, reshard=True), f"{FSDP2} + lion-pytorch, eager", "lion-pytorch"
    ),
    # Neither lion-pytorch's Triton kernel nor its foreach version takes DTensors.
    "fsdp2_lion_pytorch_triton": Mode(
        partial(fsdp2_lion_pytorch_triton, reshard=True),
        f"{FSDP2} + lion-pytorch, use_triton=True, on local parts by hand", "lion-pytorch",
    ),
    "fsdp2_flashlion": Mode(
        partial(fsdp2_flashlion, reshard=True), f"{FSDP2} + FlashLion (8-bit momentum)", "flashoptim"
    ),
    "fsdp2_flashlion_grad_op": Mode(
        partial(fsdp2_flashlion, reshard=False),
        f"{FSDP2} reshard_after_forward=False + FlashLion (8-bit momentum)", "flashoptim",
    ),
    "fsdp2_flashlion_bf16": Mode(
        partial(fsdp2_flashlion, reshard=False, policy=BF16),
        f"{FSDP2} reshard_after_forward=False, bf16 gather and reduction + FlashLion (8-bit momentum)", "flashoptim",
    ),
    **DEEPSPEED,
}  # fmt: skip
