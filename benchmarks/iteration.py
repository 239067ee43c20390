"""Whole training iterations on several GPUs: time, memory, and how much of the collectives is hidden.

    python -m benchmarks.iteration --repeats 3                         every mode on all GPUs of this machine
    python -m benchmarks.iteration --modes zero2 --trace zero2.png     a picture of one iteration, by the profiler
    python -m benchmarks.iteration --modes zero2 --compile block       torch.compile of each block; or of the model
    NCCL_P2P_DISABLE=1 NCCL_SHM_DISABLE=1 NCCL_SOCKET_IFNAME=lo python -m benchmarks.iteration
                                                                       over NCCL's socket transport
    python -m benchmarks.iteration --ranks 4 --node 2 --modes hsdp,hybrid_signs
                                                                       two nodes of two GPUs, made up on this machine
    python -m benchmarks.iteration --ranks 1 --step-alone --modes fsdp1,fsdp1_lion_pytorch_triton,fsdp2
                                                                       opt.step() by itself too (step_alone.py)
    (from the repository's root; --help for sizes)

Model: benchmarks/llama.py, float32 parameters under bfloat16 autocast, decay and no-decay groups, no clipping without
    `--clip`, `--sequences` of `--seq-len` tokens for each rank. Tokens are random, the same four batches in every mode.
Mode: one way to train (peers.py), with one process for each rank. `compute` is a forward and backward alone.
    Modes take turns, `--repeats` times. The row of a mode that fails, or whose package is not installed, says so.
Nodes: modes over a mesh shard the model over consecutive ranks and replicate it `--replicas` times. They differ in what
    goes between replicas, which counts where those links are slower than the links between shards. `--node N` makes
    that of one machine: NCCL takes each N consecutive ranks for a node, with NVLink or shared memory within it and
    sockets to the others. A node needs N GPUs, which it may share with other nodes. Ranks that share a single GPU have
    sockets everywhere, and what goes between shards then takes as long as what goes between replicas; `--replicas` of
    as many as there are ranks leaves the latter alone. The sockets' rate is the loopback device's; NCCL has no setting
    for it.
Last loss: loss of the last timed iteration, mean over the ranks. It shows whether a mode trains differently.
Time: mean of `--iterations` iterations between two CUDA events, on the slowest rank; nothing is waited for in between.
    Host time: the same on the host's clock, until the host waits for the device.
Hidden: the part of a collective's device time during which other kernels ran too, by the profiler (overlap.py).
Memory: torch's peak of allocated bytes over the timed iterations, GiB; and its value after the forward.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .llama import LanguageModel, Llama
from .measure import join_group, machine, start_ranks
from .overlap import mark, trace
from .peer_steps import installed_version, missing
from .peers import MODES
from .step_alone import HEADER as ALONE_HEADER
from .step_alone import StepAlone, TwoSets, measure_alone, params_of
from .trainer import MAX_NORM, Trainer

GIB = 2**30


@dataclass
class Report:
    """Rank 0's report on a mode: times in ms and memory in GiB of the worst rank; the last loss, mean over ranks."""

    mode: str
    ms: float
    host_ms: float
    peak_gib: float
    after_forward_gib: float
    compile_s: float
    loss: float
    hidden: dict[str, tuple[float, float]] = field(default_factory=dict)  # by collective: (ms, hidden ms)
    step_alone: dict[str, Any] = field(default_factory=dict)  # rank 0's StepAlone, with --step-alone


def run(rank: int, mode: str, options: argparse.Namespace, rendezvous: str, out: str) -> None:
    device = join_group(rank, options.ranks, rendezvous, options.node)
    torch.manual_seed(0)
    sizes = Llama(layers=options.layers, seq_len=options.seq_len)
    with device:
        model = LanguageModel(sizes)
    if options.compile == "block":
        for block in model.blocks:
            block.compile()
    elif options.compile == "model":
        model.compile()
    trainer = MODES[mode].make(model, options)
    generator = torch.Generator(device).manual_seed(rank)
    shape = (options.sequences, options.seq_len)
    batches = [torch.randint(sizes.vocabulary, shape, device=device, generator=generator) for _ in range(4)]

    after_forward = [0]

    def iteration(i: int, marks: bool = False) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            loss = trainer.forward(batches[i % len(batches)])
        after_forward[0] = torch.cuda.memory_allocated()
        mark(marks)
        trainer.backward(loss)
        mark(marks)
        trainer.step()
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
    dist.all_reduce(loss, op=dist.ReduceOp.AVG)
    ms, host_ms, peak_gib, after_forward_gib, compile_s = worst.tolist()
    report = Report(mode, ms, host_ms, peak_gib, after_forward_gib, compile_s, loss.item())
    if options.trace or options.hidden:
        picture = Path(options.trace) if options.trace and rank == 0 else None
        report.hidden = trace(iteration, trainer.between, picture, mode, options)
    if options.step_alone and trainer.local is not None:
        report.step_alone = step_alone(trainer, batches, options)
    if rank == 0:
        Path(out).write_text(json.dumps(asdict(report)))
    dist.barrier()
    dist.destroy_process_group()


