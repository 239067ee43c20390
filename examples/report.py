"""Reports the result of a run: the loss curve, a sample of text, and the memory that it took."""

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


def printable(text: bytes) -> str:
    """Returns `text` without control characters and broken UTF-8, which an untrained model writes."""
    shown = text.decode("utf-8", errors="replace")
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in shown)


def peak_mib(device: torch.device) -> float:
    """The most memory in MiB that this rank has held so far: allocated on its GPU, or resident in its process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # in KiB on Linux
