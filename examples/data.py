"""Bytes to train on, and the entropies that say how well simple models would predict them.

Terms: the *corpus* is one long run of bytes, files joined in the order of their paths; its last tenth is held out as
the *validation* part. A *window* is seq_len + 1 neighbouring bytes: seq_len inputs and, one further on, their targets.
Data tensors are 1-D uint8, batches (B, seq_len + 1) uint8. Entropies and losses are in nats per byte.
"""

import hashlib
import struct
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# Folders of the standard library that are not the library: tests are data tables and edge cases, not usual code.
NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclass(frozen=True)
class Corpus:
    """The two parts, 1-D uint8 each; a resumed run compares `digest` to make sure that the bytes are the same."""

    name: str
    train: Tensor
    validation: Tensor
    digest: str


def load_corpus(path: Path | None, seq_len: int) -> Corpus:
    """Reads a file, every file of a folder, or (None) the Python standard library's own sources, and splits it.

    Raises:
        FileNotFoundError: nothing is at `path`.
        ValueError: there are too few bytes for one window of seq_len + 1 in the validation part.
    """
    name, files = ("the Python standard library", stdlib_files()) if path is None else (str(path), files_under(path))
    content = bytearray().join(file.read_bytes() for file in files)
    shortest = 10 * (seq_len + 1)
    if len(content) < shortest:
        raise ValueError(
            f"{name} holds {len(content)} bytes, but seq_len={seq_len} needs at least {shortest} (the held-out tenth "
            "must hold one window of seq_len + 1): give more data with --data, or a smaller --seq-len"
        )
    data = torch.frombuffer(content, dtype=torch.uint8)
    held_out = len(data) // 10
    return Corpus(name, data[:-held_out], data[-held_out:], hashlib.sha256(content).hexdigest())


def stdlib_files() -> list[Path]:
    """The .py files of the running interpreter's library: text that every machine has, without a download."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return sorted(file for file in root.rglob("*.py") if NOT_LIBRARY.isdisjoint(file.relative_to(root).parts))


def files_under(path: Path) -> list[Path]:
    """Returns `path` itself if it is a file, else the files below it, without hidden ones and Python's bytecode, which
    imports write: a run can be resumed only on the bytes that it began with."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"no file or folder at {path}: give one that exists with --data")
    return sorted(
        file
        for file in path.rglob("*")
        if file.is_file()
        and not any(part.startswith(".") or part == "__pycache__" for part in file.relative_to(path).parts)
    )


def training_batch(
    data: Tensor, batch_size: int, seq_len: int, *, seed: int, step: int, micro_step: int, rank: int
) -> Tensor:
    """Draws windows at random. A pure function of its arguments, so a resumed run needs no generator's state."""
    place = hashlib.sha256(struct.pack("<4q", seed, step, micro_step, rank)).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(place[:8], "little", signed=True))
    starts = torch.randint(len(data) - seq_len, (batch_size,), generator=generator)
    return windows_at(data, starts, seq_len)


def validation_batches(
    data: Tensor, count: int, batch_size: int, seq_len: int, *, rank: int, world_size: int
) -> Iterator[Tensor]:
    """Yields this rank's share of `count` windows spread evenly over `data` (fewer if they would overlap).

    Every rank gets the same number of batches, of which the last may be empty: with a sharded model a forward is a
    collective call.
    """
    count = min(count, (len(data) - 1) // seq_len)
    starts = torch.arange(count) * (len(data) - seq_len) // count
    share = starts[rank::world_size]
    for first in range(0, -(-count // world_size), batch_size):
        yield windows_at(data, share[first : first + batch_size], seq_len)


def windows_at(data: Tensor, starts: Tensor, seq_len: int) -> Tensor:
    return data[starts[:, None] + torch.arange(seq_len + 1)]


def unigram_entropy(data: Tensor) -> float:
    """H(x): the loss of the best model that knows only how often each byte occurs in `data`."""
    return _entropy(torch.bincount(data))


def bigram_entropy(data: Tensor) -> float:
    """H(x_t | x_{t-1}) = H(x_{t-1}, x_t) - H(x_{t-1}): the loss of the best model that sees one byte back.

    Counted on `data` itself, so no bigram model, whatever it was trained on, has a lower loss there.
    """
    pairs = data[:-1].int() * 256 + data[1:].int()
    return _entropy(torch.bincount(pairs)) - _entropy(torch.bincount(data[:-1]))


def _entropy(counts: Tensor) -> float:
    p = counts[counts > 0].double() / counts.sum()
    return -float((p * p.log()).sum())
