"""The optimizer's step on one GPU: lion_dist.Lion, its peers and the floor, all from one run.

    python -m benchmarks.step                  # the table of RESULTS.md, some minutes; peers: pip install -e '.[bench]'
    python -m benchmarks.step --sweep          # block size x warps of our kernel
    (from the repository's root; --json PATH keeps every reading, --quick gives a rough table sooner)

Model: Llama-shaped, 1,235,814,400 parameters in 146 tensors; matrices decay, norms do not: two groups.
Mode: float32 or bfloat16, parameters, gradients and momentum alike.
Floor: bytes that any step must move (p and m read and written, g read) over the copy bandwidth
    measured here: device to device, read and written bytes both counted.
Kept / moved: gradients that stay where they are / that lie elsewhere at every step (two sets in turn).
Device and host time: see measure.py. Ours and the peer take turns on the device, so that drift meets both.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import shlex
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from lion_dist import Lion
from lion_dist.update import reference
from lion_dist.update.backends import triton_step
from lion_dist.update.segments import TILE

from .measure import (
    DEVICE,
    Spread,
    Step,
    copy_bandwidth,
    cycles_a_ms,
    device_activity,
    device_ms,
    extra_memory,
    freed,
    host_us,
    step_bytes,
)
from .peer_steps import BETAS, COMPILED, DECAY, LR, PEERS, Group, Peer, missing

MODES = {"fp32": torch.float32, "bf16": torch.bfloat16}
OURS = "lion_dist"


class Shape(NamedTuple):
    size: tuple[int, ...]
    decays: bool


def llama_shapes(vocab: int = 128256, hidden: int = 2048, kv: int = 512, inner: int = 8192, layers: int = 16) -> list:
    """The tied embedding, nine tensors a layer, and the last norm."""
    matrices = [(hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden)]
    matrices += [(inner, hidden), (inner, hidden), (hidden, inner)]
    layer = [Shape(size, True) for size in matrices] + [Shape((hidden,), False)] * 2
    return [Shape((vocab, hidden), True), *layer * layers, Shape((hidden,), False)]


class Model:
    """Parameters in two groups, and two sets of gradients for them."""

    def __init__(self, params: Sequence[Tensor], grads: Sequence[Sequence[Tensor]], decays: Sequence[bool]) -> None:
        self.params, self.grads = list(params), grads
        decaying = [p for p, d in zip(params, decays, strict=True) if d]
        others = [p for p, d in zip(params, decays, strict=True) if not d]
        self._groups = [(decaying, DECAY), (others, 0.0)]
        self._set = 0
        self.move_gradients()

    @classmethod
    def random(cls, shapes: Sequence[Shape], dtype: torch.dtype) -> Model:
        def new(std: float) -> list[Tensor]:
            return [torch.empty(s.size, dtype=dtype, device=DEVICE).normal_(std=std) for s in shapes]

        params = [p.requires_grad_() for p in new(0.02)]
        return cls(params, [new(1e-3), new(1e-3)], [s.decays for s in shapes])

    def groups(self) -> list[Group]:
        return [{"params": list(params), "weight_decay": decay} for params, decay in self._groups if params]

    def move_gradients(self) -> None:
        """Every parameter's gradient now lies at another address."""
        self._set = 1 - self._set
        for p, g in zip(self.params, self.grads[self._set], strict=True):
            p.grad = g

    @property
    def step_bytes(self) -> int:
        return step_bytes(self.params)


def make_ours(groups: list[Group]) -> Step:
    return Lion(groups, lr=LR, betas=BETAS).step


@dataclass
class Reading:
    """One contestant on one model; each list is raw: ms of device time, us of host time a step."""

    device_ms: dict[str, list[float]] = field(default_factory=dict)
    host_us: dict[str, list[float]] = field(default_factory=dict)
    kernels: dict[str, dict[str, int]] = field(default_factory=dict)  # how often each is launched, by name
    copies: dict[str, int] = field(default_factory=dict)
    extra_bytes: dict[str, int] = field(default_factory=dict)
    ours_device_ms: dict[str, list[float]] = field(default_factory=dict)  # in turn with this contestant


def measure(step: Step, model: Model, ours: Step | None, repeats: int, cycles: float) -> Reading:
    """All readings of one step; with ``ours``, its device times are taken in turn with the step's."""
    reading = Reading()
    for _ in range(3):  # compiles, autotunes, makes state
        model.move_gradients()
        step()
        if ours is not None:
            ours()
    for case, before in (("kept", lambda: None), ("moved", model.move_gradients)):
        reading.host_us[case] = host_us(step, before, repeats)
        steps, leads = [step], [statistics.median(reading.host_us[case])]
        if ours is not None:
            steps.append(ours)
            leads.append(statistics.median(host_us(ours, before, 5)))
        reading.device_ms[case], *rest = device_ms(steps, before, leads, repeats, cycles)
        if rest:
            reading.ours_device_ms[case] = rest[0]
        before()
        kernels, reading.copies[case] = device_activity(step)
        reading.kernels[case] = dict(Counter(kernels))
        before()
        reading.extra_bytes[case] = extra_memory(step)
    return reading


@dataclass
class ModeResult:
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


# Further cases for ours alone.


