"""The steps that benchmarks.step measures beside ours: other implementations of Lion, and two baselines written here.

Each function takes parameter groups, some of which decay, and returns a function that steps them. Names in PEERS say
where a peer's rule or its state differs from the paper's rule with p, g and m of one dtype.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from functools import partial
from importlib import metadata
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .measure import Step

LR, BETAS, DECAY = 1e-4, (0.9, 0.99), 0.1

Group = dict[str, Any]


def installed_version(distribution: str) -> str | None:
    """Version of a package by the name that pip knows; None if it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def missing(distribution: str) -> str:
    """Why a mode that needs this package cannot run here, in a few words; "" if it can, or needs none."""
    absent = distribution and installed_version(distribution) is None
    return f"not installed (pip install {distribution})" if absent else ""


class Peer(NamedTuple):
    """A contestant. ``distribution``: the package's name for pip; "" if the step is written here."""

    distribution: str
    what: str
    make: Callable[[list[Group]], Step]

    @property
    def name(self) -> str:
        if not self.distribution:
            return self.what
        version = installed_version(self.distribution)
        return f"{self.distribution}{f' {version}' if version else ''}{self.what}"


def lion_pytorch(groups: list[Group], use_triton: bool) -> Step:
    """The Triton kernel autotunes for every tensor size in the warm-up steps; it restores what the trials wrote."""
    from lion_pytorch import Lion

    step: Step = Lion(groups, lr=LR, betas=BETAS, use_triton=use_triton).step
    return step


def foreach_lion_(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], weight_decay: float
) -> None:  # fmt: skip
    """The foreach baseline, in as few passes as foreach operations allow."""
    beta1, beta2 = BETAS
    update = torch._foreach_lerp(exp_avgs, grads, 1 - beta1)
    torch._foreach_sign_(update)
    if weight_decay:
        torch._foreach_mul_(params, 1 - LR * weight_decay)
    torch._foreach_add_(params, update, alpha=-LR)
    torch._foreach_lerp_(exp_avgs, grads, 1 - beta2)


def foreach(groups: list[Group], update: Callable[..., None] = foreach_lion_) -> Step:
    exp_avgs = [[torch.zeros_like(p) for p in group["params"]] for group in groups]

    @torch.no_grad()
    def step() -> None:
        for group, momenta in zip(groups, exp_avgs, strict=True):
            update(group["params"], [p.grad for p in group["params"]], momenta, group["weight_decay"])

    return step


def compiled(groups: list[Group]) -> Step:
    torch.compiler.reset()
    return foreach(groups, torch.compile(foreach_lion_, fullgraph=True, dynamic=False))


def name_plain_architectures() -> None:
    """Takes the letter from architectures such as 9.0a in TORCH_CUDA_ARCH_LIST, which DeepSpeed 0.19.8 cannot read."""
    if given := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        os.environ["TORCH_CUDA_ARCH_LIST"] = re.sub(r"(?<=\d)[af]\b", "", given)


def deepspeed(groups: list[Group]) -> Step:
    """nvcc compiles it when it is first made, for half a minute or more; TORCH_EXTENSIONS_DIR caches the result."""
    name_plain_architectures()
    from deepspeed.ops.lion import FusedLion

    step: Step = FusedLion(groups, lr=LR, betas=BETAS).step
    return step


def bitsandbytes(groups: list[Group]) -> Step:
    from bitsandbytes.optim import Lion

    step: Step = Lion(groups, lr=LR, betas=BETAS, optim_bits=32).step
    return step


def optimi(groups: list[Group], kahan_sum: bool | None) -> Step:
    from optimi import Lion

    step: Step = Lion(groups, lr=LR, betas=BETAS, triton=True, kahan_sum=kahan_sum).step
    return step


def flashlion(groups: list[Group]) -> Step:
    """With its defaults; in float32 it refuses correction bits."""
    from flashoptim import FlashLion

    bits = None if groups[0]["params"][0].dtype == torch.float32 else 24
    step: Step = FlashLion(groups, lr=LR, betas=BETAS, master_weight_bits=bits).step
    return step


def flashlion_plain(groups: list[Group]) -> Step:
    from flashoptim import FlashLion

    step: Step = FlashLion(groups, lr=LR, betas=BETAS, quantize=False, master_weight_bits=None).step
    return step


COMPILED = Peer("", "the same foreach, torch.compile", compiled)

PEERS = [
    Peer("lion-pytorch", ", eager", partial(lion_pytorch, use_triton=False)),
    Peer("lion-pytorch", ", use_triton=True", partial(lion_pytorch, use_triton=True)),
    Peer("", "foreach (written here)", foreach),
    COMPILED,
    Peer("deepspeed", " FusedLion (where c is 0, p moves by +lr)", deepspeed),
    # It synchronises with the device after every tensor, so its device time contains host time.
    Peer("bitsandbytes", " Lion, 32 bits (momentum fp32; waits for the device after each tensor)", bitsandbytes),
    Peer("torch-optimi", " Lion, triton=True, kahan_sum=False", partial(optimi, kahan_sum=False)),
    Peer("torch-optimi", " Lion, triton=True (in bf16 with Kahan sums)", partial(optimi, kahan_sum=None)),
    Peer("flashoptim", " FlashLion, no quantization", flashlion_plain),
    Peer("flashoptim", " FlashLion (8-bit momentum; in bf16 8 more bits a weight)", flashlion),
]