def step_alone(trainer: Trainer, batches: list[Tensor], options: argparse.Namespace) -> dict[str, Any]:
    """Rank 0 measures its step. The others wait on the host: a kernel that waits would slow a GPU that they share."""

    def backward(number: int) -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = trainer.forward(batches[number])
        trainer.backward(loss)

    gradients = TwoSets(params_of(trainer.local), backward)
    torch.cuda.synchronize()
    dist.barrier()
    torch.cuda.synchronize()
    store = dist.distributed_c10d._get_default_store()
    if dist.get_rank() > 0:
        store.wait(["step alone"], datetime.timedelta(seconds=options.deadline))
        return {}
    alone = measure_alone(trainer.local, gradients, options.iterations)
    store.set("step alone", "done")
    return asdict(alone)


# The table ------------------------------------------------------------------------------------------


def measure(mode: str, options: argparse.Namespace) -> Report:
    """Runs a mode once, in processes of its own, and raises what they raise."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "report.json"
        context = start_ranks(run, (mode, options, f"{folder}/rendezvous", str(out)), options.ranks)
        deadline = time.monotonic() + options.deadline
        while not context.join(timeout=max(0.0, deadline - time.monotonic())):
            if time.monotonic() >= deadline:
                for process in context.processes:
                    process.kill()
                    process.join()  # the next turn needs its memory
                raise TimeoutError(f"not done after {options.deadline:.0f} s (--deadline)")
        return Report(**json.loads(out.read_text()))


@dataclass
class Row:
    """The turns of a mode, and why it stopped taking turns."""

    mode: str
    turns: list[Report] = field(default_factory=list)
    failure: str = ""

    def take_turn(self, options: argparse.Namespace) -> None:
        self.failure = self.failure or missing(MODES[self.mode].distribution)
        if self.failure:
            return
        try:
            self.turns.append(measure(self.mode, options))
        except Exception as error:
            print(error, file=sys.stderr, flush=True)
            last_line = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            self.failure = f"failed: {last_line.replace('|', '/')}"

    def cells(self) -> list[str]:
        if not self.turns:
            return [self.failure, *[""] * (len(HEADER) - 2)]

        def over_turns(name: str, digits: int) -> str:
            """The median; and [min, max], if their digits differ."""
            values = [getattr(turn, name) for turn in self.turns]
            median, low, high = (f"{f(values):.{digits}f}" for f in (statistics.median, min, max))
            return median if low == high else f"{median} [{low}, {high}]"

        numbers = [("ms", 1), ("host_ms", 1), ("peak_gib", 2), ("after_forward_gib", 2), ("compile_s", 1), ("loss", 4)]
        notes = [f"{name} {under:.1f} / {total:.1f}" for name, (total, under) in self.turns[-1].hidden.items()]
        last = ", ".join(note for note in [*notes, self.failure] if note)
        return [*(over_turns(*number) for number in numbers), last]


HEADER = ["mode", "ms an iteration", "host ms", "peak GiB", "after forward GiB", "warm-up s", "last loss",
          "hidden / ms"]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", default=",".join(MODES), help=f"of {', '.join(MODES)}")
    parser.add_argument("--repeats", type=int, default=1, help="how many times the modes take turns")
    parser.add_argument(
        "--ranks",
        type=int,
        default=torch.cuda.device_count(),
        help="where these are more than the GPUs, ranks share GPUs",
    )
    parser.add_argument(
        "--replicas",
        type=int,
        help="of modes over a mesh; default: half the ranks if these are even and at least 4, else all",
    )
    parser.add_argument("--node", type=int, help="how many consecutive ranks NCCL takes for a node of its own")
    parser.add_argument("--layers", type=int, default=Llama.layers)
    parser.add_argument("--sequences", type=int, default=4, help="number of sequences for each rank")
    parser.add_argument("--seq-len", type=int, default=Llama.seq_len)
    parser.add_argument("--bucket-mb", type=float, default=256)
    parser.add_argument("--clip", action="store_true", help=f"clip the gradient's norm to {MAX_NORM}")
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--deadline", type=float, default=240, help="seconds that one turn of a mode may take")
    parser.add_argument("--compile", choices=["none", "block", "model"], default="none")
    parser.add_argument(
        "--hidden", action="store_true", help="profile, and print how much of the collectives is hidden"
    )
    parser.add_argument("--step-alone", action="store_true", help="measure the optimizer's step by itself too")
    parser.add_argument("--trace", help="profile, and draw rank 0's iteration into this PNG (of the last mode)")
    parser.add_argument("--json", type=Path, help="write every turn's report here")
    options = parser.parse_args()
    unknown = sorted(set(options.modes.split(",")) - set(MODES))
    if unknown:
        parser.error(f"unknown modes: {', '.join(unknown)}; there are {', '.join(MODES)}")
    if options.ranks < 1 or not torch.cuda.is_available():
        parser.error(
            f"needs a rank and a CUDA device at least; got --ranks {options.ranks}, {torch.cuda.device_count()} devices"
        )
    if options.replicas is None:
        options.replicas = options.ranks // 2 if options.ranks >= 4 and options.ranks % 2 == 0 else options.ranks
    if options.replicas < 1 or options.ranks % options.replicas:
        parser.error(f"--replicas {options.replicas} must divide the number of ranks, {options.ranks}")
    if options.node is not None and not 1 <= options.node <= torch.cuda.device_count():
        parser.error(f"--node {options.node}: a node needs a GPU for each rank, of {torch.cuda.device_count()}")
    rows = [Row(mode) for mode in dict.fromkeys(options.modes.split(","))]
    for turn in range(options.repeats):
        for row in rows:
            row.take_turn(options)
            last = row.failure or f"{row.turns[-1].ms:.1f} ms, loss {row.turns[-1].loss:.4f}"
            print(f"  turn {turn + 1} of {options.repeats}, {row.mode}: {last}", flush=True)
            if options.json:
                options.json.write_text(json.dumps([asdict(r) for r in rows], indent=1))
    print_table(rows, options)


def print_table(rows: list[Row], options: argparse.Namespace) -> None:
    used = sorted({MODES[row.mode].distribution for row in rows if row.turns} - {""})
    numel = sum(p.numel() for p in meta_model(options).parameters())
    where = [str(datetime.date.today()), machine(options.ranks, options.node), f"torch {torch.__version__}"]
    print("\n" + ", ".join([*where, *(f"{name} {installed_version(name)}" for name in used)]))
    print(f"`{shlex.join(['python', '-m', 'benchmarks.iteration', *sys.argv[1:]])}`")
    print(
        f"{numel:,} parameters, {options.sequences} x {options.seq_len} tokens a rank, compile {options.compile}, "
        f"{f'clipped to {MAX_NORM}' if options.clip else 'no clipping'}, {options.repeats} turns: median [min, max]\n"
    )
    print(f"| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}")
    for row in rows:
        print(f"| {' | '.join([f'{MODES[row.mode].what} (`{row.mode}`)', *row.cells()])} |", flush=True)
    if options.step_alone:
        print_step_alone(rows)


def print_step_alone(rows: list[Row]) -> None:
    """Prints, for each mode, the turn with the median device time."""
    print(f"\n| {' | '.join(ALONE_HEADER)} |\n|{'---|' * len(ALONE_HEADER)}")
    for row in rows:
        turns = [StepAlone(**turn.step_alone) for turn in row.turns if turn.step_alone]
        turns.sort(key=lambda alone: alone.ms["kept"])
        if turns:
            cells = turns[len(turns) // 2].cells()
            print(f"| {' | '.join([f'{MODES[row.mode].what} (`{row.mode}`)', *cells])} |", flush=True)


def meta_model(options: argparse.Namespace) -> nn.Module:
    with torch.device("meta"):
        return LanguageModel(Llama(layers=options.layers, seq_len=options.seq_len))


if __name__ == "__main__":
    main()
