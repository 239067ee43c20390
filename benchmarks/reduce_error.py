"""Error of an average of gradients that travel in bfloat16.

    python -m benchmarks.reduce_error

They are added up in float32, as with reduce_dtype=torch.bfloat16, or in bfloat16 along a ring, as where tensors in
bfloat16 are reduced. All ranks are simulated in one process. Each rank's gradient is a normal draw that all share, plus
NOISE times one of its own. An error is the root of the mean square of what an average differs by from the mean in
float64, divided by that of the mean. A wrong sign is one that differs from that of the mean in float64.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from lion_dist.sharding.all_to_all import average_rows

RANKS = [2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
NOISE = [1.0, 30.0]


def gradients(ranks: int, numel: int, noise: float) -> Tensor:
    """float32, shape (ranks, numel)."""
    generator = torch.Generator().manual_seed(ranks)
    shared = torch.randn(numel, generator=generator)
    return shared + noise * torch.randn(ranks, numel, generator=generator)


def all_to_all(g: Tensor) -> Tensor:
    """ShardedLion's: each contribution rounded once, added up in float32."""
    average = torch.empty(g.shape[1])
    average_rows([average], g.bfloat16(), adds=False)
    return average


def ring(g: Tensor) -> Tensor:
    """As DDP's bf16_compress_hook: gradients are rounded and divided, and each rank of a ring adds its own to what it
    passes on, in bfloat16."""
    total = g[0].bfloat16() / len(g)
    for own in g[1:]:
        total += own.bfloat16() / len(g)
    return total.float()


def ring_float32(g: Tensor) -> Tensor:
    """A ring that carries float32."""
    total = g[0].clone()
    for own in g[1:]:
        total += own
    return total / len(g)


WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "reduce_dtype=torch.bfloat16": all_to_all, "ring in bfloat16": ring, "ring in float32": ring_float32,
}  # fmt: skip


def measure(way: Callable[[Tensor], Tensor], g: Tensor) -> tuple[float, float]:
    """The error, and the share of wrong signs."""
    mean = g.double().mean(0)
    average = way(g).double()
    error = (average - mean).square().mean().sqrt() / mean.square().mean().sqrt()
    return error.item(), (average.sign() != mean.sign()).double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numel", type=int, default=1 << 16)
    numel = parser.parse_args().numel
    print(f"torch {torch.__version__}, {numel} elements. Errors in percent, and in brackets wrong signs in a million")
    for noise in NOISE:
        print(f"\nNoise {noise:g}:\n\n| ranks | {' | '.join(WAYS)} |\n|{'---|' * (1 + len(WAYS))}")
        for ranks in RANKS:
            g = gradients(ranks, numel, noise)
            cells = [
                f"{100 * error:.2g} ({1e6 * wrong:.0f})" for error, wrong in (measure(w, g) for w in WAYS.values())
            ]
            print(f"| {ranks} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
