"""The step with master weights and with an 8-bit momentum on one GPU, beside its peers and the floor, all in one run.

    python -m benchmarks.step_precision            # the table, a minute; peers: pip install -e '.[bench]'
    python -m benchmarks.step_precision --sweep    # block sizes, warps and registers of our kernel, the same mixes
    (from the repository's root; --json PATH keeps every reading, --only WORD... takes the rows with such words)

Model and times: as in benchmarks.step; gradients have the same addresses in every step. Every row has a model of its
own, and all of them stay in memory: some 70 GB.
Bytes: that a step must move for each element: what is kept for the parameter, read and written, and the gradient, read.
Floor: bytes over the bandwidth of copies.

Rows are printed twice: as soon as a contestant is measured, in turn with copies; and at the end, after all contestants
and copies have taken turns.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lion_dist import Lion

from . import measure, peer_steps
from .measure import Spread, Step
from .peer_steps import BETAS, LR, Group, installed_version, missing
from .step_model import Model, llama_shapes

if TYPE_CHECKING:
    from lion_dist.update.backends.triton_step import Launch

F32, BF16 = torch.float32, torch.bfloat16
COPY_BYTES = 2 << 30


class Contestant(NamedTuple):
    """
    Attributes:
        name: for the table.
        dtype: of parameters and gradients.
        step_bytes: that a step must move for each element.
        make: given parameter groups, returns the function that steps them.
        distribution: the package that is needed, as pip knows it; "" if none.
        launch: ours: the key of the kernel's block size and warps in `triton_step.LAUNCH`.
    """

    name: str
    dtype: torch.dtype
    step_bytes: float
    make: Callable[[list[Group]], Step]
    distribution: str = ""
    launch: tuple[int, bool, bool] | None = None

    @property
    def title(self) -> str:
        version = installed_version(self.distribution) if self.distribution else None
        return f"{self.name}{f', {self.distribution} {version}' if version else ''}"


def ours(groups: list[Group], **options: Any) -> Step:
    return Lion(groups, lr=LR, betas=BETAS, **options).step


SCALE = 2 * 4 / 128  # a float32 for 128 elements, read and written
FLASH_SCALE = 2 * 2 / 32  # a float16 for 32

CONTESTANTS = [
    Contestant("fp32", F32, 20, ours, launch=(4, False, False)),
    Contestant("bf16", BF16, 10, ours, launch=(2, False, False)),
    Contestant("bf16 + master", BF16, 14, partial(ours, master_weights=True), launch=(2, False, True)),
    Contestant("bf16 + int8", BF16, 8 + SCALE, partial(ours, momentum_dtype="int8"), launch=(2, True, False)),
    Contestant(
        "bf16 + master + int8", BF16, 12 + SCALE, partial(ours, master_weights=True, momentum_dtype="int8"),
        launch=(2, True, True),
    ),
    Contestant("fp32 + int8", F32, 14 + SCALE, partial(ours, momentum_dtype="int8"), launch=(4, True, False)),
    # It keeps 24 bits for a weight: a bfloat16 and 8 bits more.
    Contestant("FlashLion, bf16 + 8 bits, 8-bit momentum", BF16, 10 + FLASH_SCALE, peer_steps.flashlion, "flashoptim"),
    Contestant("FlashLion, fp32, 8-bit momentum", F32, 14 + FLASH_SCALE, peer_steps.flashlion, "flashoptim"),
    Contestant(
        "optimi, bf16 + Kahan", BF16, 14, partial(peer_steps.optimi, kahan_sum=True), "torch-optimi"
    ),
]  # fmt: skip


@dataclass
class Row:
    """A contestant that has been warmed up, and its readings. ``model`` keeps the parameters alive."""

    contestant: Contestant
    model: Model
    step: Step
    elements: int
    host_us: list[float] = field(default_factory=list)
    launches: int = 0
    copies: int = 0
    device_ms: list[float] = field(default_factory=list)
    copy_ms: list[float] = field(default_factory=list)  # of copies in turn with it

    @property
    def lead_us(self) -> float:
        return statistics.median(self.host_us)

    @property
    def bytes(self) -> float:
        return self.contestant.step_bytes * self.elements

    def floor_ms(self) -> float:
        return self.bytes / (2 * COPY_BYTES) * statistics.median(self.copy_ms)

    def cells(self) -> list[str]:
        ms, floor = Spread.of(self.device_ms), self.floor_ms()
        return [
            self.contestant.title, f"{self.contestant.step_bytes:.2f}", f"{floor:.3f}",
            f"{ms.median:.3f} [{ms.p10:.3f}, {ms.p90:.3f}]", f"{floor / ms.median:.3f}", str(self.launches),
            str(self.copies), f"{self.lead_us:.0f}",
        ]  # fmt: skip


HEADER = ["", "bytes an element", "floor, ms", "ms [p10, p90]", "of the floor", "launches", "copies", "host us"]


class Copies:
    """A large copy from device to device, as a step."""

    def __init__(self) -> None:
        self._from = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=measure.DEVICE)
        self._to = torch.zeros_like(self._from)

    def __call__(self) -> Tensor:
        return self._to.copy_(self._from)


def gradients(dtype: torch.dtype, shapes: Sequence[Any], kept: dict[torch.dtype, list[Tensor]]) -> list[Tensor]:
    """Gradients that all models of a dtype share."""
    if dtype not in kept:
        kept[dtype] = [torch.empty(s.size, dtype=dtype, device=measure.DEVICE).normal_(std=1e-3) for s in shapes]
    return kept[dtype]


def build(contestant: Contestant, shapes: Sequence[Any], kept: dict[torch.dtype, list[Tensor]]) -> Row:
    """Makes the model and warms up: compiles, autotunes and makes the state."""
    dtype = contestant.dtype
    grads = gradients(dtype, shapes, kept)
    params = [
        torch.empty(s.size, dtype=dtype, device=measure.DEVICE).normal_(std=0.02).requires_grad_() for s in shapes
    ]
    model = Model(params, [grads, grads], [s.decays for s in shapes])
    step = contestant.make(model.groups())
    for _ in range(3):
        step()
    return Row(contestant, model, step, sum(p.numel() for p in params))


def take_turns(rows: Sequence[Row], copies: Copies, repeats: int, cycles: float) -> None:
    """Device times of all rows and of a copy, which take turns. Replaces the readings before."""
    steps: list[Step] = [copies, *(row.step for row in rows)]
    leads = [50.0, *(row.lead_us for row in rows)]
    copy_ms, *device_ms = measure.device_ms(steps, lambda: None, leads, repeats, cycles)
    for row, ms in zip(rows, device_ms, strict=True):
        row.device_ms, row.copy_ms = ms, copy_ms


def print_head() -> None:
    print(f"\n| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}", flush=True)


def run(contestants: Sequence[Contestant], shapes: Sequence[Any], repeats: int, cycles: float) -> dict[str, Any]:
    """Measures and prints every contestant that is installed.

    Returns:
        The readings, by name.
    """
    kept: dict[torch.dtype, list[Tensor]] = {}
    copies, rows, skipped = Copies(), [], {}
    print("each in turn with copies alone:")
    print_head()
    for contestant in contestants:
        reason, began = missing(contestant.distribution), time.perf_counter()
        try:
            if not reason:
                row = build(contestant, shapes, kept)
                row.host_us = measure.host_us(row.step, lambda: None, max(3, repeats // 2))
                take_turns([row], copies, max(3, repeats // 2), cycles)
                kernels, row.copies = measure.device_activity(row.step)
                row.launches = len(kernels)
                rows.append(row)
                print(f"| {' | '.join(row.cells())} | {time.perf_counter() - began:.1f} s", flush=True)
        except Exception as error:  # a peer's failure must not cost the other rows
            if not contestant.distribution:
                raise
            reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        if reason:
            skipped[contestant.name] = reason
            print(f"| {contestant.title} | skipped: {reason} |", flush=True)
    take_turns(rows, copies, repeats, cycles)
    terabytes = Spread.of([2 * COPY_BYTES / ms / 1e9 for ms in rows[0].copy_ms]) if rows else None
    print("\nall in turn" + (f"; copies {terabytes.median:.2f} TB/s" if terabytes else ""))
    print_head()
    for row in rows:
        print(f"| {' | '.join(row.cells())} |", flush=True)
    return {
        "rows": {
            row.contestant.title: {
                "bytes_an_element": row.contestant.step_bytes, "floor_ms": row.floor_ms(), "ms": row.device_ms,
                "launches": row.launches, "copies": row.copies, "host_us": row.host_us,
            }
            for row in rows
        },
        "copy_ms": rows[0].copy_ms if rows else [],
        "skipped": skipped,
    }  # fmt: skip


# The sweep ------------------------------------------------------------------------------------------


def configurations(int8: bool) -> list[Launch]:
    """The launches that the sweep measures. The kernel for 8-bit momenta is tried with one warp only: it reduces over a
    block, and several warps would have to synchronise for that."""
    from lion_dist.update.backends.triton_step import Launch  # needs triton, which the rest may lack

    if int8:
        limits = ((256, None), (256, 56), *((512, limit) for limit in (None, 80, 96, 112)))
        return [Launch(block, 1, limit, blocks) for block, limit in limits for blocks in (1, 4, 16)]
    limits_of = {8: (None, 40, 48, 56), 16: (None, 64, 80, 96)}  # by the elements of a thread
    return [
        Launch(block, block // (32 * elements), limit)
        for block in (512, 1024)
        for elements, limits in limits_of.items()
        for limit in limits
    ]


def sweep(contestants: Sequence[Contestant], shapes: Sequence[Any], repeats: int, cycles: float) -> dict[str, Any]:
    """Device times of our step for block sizes, warps and registers, in two passes that would show drift.

    Returns:
        The readings, by name.
    """
    from lion_dist.update.backends import triton_step  # needs triton, which the rest may lack

    raw: dict[str, Any] = {}
    copies = Copies()
    for contestant in contestants:
        if contestant.launch is None:
            continue
        with measure.freed():
            shipped = triton_step.LAUNCH[contestant.launch]
            configs = configurations(int8=contestant.launch[1])
            row = build(contestant, shapes, {})
            row.host_us = measure.host_us(row.step, lambda: None, 3)
            times: dict[Launch, list[float]] = {config: [] for config in configs}
            copy_ms: list[float] = []
            try:
                for config in configs * 2:
                    triton_step.LAUNCH[contestant.launch] = config
                    row.step()  # compiles in the first pass
                    take_turns([row], copies, repeats, cycles)
                    times[config] += row.device_ms
                    copy_ms += row.copy_ms
            finally:
                triton_step.LAUNCH[contestant.launch] = shipped
            row.copy_ms = copy_ms
            floor = row.floor_ms()
            del row
        raw[contestant.name] = {"floor_ms": floor, "ms": {str(tuple(c)): t for c, t in times.items()}}
        medians = {config: statistics.median(t) for config, t in times.items()}
        print(f"\n{contestant.name}: fraction of the floor, {floor:.3f} ms; shipped: {shipped}")
        print("  elements a block, warps, most registers a thread, blocks a program")
        for config, ms in sorted(medians.items(), key=lambda item: item[1]):
            print(f"  {tuple(config)}: {floor / ms:.3f} ({ms:.3f} ms)", flush=True)
    return raw


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="PATH", help="write every reading here")
    parser.add_argument("--sweep", action="store_true", help="only try block sizes, warps and registers of our kernel")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="only rows whose names have such a word")
    parser.add_argument("--repeats", type=int, default=21, help="readings of each row")
    args = parser.parse_args(argv)
    # In bf16 the decay of this model rounds to nothing, which is what is measured.
    warnings.filterwarnings("ignore", message="lion_dist: lr \\* weight_decay")
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    import triton

    environment = {
        "device": torch.cuda.get_device_name(measure.DEVICE),
        "torch": str(torch.__version__),
        "triton": triton.__version__,
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", "-m", "benchmarks.step_precision", *(sys.argv[1:] if argv is None else argv)]),
    }
    print(" | ".join(environment.values()), flush=True)
    began, cycles = time.perf_counter(), measure.cycles_a_ms()
    chosen = [c for c in CONTESTANTS if not args.only or any(word in c.name for word in args.only)]
    if args.sweep:
        raw = {"sweep": sweep(chosen, llama_shapes(), max(3, args.repeats // 4), cycles)}
    else:
        raw = run(chosen, llama_shapes(), args.repeats, cycles)
    print(f"\n{time.perf_counter() - began:.0f} s in all")
    if args.json:
        args.json.write_text(json.dumps({"environment": environment, **raw}))


if __name__ == "__main__":
    main()
