"""Whole training iterations on several GPUs: time, memory, and what the collectives hide behind.

    python -m benchmarks.iteration                                     every mode on all GPUs of this machine
    python -m benchmarks.iteration --modes zero2 --trace zero2.png     a picture of one iteration, by the profiler
    python -m benchmarks.iteration --modes zero2 --compile block       torch.compile of each block; or of the model
    (from the repository's root; --help for sizes)

Model: benchmarks/llama.py, float32 parameters under bfloat16 autocast, decay and no-decay groups, no clipping,
    `--sequences` of `--seq-len` tokens a rank. Random tokens: it is about speed.
Mode: one way to train, in processes of its own, one a GPU. `compute` is a forward and backward alone.
Time: of an iteration, the mean of `--iterations` between two CUDA events, on the slowest rank, nothing waited for
    in between. Host time: the same on the host's clock before it waits for the device.
Hidden: the part of a collective's time on the device in which other kernels ran too, by the profiler.
Memory: torch's peak of allocated bytes over the timed iterations, GiB; after the forward alone beside it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from lion_dist import Lion, ShardedLion

from .llama import LanguageModel, Llama

LR, BETAS, DECAY = 1e-4, (0.9, 0.99), 0.1
GIB = 2**30

Groups = list[dict[str, Any]]


@dataclass
class Trainer:
    """What a mode made of the model: `forward` gives the loss; `optimizer` steps (None: gradients are dropped)."""

    forward: Callable[[Tensor], Tensor]
    optimizer: Any


def compute(model: nn.Module, groups: Groups, bucket_mb: float) -> Trainer:
    return Trainer(model, None)


def ddp(model: nn.Module, groups: Groups, bucket_mb: float) -> Trainer:
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    return Trainer(wrapped, Lion(groups, lr=LR, betas=BETAS))


def zero1(model: nn.Module, groups: Groups, bucket_mb: float) -> Trainer:
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    return Trainer(wrapped, ShardedLion(groups, lr=LR, betas=BETAS, stage=1))


def zero2(model: nn.Module, groups: Groups, bucket_mb: float) -> Trainer:
    return Trainer(model, ShardedLion(groups, lr=LR, betas=BETAS, bucket_mb=bucket_mb))


MODES: dict[str, Callable[[nn.Module, Groups, float], Trainer]] = {
    "compute": compute, "ddp": ddp, "zero1": zero1, "zero2": zero2
}  # fmt: skip


@dataclass
class Report:
    """What rank 0 tells of a mode; times in ms, memory in GiB, of the worst rank."""

    mode: str
    ms: float
    host_ms: float
    peak_gib: float
    after_forward_gib: float
    compile_s: float
    loss: float
    hidden: dict[str, tuple[float, float]] = field(default_factory=dict)  # collective -> (ms, of which hidden)


def run(rank: int, mode: str, options: argparse.Namespace, rendezvous: str, out: str) -> None:
    torch.cuda.set_device(rank)
    device = torch.device("cuda", rank)
    dist.init_process_group(
        "nccl", init_method=f"file://{rendezvous}", rank=rank, world_size=options.gpus, device_id=device
    )
    torch.manual_seed(0)
    sizes = Llama(layers=options.layers, seq_len=options.seq_len)
    with device:
        model = LanguageModel(sizes)
    if options.compile == "block":
        for block in model.blocks:
            block.compile()
    elif options.compile == "model":
        model.compile()
    trainer = MODES[mode](model, model.groups(DECAY), options.bucket_mb)
    generator = torch.Generator(device).manual_seed(rank)
    shape = (options.sequences, options.seq_len)
    batches = [torch.randint(sizes.vocabulary, shape, device=device, generator=generator) for _ in range(4)]

    after_forward = [0]

    def iteration(i: int, marks: bool = False) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            loss = trainer.forward(batches[i % len(batches)])
        after_forward[0] = torch.cuda.memory_allocated()
        mark(marks)
        loss.backward()
        mark(marks)
        if trainer.optimizer is None:
            model.zero_grad()
        else:
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()
        return loss.detach()

    start = time.perf_counter()
    for i in range(options.warmup):
        loss = iteration(i)
    torch.cuda.synchronize()
    compile_s = time.perf_counter() - start
    torch.cuda.reset_peak_memory_stats()
    dist.barrier()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start = time.perf_counter()
    begin.record()
    for i in range(options.iterations):
        loss = iteration(i)
    end.record()
    host_ms = (time.perf_counter() - start) * 1e3 / options.iterations
    torch.cuda.synchronize()
    worst = torch.tensor(
        [begin.elapsed_time(end) / options.iterations, host_ms, torch.cuda.max_memory_allocated() / GIB,
         after_forward[0] / GIB, compile_s], device=device, dtype=torch.float64,
    )  # fmt: skip
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    ms, host_ms, peak_gib, after_forward_gib, compile_s = worst.tolist()
    report = Report(mode, ms, host_ms, peak_gib, after_forward_gib, compile_s, loss.item())
    if options.trace or options.hidden:
        report.hidden = trace(iteration, Path(options.trace) if options.trace and rank == 0 else None, mode, options)
    if rank == 0:
        Path(out).write_text(json.dumps(asdict(report)))
    dist.barrier()
    dist.destroy_process_group()


# Tracing --------------------------------------------------------------------------------------------

TRACED = 4  # iterations; the last is looked at, which starts with the host ahead as in training
MARK = "spin_kernel"  # what torch.cuda._sleep launches: it parts forward, backward and step in a trace


def mark(wanted: bool) -> None:
    if wanted:
        torch.cuda._sleep(1)


def trace(iteration: Callable[[int, bool], Tensor], picture: Path | None, mode: str, options: Any) -> dict:
    """Profiles an iteration; how much of each collective was hidden."""
    iteration(0, True)
    torch.cuda.synchronize()
    dist.barrier()
    # The device alone: recording the host too slows it down until it is what is waited for.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for i in range(TRACED):
            iteration(i, True)
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    kernels = sorted(
        (e["ts"], e["ts"] + e["dur"], e["name"])
        for e in events
        if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    )
    marks = [k for k in kernels if MARK in k[2]]
    assert len(marks) == 2 * TRACED, f"expected {2 * TRACED} marks in the trace, found {len(marks)}"
    marks = marks[-3:]  # the ends of the last iteration's forward and backward, and of the backward before them
    first = marks[0][1]
    spans: dict[str, list[tuple[float, float]]] = {"compute": [], "Lion": [], "reduce": [], "all-gather": []}
    for begin, end, name in kernels:
        if begin >= first and MARK not in name:
            spans[lane(name)].append(((begin - first) / 1e3, (end - first) / 1e3))
    busy = merged(spans["compute"] + spans["Lion"])
    hidden = {}
    for name in ("reduce", "all-gather"):
        covered = sum(overlap(span, busy) for span in merged(spans[name]))
        hidden[name] = (sum(end - begin for begin, end in merged(spans[name])), covered)
    if picture is not None:
        draw(picture, spans, [(m[0] - first) / 1e3 for m in marks], hidden, mode, options)
    return hidden


def lane(kernel: str) -> str:
    if "nccl" in kernel:
        return "all-gather" if "AllGather" in kernel else "reduce"
    return "Lion" if "lion" in kernel.lower() else "compute"


def merged(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The union of intervals, in order."""
    union: list[tuple[float, float]] = []
    for begin, end in sorted(spans):
        if union and begin <= union[-1][1]:
            union[-1] = (union[-1][0], max(end, union[-1][1]))
        else:
            union.append((begin, end))
    return union


