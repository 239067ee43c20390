"""Iterations with DeepSpeed's Lion and with lion_dist's, in turns within one process for each rank.

    python -m benchmarks.deepspeed_turns                       ZeRO stages 1 to 3 on all GPUs of this machine
    (from the repository's root; --help for sizes)

benchmarks.iteration gives every mode processes of its own, which differ by more than the two optimizers do. Here both
engines of a stage stay in memory, and take turns of `--iterations` iterations.

Model: as in benchmarks.iteration.
Device time: mean between two CUDA events around a turn, on the slowest rank.
Host time: of engine.step() alone, mean over a turn, with nothing queued on the device before it.
Ratio: lion_dist's time over that of DeepSpeed's optimizer in the same turn, median [min, max] over the turns.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import statistics
import tempfile
import time

import torch
import torch.distributed as dist

import lion_dist

from .llama import LanguageModel, Llama
from .measure import join_group, machine, run_ranks
from .peer_steps import installed_version
from .peers_deepspeed import deepspeed_zero
from .trainer import Trainer


def turn(trainer: Trainer, tokens: torch.Tensor, iterations: int) -> tuple[float, float]:
    """Milliseconds of an iteration on the device, and of engine.step() on the host."""

    def backward() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = trainer.forward(tokens)
        trainer.backward(loss)

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    dist.barrier()
    torch.cuda.synchronize()
    begin.record()
    for _ in range(iterations):
        backward()
        trainer.step()
    end.record()
    torch.cuda.synchronize()
    host = 0.0
    for _ in range(iterations):
        backward()
        torch.cuda.synchronize()
        start = time.perf_counter()
        trainer.step()
        host += time.perf_counter() - start
    worst = torch.tensor([begin.elapsed_time(end), host * 1e3], device="cuda") / iterations
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    device_ms, host_ms = worst.tolist()
    return device_ms, host_ms


def of_stage(stage: int, options: argparse.Namespace) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """The turns of DeepSpeed's optimizer and of lion_dist's."""
    trainers = []
    for ours in (False, True):
        torch.manual_seed(0)
        with torch.device("cuda"):
            model = LanguageModel(Llama(layers=options.layers, seq_len=options.seq_len))
        trainers.append(deepspeed_zero(model, options, stage, ours=ours))
    lion_dist.deepspeed.unregister()
    tokens = torch.randint(Llama.vocabulary, (options.sequences, options.seq_len), device="cuda")
    for trainer in trainers:
        turn(trainer, tokens, 2)
    turns = []
    for i in range(options.turns):
        order = trainers if i % 2 else trainers[::-1]
        found = {id(trainer): turn(trainer, tokens, options.iterations) for trainer in order}
        turns.append((found[id(trainers[0])], found[id(trainers[1])]))
    return turns


def run(rank: int, options: argparse.Namespace, rendezvous: str) -> None:
    join_group(rank, options.ranks, rendezvous)
    for stage in options.stages:
        turns = of_stage(stage, options)
        gc.collect()
        torch.cuda.empty_cache()
        if rank:
            continue
        cells = [f"ZeRO-{stage}"]
        for i in range(2):  # device time, host time
            theirs, ours = ([pair[who][i] for pair in turns] for who in range(2))
            ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
            cells += [spread(theirs, 2), spread(ours, 2), spread(ratios, 3)]
        print(f"| {' | '.join(cells)} |", flush=True)
    dist.destroy_process_group()


def spread(values: list[float], digits: int) -> str:
    median, low, high = (f"{f(values):.{digits}f}" for f in (statistics.median, min, max))
    return f"{median} [{low}, {high}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count())
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--iterations", type=int, default=8, help="of a turn")
    parser.add_argument("--layers", type=int, default=Llama.layers)
    parser.add_argument("--sequences", type=int, default=4, help="number of sequences for each rank")
    parser.add_argument("--seq-len", type=int, default=Llama.seq_len)
    options = parser.parse_args()
    options.clip = False
    print(f"{machine(options.ranks)} | torch {torch.__version__} | DeepSpeed {installed_version('deepspeed')} | "
          f"{datetime.date.today()}\n")  # fmt: skip
    print("| stage | DeepSpeed's Lion, ms | lion_dist's | ratio | DeepSpeed's, host ms | lion_dist's | ratio |")
    print("|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(run, (options, f"{folder}/rendezvous"), options.ranks)


if __name__ == "__main__":
    main()