@dataclass
class Extra:
    name: str
    step_bytes: int
    reading: Reading
    note: str = ""


def small_tensors(dtype: torch.dtype) -> Model:
    """1000 tensors of 1 to 4096 elements; they fit the L2 cache, so the floor does not bind them."""
    chooser = random.Random(0)
    return Model.random([Shape((chooser.randint(1, 4096),), i % 2 == 0) for i in range(1000)], dtype)


def unaligned_tensors(dtype: torch.dtype) -> Model:
    """Parameters and gradients one element into their buffers, as FSDP1 may hand them out; momenta are aligned."""
    shapes = [s for s in llama_shapes() if s.decays][:29]

    def views() -> list[Tensor]:
        buffers = [torch.zeros(1 + s.size[0] * s.size[1], dtype=dtype, device=DEVICE).normal_() for s in shapes]
        return [b[1:].view(s.size).detach() for b, s in zip(buffers, shapes, strict=True)]

    return Model([p.requires_grad_() for p in views()], [views(), views()], [True] * len(shapes))


def past_int32(extra: int = 128) -> Model:
    shapes = [Shape(((1 << 31) + extra,), True)]
    return Model.random(shapes, torch.bfloat16)


def check_slices(model: Model, step: Step, optimizer: Lion) -> str:
    """Steps the one parameter once and compares slices at both ends and around element 2**31 with the rule."""
    (p,), length, border = model.params, 4096, 1 << 31
    starts = [0, border // 2, border - length // 2, p.numel() - length]
    slices = [slice(start, min(start + length, p.numel())) for start in starts]
    m = optimizer.state[p]["exp_avg"]
    g = p.grad
    assert g is not None
    row = torch.tensor([LR, DECAY, *BETAS, 1.0], dtype=torch.float64, device=DEVICE)
    before = [(p.detach()[s].clone(), g[s].clone(), m[s].clone()) for s in slices]
    step()
    for s, tensors in zip(slices, before, strict=True):
        expected = reference.lion_rule(*tensors, reference.scalars(row))
        for got, want in zip((p.detach()[s], m[s]), expected, strict=True):
            if not torch.equal(got.view(torch.int16), want.view(torch.int16)):
                raise AssertionError(f"elements {s.start} to {s.stop} differ from the reference")
    return f"{len(slices)} slices of {length} have the reference's bits"


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

    for mode, dtype in MODES.items():
        add(f"1000 tensors of 1 to 4096, {mode}", lambda dtype=dtype: small_tensors(dtype))  # type: ignore[misc]
        add(f"p and g at odd offsets, {mode}", lambda dtype=dtype: unaligned_tensors(dtype))  # type: ignore[misc]
    if large:
        free = torch.cuda.mem_get_info()[0]
        if free < 24 << 30:
            print(f"  2^31 + 128 elements: skipped, {free >> 30} GiB free, 24 needed", flush=True)
        else:
            add("one tensor of 2^31 + 128, bf16", past_int32, check_slices)
    return extras


# The sweep.


def sweep(repeats: int, cycles: float) -> dict[str, Any]:
    """Device time of ours for every block size and number of warps. Three passes, so that drift is seen."""
    configs = [(block, warps) for block in (512, 1024, 2048, 4096, TILE) for warps in (2, 4, 8)]
    raw: dict[str, Any] = {}
    with freed():
        bandwidth = copy_bandwidth(repeats)
    for mode, dtype in MODES.items():
        with freed():
            model = Model.random(llama_shapes(), dtype)
            floor = model.step_bytes / statistics.median(bandwidth) * 1e3
            step = make_ours(model.groups())
            times: dict[tuple[int, int], list[float]] = {config: [] for config in configs}
            shipped = triton_step.LAUNCH[dtype.itemsize]
            try:
                for config in configs * 3:
                    triton_step.LAUNCH[dtype.itemsize] = config
                    step()  # compiles at its first turn
                    (readings,) = device_ms([step], lambda: None, [500.0], repeats, cycles)
                    times[config] += readings
            finally:
                triton_step.LAUNCH[dtype.itemsize] = shipped
            del model, step
        raw[mode] = {"floor_ms": floor, "ms": {f"{b}x{w}": t for (b, w), t in times.items()}}
        print(f"\n{mode}, ms a step (fraction of the floor, {floor:.2f} ms); shipped: {shipped[0]}, {shipped[1]} warps")
        print("\n| BLOCK | 2 warps | 4 warps | 8 warps |\n|---|---|---|---|")
        for block in dict.fromkeys(block for block, _ in configs):
            medians = [statistics.median(times[block, warps]) for warps in (2, 4, 8)]
            print(f"| {block} | " + " | ".join(f"{ms:.3f} ({floor / ms:.3f})" for ms in medians) + " |")
    return raw


# Reporting.


def both(values: dict[str, Any], show: Callable[[Any], str]) -> str:
    """Kept / moved."""
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
    parser.add_argument("--sweep", action="store_true", help="only try block sizes and warps of our kernel")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")

    # In bf16 the decay of this model rounds to nothing, which is what is measured and needs no telling.
    warnings.filterwarnings("ignore", message="lion_dist: lr \\* weight_decay")
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
    if args.sweep:
        raw["sweep"] = sweep(repeats // 2 + 1, cycles)
    else:
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
