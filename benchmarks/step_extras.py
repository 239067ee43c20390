"""Measurements of ours alone in benchmarks.step: further models."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lion_dist import Lion
from lion_dist.update import reference
from lion_dist.update.hypers import hyper_table

from .measure import DEVICE, Step, freed
from .peer_steps import BETAS, DECAY, LR
from .step_model import MODES, Model, Reading, Shape, llama_shapes, measure


@dataclass
class Extra:
    name: str
    step_bytes: int
    reading: Reading
    note: str = ""


def small_tensors(dtype: torch.dtype) -> Model:
    """1000 tensors of 1 to 4096 elements. They fit in the L2 cache, so a step can be faster than the floor."""
    chooser = random.Random(0)
    return Model.random([Shape((chooser.randint(1, 4096),), i % 2 == 0) for i in range(1000)], dtype)


def unaligned_tensors(dtype: torch.dtype, params_too: bool) -> Model:
    """Gradients begin one element into their buffers, as FSDP2's may; and parameters too, as FSDP1's may. Momenta are
    aligned."""
    shapes = [s for s in llama_shapes() if s.decays][:29]

    def views(first: int) -> list[Tensor]:
        buffers = [torch.zeros(first + math.prod(s.size), dtype=dtype, device=DEVICE).normal_() for s in shapes]
        return [b[first:].view(s.size).detach() for b, s in zip(buffers, shapes, strict=True)]

    return Model([p.requires_grad_() for p in views(int(params_too))], [views(1), views(1)], [True] * len(shapes))


def past_int32(extra: int = 128) -> Model:
    shapes = [Shape(((1 << 31) + extra,), True)]
    return Model.random(shapes, torch.bfloat16)


def check_slices(model: Model, step: Step, optimizer: Lion) -> str:
    """Steps the one parameter once; compares slices at both ends and around element 2**31 with the reference."""
    (p,), length, border = model.params, 4096, 1 << 31
    starts = [0, border // 2, border - length // 2, p.numel() - length]
    slices = [slice(start, min(start + length, p.numel())) for start in starts]
    m = optimizer.state[p]["exp_avg"]
    g = p.grad
    assert g is not None
    row = hyper_table([reference.HyperParameters(LR, DECAY, *BETAS, False)], DEVICE)[0]
    before = [(p.detach()[s].clone(), g[s].clone(), m[s].clone()) for s in slices]
    step()
    for s, tensors in zip(slices, before, strict=True):
        expected = reference.lion_rule(*tensors, reference.scalars(row))
        for got, want in zip((p.detach()[s], m[s]), expected, strict=True):
            if not torch.equal(got.view(torch.int16), want.view(torch.int16)):
                raise AssertionError(f"elements {s.start} to {s.stop} differ from the reference")
    return f"{len(slices)} slices of {length} have the reference's bits"


def captured(model: Model) -> Step:
    """Replays of a CUDA graph of one step, with an lr tensor."""
    optimizer = Lion(model.groups(), lr=torch.tensor(LR, device=DEVICE), betas=BETAS)
    optimizer.step()
    optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()

    def replay(kept: Lion = optimizer) -> None:  # the graph reads what the optimizer keeps
        graph.replay()

    return replay


def run_extras(repeats: int, cycles: float, large: bool) -> list[Extra]:
    extras: list[Extra] = []

    def add(name: str, build: Callable[[], Model], check: Callable[..., str] | None = None) -> None:
        with freed():
            model = build()
            optimizer = Lion(model.groups(), lr=LR, betas=BETAS)
            optimizer.step()
            note = check(model, optimizer.step, optimizer) if check is not None else ""
            extras.append(Extra(name, model.step_bytes, measure(optimizer.step, model, None, repeats, cycles), note))
            del model, optimizer

    with freed():
        model = Model.random(llama_shapes(), torch.float32)
        replay = captured(model)
        extras.append(Extra("the whole model, replays of a CUDA graph, fp32", model.step_bytes,
                            measure(replay, model, None, repeats, cycles), "of the captured gradients"))  # fmt: skip
        del model, replay
    for mode, dtype in MODES.items():
        add(f"1000 tensors of 1 to 4096, {mode}", lambda dtype=dtype: small_tensors(dtype))  # type: ignore[misc]
        for what, params_too in (("g", False), ("p and g", True)):
            add(f"{what} at odd offsets, {mode}", partial(unaligned_tensors, dtype, params_too))
    if large:
        free = torch.cuda.mem_get_info()[0]
        if free < 24 << 30:
            print(f"  2^31 + 128 elements: skipped, {free >> 30} GiB free, 24 needed", flush=True)
        else:
            add("one tensor of 2^31 + 128, bf16", past_int32, check_slices)
    return extras
