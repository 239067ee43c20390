"""Reports on a run: the loss curve, statistics of the steps, a sample of text, and the memory that it took."""

import json
import resource
from pathlib import Path

import torch

History = dict[str, list[tuple[int, float]]]  # "train" and "validation": (steps done, loss in nats per byte)


def save_curve(path: Path, history: History, unigram: float, bigram: float, title: str) -> None:
    """Draws both losses over the steps, with the two entropies that a model of text must get below."""
    # Imported here, because only the rank that draws needs it.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(*zip(*history["train"], strict=True), color="tab:blue", alpha=0.5, label="train (rank 0's batches)")
    axes.plot(*zip(*history["validation"], strict=True), color="tab:red", marker="o", label="validation")
    axes.axhline(unigram, color="gray", linestyle=":", label=f"unigram entropy {unigram:.3f}")
    axes.axhline(bigram, color="black", linestyle="--", label=f"bigram entropy {bigram:.3f}")
    axes.set(xlabel="step", ylabel="loss, nats per byte", title=title)
    axes.legend()
    figure.savefig(path, dpi=120)


def write_line(path: Path, values: dict[str, float]) -> None:
    """Appends a line of JSON; numbers that are not finite are NaN and Infinity."""
    with path.open("a") as file:
        file.write(json.dumps(values) + "\n")


def save_statistics(path: Path, lines: Path) -> None:
    """Draws the numbers of all parameters that `write_line` has written: norms, and fractions of signs."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # A run that was resumed has made some steps twice: the later line counts.
    rows = {row["step"]: row for row in map(json.loads, lines.read_text().splitlines())}
    figure = Figure(figsize=(8, 7), layout="constrained")
    FigureCanvasAgg(figure)
    norms, signs = figure.subplots(2, sharex=True)
    for axes, kind in ((norms, "l2_norm"), (signs, "sign")):
        for name in next(iter(rows.values()), {}):
            if name.startswith(kind) and name.endswith("/global"):
                axes.plot(sorted(rows), [rows[step][name] for step in sorted(rows)], label=name.split("/")[1])
        axes.legend()
    norms.set(yscale="log", ylabel="2-norm")
    signs.set(xlabel="step", ylabel="fraction of elements")
    figure.savefig(path, dpi=120)


def printable(text: bytes) -> str:
    """Returns `text` without control characters and broken UTF-8, which an untrained model writes."""
    shown = text.decode("utf-8", errors="replace")
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in shown)


def peak_mib(device: torch.device) -> float:
    """The most memory in MiB that this rank has held so far: allocated on its GPU, or resident in its process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # in KiB on Linux
