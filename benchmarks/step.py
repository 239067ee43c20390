"""The optimizer's step on one GPU: lion_dist.Lion, its peers and the floor, all from one run.

    python -m benchmarks.step                  # the table of RESULTS.md, some minutes; peers: pip install -e '.[bench]'
    python -m benchmarks.step --check          # holds the numbers against limits.json; exits 1 if one is worse
    python -m benchmarks.step --check gpu      # only those of the GPU; the CPU's (--check cpu) take some minutes more
    (from the repository's root; --json PATH keeps every reading, --quick gives a rough table sooner)

Model: Llama-shaped, 1,235,814,400 parameters in 146 tensors; matrices decay, norms do not: two groups.
Mode: float32 or bfloat16, parameters, gradients and momentum alike.
Floor: bytes that any step must move (p and m read and written, g read) over the copy bandwidth
    measured here: device to device, read and written bytes both counted.
Kept / moved: gradients have the same addresses in every step / other addresses (two sets in turn).
Device and host time: see measure.py. Ours and the peer take turns on the device, so that drift affects both.
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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from . import step_check
from .measure import DEVICE, Spread, copy_bandwidth, cycles_a_ms, freed
from .peer_steps import COMPILED, PEERS, Peer, missing
from .step_extras import Extra, run_extras
from .step_model import MODES, Model, Reading, llama_shapes, make_ours, measure

OURS = "lion_dist"


@dataclass
class ModeResult:
    """Readings of ours and of every peer in one mode, by name; and why peers were skipped.

    ``bandwidth``: of copies before and after, in bytes a second.
    """

    mode: str
    step_bytes: int
    bandwidth: list[float]
    readings: dict[str, Reading] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def floor_ms(self) -> float:
        return self.step_bytes / statistics.median(self.bandwidth) * 1e3


def run_mode(mode: str, repeats: int, cycles: float, leave_out: set[Peer]) -> ModeResult:
    with freed():
        bandwidth = copy_bandwidth(repeats)
    model = Model.random(llama_shapes(), MODES[mode])
    result = ModeResult(mode, model.step_bytes, bandwidth)
    ours = make_ours(model.groups())
    result.readings[OURS] = measure(ours, model, None, repeats, cycles)
    for peer in PEERS:
        reason = missing(peer.distribution) or ("left out by --quick" if peer in leave_out else "")
        with freed():
            began = time.perf_counter()
            try:
                if not reason:
                    result.readings[peer.name] = measure(peer.make(model.groups()), model, ours, repeats, cycles)
            except (Exception, SystemExit) as error:  # lion_pytorch.triton exits where triton is missing
                reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        seconds = time.perf_counter() - began
        print(f"  {mode} {peer.name}: {f'skipped, {reason}' if reason else f'done in {seconds:.1f} s'}", flush=True)
        if reason:
            result.skipped[peer.name] = reason
    with freed():
        result.bandwidth += copy_bandwidth(repeats)
    return result


# Reporting -----------------------------------------------------------------------------------------


def both(values: dict[str, Any], show: Callable[[Any], str]) -> str:
    """One cell of the table: the value for kept gradients / that for moved ones."""
    return " / ".join(show(values[case]) for case in ("kept", "moved"))


def ms_cell(readings: list[float]) -> str:
    s = Spread.of(readings)
    return f"{s.median:.2f} [{s.p10:.2f}, {s.p90:.2f}]" if s.median >= 0.1 else f"{s.median * 1e3:.0f} us"


def bytes_cell(n: int) -> str:
    return f"{n / 2**20:.0f} MiB" if n >= 2**20 else f"{n / 2**10:.1f} KiB"


def row(name: str, reading: Reading, floor: float) -> list[str]:
    kept = statistics.median(reading.device_ms["kept"])
    cells = [name, both(reading.device_ms, ms_cell), f"{floor / kept:.2f}"]
    if reading.ours_device_ms:
        cells.append(both(reading.ours_device_ms, lambda t: f"{Spread.of(t).median:.2f}"))
        ratios = {c: Spread.of(t).median / Spread.of(reading.ours_device_ms[c]).median
                  for c, t in reading.device_ms.items()}  # fmt: skip
        cells.append(both(ratios, lambda r: f"{r:.2f}"))
    else:
        cells += ["", ""]
    cells.append(both(reading.host_us, lambda t: f"{statistics.median(t):.0f}"))
    cells.append(both(reading.kernels, lambda launches: str(sum(launches.values()))))
    cells.append(both(reading.extra_bytes, bytes_cell))
    return cells


def report(modes: Sequence[ModeResult], extras: Sequence[Extra], environment: dict[str, str]) -> None:
    names = sorted({name for m in modes for case in m.readings[OURS].kernels.values() for name in case})
    print(f"\nkernels of {OURS}: {', '.join(names) or 'the profiler saw none'}; copies beside them: "
          + ", ".join(f"{m.mode} {both(m.readings[OURS].copies, str)}" for m in modes))  # fmt: skip
    print(f"\n### Step, one device\n\n{environment['device']}, torch {environment['torch']}, triton "
          f"{environment['triton']}, {environment['date']}, `{environment['command']}`\n")  # fmt: skip
    header = ["", "ms [p10, p90], gradients kept / moved", "of the floor", "ours in turn, ms", "peer / ours",
              "host us", "kernels", "extra memory"]  # fmt: skip
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for m in modes:
        gb = Spread.of([b / 1e12 for b in m.bandwidth])
        print(f"| **{m.mode}** floor | {m.floor_ms:.2f} | 1 (copy {gb.median:.2f} [{gb.p10:.2f}, {gb.p90:.2f}] TB/s)"
              + " |" * (len(header) - 2))  # fmt: skip
        for name, reading in m.readings.items():
            print(f"| {' | '.join(row(name, reading, m.floor_ms))} |")
        for name, reason in m.skipped.items():
            print(f"| {name} | {reason}{' |' * (len(header) - 1)}")
    if extras:
        bandwidth = statistics.median([b for m in modes for b in m.bandwidth])
        columns = [0, 1, 2, 5, 6, 7]
        print(f"\n| {' | '.join([OURS, *(header[i] for i in columns[1:])])} | |\n|{'---|' * (len(columns) + 1)}")
        for extra in extras:
            cells = row(extra.name, extra.reading, extra.step_bytes / bandwidth * 1e3)
            print(f"| {' | '.join(cells[i] for i in columns)} | {extra.note} |")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="PATH", help="write every reading here")
    parser.add_argument("--quick", action="store_true", help="fewer readings, no torch.compile, no 2^31 elements")
    parser.add_argument(
        "--check", nargs="?", const="all", choices=["all", "gpu", "cpu"],
        help="only compare with limits.json; exits 1 if worse",
    )  # fmt: skip
    args = parser.parse_args(argv)
    # In bf16 the decay of this model rounds to nothing, which is what is measured.
    warnings.filterwarnings("ignore", message="lion_dist: lr \\* weight_decay")
    if args.check:
        sys.exit(step_check.check(args.check))
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    import triton  # --check works without it

    repeats = 7 if args.quick else 21
    environment = {
        "device": torch.cuda.get_device_name(DEVICE),
        "torch": str(torch.__version__),
        "triton": triton.__version__,
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", "-m", "benchmarks.step", *(sys.argv[1:] if argv is None else argv)]),
    }
    print(" | ".join(environment.values()), flush=True)
    began = time.perf_counter()
    cycles = cycles_a_ms()
    raw: dict[str, Any] = {"environment": environment}
    leave_out = {COMPILED} if args.quick else set()
    modes = []
    for mode in MODES:
        with freed():
            modes.append(run_mode(mode, repeats, cycles, leave_out))
    extras = run_extras(repeats, cycles, large=not args.quick)
    report(modes, extras, environment)
    raw["modes"] = [asdict(m) for m in modes]
    raw["extras"] = [asdict(e) for e in extras]
    print(f"\n{time.perf_counter() - began:.0f} s in all")
    if args.json:
        args.json.write_text(json.dumps(raw))


if __name__ == "__main__":
    main()
