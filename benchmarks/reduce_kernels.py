"""The two kernels of reduce_dtype=torch.bfloat16 on one GPU, beside the memory's limit and plain torch.

    python -m benchmarks.reduce_kernels          both kernels, for float32 and bfloat16 gradients of 2 and 8 ranks
    python -m benchmarks.reduce_kernels --sweep  the same for other blocks and numbers of warps

A bucket of 64 Mi elements in 16 gradients. Floor: the time of a device-to-device copy that moves as many bytes. For
each element, rounding reads the gradient and writes 2 bytes; averaging, of which each rank does a world_size-th, reads
2 bytes for each rank and writes 4. "Odd offsets": gradients lie one element off the alignment of 16 bytes, as FSDP2's
may. All contestants take turns. Device time: medians [10th, 90th percentile]. Host time: of one call, with an idle
device.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lion_dist.sharding import triton_rows
from lion_dist.sharding.all_to_all import TorchRows
from lion_dist.sharding.triton_rows import TritonRows

from .measure import DEVICE, Spread, Step, copy_bandwidth, cycles_a_ms, device_ms, freed, host_us, machine

NUMEL, GRADIENTS = 1 << 26, 16
SETTINGS = [(512, 1), (512, 2), (1024, 2), (1024, 4), (2048, 4), (2048, 8), (4096, 8)]  # elements a block, warps


class Bucket:
    """Gradients, rows and outputs of one bucket, and what rounds and averages them."""

    def __init__(self, dtype: torch.dtype, world_size: int, shift: int, make: Callable[[list[Tensor]], Any]) -> None:
        length = NUMEL // GRADIENTS
        self.gradients = [torch.randn(length + 8, device=DEVICE).to(dtype)[shift:][:length] for _ in range(GRADIENTS)]
        self.outputs = [torch.zeros(length // world_size, device=DEVICE) for _ in range(GRADIENTS)]
        self.rows = torch.zeros(world_size, NUMEL // world_size, dtype=torch.bfloat16, device=DEVICE)
        self.halves = make(self.outputs)
        self.round_bytes = NUMEL * (dtype.itemsize + 2)
        self.average_bytes = NUMEL // world_size * (2 * world_size + 4)

    def round(self) -> None:
        self.halves.round(self.rows, self.gradients)

    def average(self) -> None:
        self.halves.average(self.rows, False)


def table(names: list[str], steps: list[Step], moved: list[int], bandwidth: float, cycles: float) -> None:
    for step in steps:
        step()  # compiles
    host = [statistics.median(host_us(step, lambda: None, 21)) for step in steps]
    times = [Spread.of(ms) for ms in device_ms(steps, lambda: None, host, 31, cycles)]
    print("| | floor, ms | ms [p10, p90] | of the floor | host us |\n|---|---|---|---|---|")
    for name, spread, us, count in zip(names, times, host, moved, strict=True):
        floor = count / bandwidth * 1e3
        spreads = f"{spread.median:.3f} [{spread.p10:.3f}, {spread.p90:.3f}]"
        print(f"| {name} | {floor:.3f} | {spreads} | {floor / spread.median:.3f} | {us:.0f} |", flush=True)


def compare(bandwidth: float, cycles: float) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for world_size in (2, 8):
            with freed():
                ours = Bucket(dtype, world_size, 0, TritonRows)
                odd = Bucket(dtype, world_size, 1, TritonRows)
                plain = Bucket(dtype, world_size, 0, TorchRows)
                print(f"\n{dtype} gradients, {world_size} ranks:\n")
                table(
                    ["round", "round, odd offsets", "round, plain torch", "average", "average, plain torch"],
                    [ours.round, odd.round, plain.round, ours.average, plain.average],
                    [ours.round_bytes] * 3 + [ours.average_bytes] * 2,
                    bandwidth,
                    cycles,
                )
                del ours, odd, plain


def sweep(bandwidth: float, cycles: float) -> None:
    shipped = triton_rows.BLOCK, triton_rows.NUM_WARPS
    for half in ("round", "average"):
        for block, warps in SETTINGS:
            triton_rows.BLOCK, triton_rows.NUM_WARPS = block, warps
            cells = []
            for dtype, world_size, shift in ((torch.float32, 2, 0), (torch.float32, 2, 1), (torch.bfloat16, 8, 0)):
                with freed():
                    bucket = Bucket(dtype, world_size, shift, TritonRows)
                    run = getattr(bucket, half)
                    run()
                    (times,) = device_ms([run], lambda: None, [200.0], 21, cycles)
                    floor = getattr(bucket, f"{half}_bytes") / bandwidth * 1e3
                    cells.append(f"{floor / statistics.median(times):.3f}")
                    del bucket, run
            print(f"{half}, block {block}, {warps} warps: of the floor {', '.join(cells)} (float32; odd; bfloat16)")
    triton_rows.BLOCK, triton_rows.NUM_WARPS = shipped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true")
    options = parser.parse_args()
    with freed():
        bandwidth = statistics.median(copy_bandwidth(21))
    print(f"{machine(1)}, torch {torch.__version__}, {datetime.date.today()}, copies {bandwidth / 1e12:.2f} TB/s")
    (sweep if options.sweep else compare)(bandwidth, cycles_a_ms())


if __name__ == "__main__":
    main()