def overlap(span: tuple[float, float], union: list[tuple[float, float]]) -> float:
    return sum(max(0.0, min(span[1], end) - max(span[0], begin)) for begin, end in union)


def draw(path: Path, spans: dict, marks: list[float], hidden: dict, mode: str, options: Any) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(12, 2.6))
    colours = {"compute": "tab:gray", "Lion": "tab:red", "reduce": "tab:blue", "all-gather": "tab:green"}
    for row, name in enumerate(reversed(spans)):
        axes.broken_barh([(b, e - b) for b, e in spans[name]], (row - 0.35, 0.7), color=colours[name], linewidth=0)
    axes.set_yticks(range(len(spans)), list(reversed(spans)))
    for x, label in zip(marks, ("step, then forward", "backward", "step"), strict=False):
        axes.axvline(x, color="black", linewidth=0.8)
        axes.text(x, len(spans) - 0.45, f" {label}", fontsize=8)
    total, under = hidden["reduce"]
    axes.set_title(
        f"{mode}, {options.gpus} GPUs, {options.layers} layers, {options.sequences} x {options.seq_len} tokens a rank, "
        f"torch.compile: {options.compile}; reduction {total:.1f} ms, {under:.1f} of them under other kernels",
        fontsize=9, pad=14,
    )  # fmt: skip
    axes.set_xlabel("ms")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


# The table ------------------------------------------------------------------------------------------


def measure(mode: str, options: argparse.Namespace) -> Report:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "report.json"
        arguments = (mode, options, f"{folder}/rendezvous", str(out))
        spawn(run, arguments, nprocs=options.gpus)
        return Report(**json.loads(out.read_text()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", default=",".join(MODES), help=f"of {', '.join(MODES)}; a mode may stand twice")
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count())
    parser.add_argument("--layers", type=int, default=Llama.layers)
    parser.add_argument("--sequences", type=int, default=4, help="a rank")
    parser.add_argument("--seq-len", type=int, default=Llama.seq_len)
    parser.add_argument("--bucket-mb", type=float, default=64)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--compile", choices=["none", "block", "model"], default="none")
    parser.add_argument("--hidden", action="store_true", help="profile, and tell what of the collectives is hidden")
    parser.add_argument("--trace", help="profile, and draw rank 0's iteration into this PNG (of the last mode)")
    parser.add_argument("--json", help="write the reports here")
    options = parser.parse_args()
    numel = sum(p.numel() for p in meta_model(options).parameters())
    print(f"{datetime.date.today()}, {options.gpus} x {torch.cuda.get_device_name()}, torch {torch.__version__}")
    print(f"{numel:,} parameters, {options.sequences} x {options.seq_len} tokens a rank, compile {options.compile}")
    print("| mode | ms an iteration | host ms | peak GiB | after forward GiB | warm-up s | hidden / ms |")
    print("|---|---|---|---|---|---|---|", flush=True)
    reports = []
    for mode in options.modes.split(","):
        r = measure(mode, options)
        hidden = ", ".join(f"{name} {under:.1f} / {total:.1f}" for name, (total, under) in r.hidden.items())
        print(
            f"| {mode} | {r.ms:.1f} | {r.host_ms:.1f} | {r.peak_gib:.2f} | {r.after_forward_gib:.2f} "
            f"| {r.compile_s:.1f} | {hidden} |",
            flush=True,
        )
        reports.append(asdict(r))
    if options.json:
        with suppress(FileNotFoundError):
            Path(options.json).unlink()
        Path(options.json).write_text(json.dumps(reports, indent=1))


def meta_model(options: argparse.Namespace) -> nn.Module:
    with torch.device("meta"):
        return LanguageModel(Llama(layers=options.layers, seq_len=options.seq_len))


if __name__ == "__main__":
    main()
