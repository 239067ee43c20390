"""How much of the collectives' time lies under other kernels: one iteration in torch's profiler, and its picture.

Lane: the kernels of one kind on one rank. In modes over a mesh the collectives of the two dimensions have lanes of
    their own. Their kernels have the same names, and a profile has their process groups only if the host is recorded
    too, which slows it down. So it is the stream that tells: torch runs asynchronous collectives of a process group on
    a stream of the group's own. ShardedLion's are asynchronous, and a collective at the start of the profile shows on
    which stream the group of the replicas runs. FSDP2 uses other streams, and its all-reduces are all between
    replicas.
Hidden: the part of a lane during which kernels of compute or of the optimizer ran too, all on one rank. Where ranks
    share a GPU they take turns on it, and the time of a kernel includes the turns of the others.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

TRACED = 4  # iterations; the last is examined, which starts with the host ahead of the device, as in training
# Names of ours and DeepSpeed's, of lion-pytorch's, and of FlashLion's contain these.
LION_KERNELS = ("lion", "update_fn_kernel", "_triton_momentum_kernel")
MARK = "spin_kernel"  # torch.cuda._sleep launches it; it marks the ends of forward and backward in a trace
LANES = {
    "compute": "tab:gray",
    "Lion": "tab:red",
    "reduce": "tab:blue",
    "all-gather": "tab:green",
    "reduce between nodes": "tab:purple",
    "all-gather between nodes": "tab:olive",
}
BETWEEN = {name: f"{name} between nodes" for name in ("reduce", "all-gather")}  # lanes of modes over a mesh

Span = tuple[float, float]  # begin and end


class Kernel(NamedTuple):
    """A kernel, copy or fill on the device; microseconds, and the profiler's number of its stream."""

    begin: float
    end: float
    name: str
    stream: int


def mark(wanted: bool) -> None:
    if wanted:
        torch.cuda._sleep(1)


def trace(
    iteration: Callable[[int, bool], Tensor],
    between: dist.ProcessGroup | None,
    picture: Path | None,
    mode: str,
    options: Any,
) -> dict[str, Span]:
    """Profiles an iteration.

    Args:
        iteration: called with a number, and whether to `mark` the ends of its forward and backward.
        between: the process group of the replicas, in modes over a mesh.
        picture: where the picture is drawn, if at all.

    Returns:
        (ms, hidden ms) by lane of collectives.
    """
    iteration(0, True)
    between = between if between is not None and between.size() > 1 else None
    first = torch.zeros(1, device="cuda")
    torch.cuda.synchronize()
    dist.barrier()
    torch.cuda.synchronize()
    # Only the device is recorded: recording the host would slow it down until the device waits for it.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        if between is not None:
            work = dist.all_reduce(first, group=between, async_op=True)
            assert work is not None
            work.wait()
        for i in range(TRACED):
            iteration(i, True)
        torch.cuda.synchronize()
    kernels = kernels_of(profile)
    spans, marks = last_iteration(kernels, None if between is None else first_collective(kernels).stream)
    assert between is None or any(name in spans for name in BETWEEN.values()), "no collective between the replicas"
    hidden = hidden_of(spans)
    if picture is not None:
        draw(picture, spans, marks, hidden, mode, options)
    return hidden


def kernels_of(profile: Any) -> list[Kernel]:
    """In the order in which they began."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return sorted(
        Kernel(e["ts"], e["ts"] + e["dur"], e["name"], e["args"]["stream"])
        for e in events
        if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    )


def first_collective(kernels: Sequence[Kernel]) -> Kernel:
    return next(k for k in kernels if "nccl" in k.name)


def last_iteration(kernels: Sequence[Kernel], between: int | None) -> tuple[dict[str, list[Span]], list[float]]:
    """
    Args:
        kernels: of TRACED iterations.
        between: the stream of the replicas' group, in modes over a mesh.

    Returns:
        The spans of the last iteration by lane; and where the backward before it, its forward and its backward ended.
        Both in ms since the first of these ends.
    """
    found = [k for k in kernels if MARK in k.name]
    assert len(found) == 2 * TRACED, f"expected {2 * TRACED} marks in the trace, found {len(found)}"
    found = found[-3:]
    first = found[0].end
    spans: dict[str, list[Span]] = {name: [] for name in LANES}
    for k in kernels:
        if k.begin >= first and MARK not in k.name:
            spans[lane(k, between)].append(((k.begin - first) / 1e3, (k.end - first) / 1e3))
    return {name: s for name, s in spans.items() if s}, [(m.begin - first) / 1e3 for m in found]


def lane(kernel: Kernel, between: int | None) -> str:
    if "nccl" in kernel.name:
        kind = "all-gather" if "AllGather" in kernel.name else "reduce"
        far = between is not None and (kernel.stream == between or "AllReduce" in kernel.name)
        return BETWEEN[kind] if far else kind
    return "Lion" if any(name in kernel.name.lower() for name in LION_KERNELS) else "compute"


def hidden_of(spans: dict[str, list[Span]]) -> dict[str, Span]:
    """(ms, hidden ms) by lane of collectives."""
    busy = merged(spans.get("compute", []) + spans.get("Lion", []))
    hidden = {}
    for name in spans:
        if name not in ("compute", "Lion"):
            union = merged(spans[name])
            hidden[name] = (sum(end - begin for begin, end in union), sum(overlap(span, busy) for span in union))
    return hidden


def merged(spans: list[Span]) -> list[Span]:
    """The union of intervals, in order."""
    union: list[Span] = []
    for begin, end in sorted(spans):
        if union and begin <= union[-1][1]:
            union[-1] = (union[-1][0], max(end, union[-1][1]))
        else:
            union.append((begin, end))
    return union


def overlap(span: Span, union: list[Span]) -> float:
    return sum(max(0.0, min(span[1], end) - max(span[0], begin)) for begin, end in union)


def draw(
    path: Path, spans: dict[str, list[Span]], marks: list[float], hidden: dict[str, Span], mode: str, options: Any
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(12, 1.0 + 0.4 * len(spans)))
    for row, name in enumerate(reversed(spans)):
        axes.broken_barh([(b, e - b) for b, e in spans[name]], (row - 0.35, 0.7), color=LANES[name], linewidth=0)
    axes.set_yticks(range(len(spans)), list(reversed(spans)))
    axes.set_ylim(-0.6, len(spans) - 0.1)
    for x, label in zip(marks, ("step, then forward", "backward", "step"), strict=True):
        axes.axvline(x, color="black", linewidth=0.8)
        axes.text(x, len(spans) - 0.45, f" {label}", fontsize=8)
    reductions = (
        f"{name} {total:.1f} ms, {under:.1f} of them under other kernels"
        for name, (total, under) in hidden.items()
        if name.startswith("reduce")
    )
    axes.set_title(
        f"{mode}, {options.ranks} ranks, {options.layers} layers, {options.sequences} x {options.seq_len} tokens each, "
        f"torch.compile: {options.compile}\n{'; '.join(reductions)}",
        fontsize=9, pad=14,
    )  # fmt: skip
    axes.set_xlabel("ms")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
