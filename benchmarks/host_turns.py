"""The host's time where it sets the pace, on one GPU: steps under FSDP, and an iteration of one short sequence.

    python -m benchmarks.host_turns        a minute on one GPU
    (from the repository's root; --help for sizes)

Hosts differ by up to four times, and processes on one host by a third. So contestants stay in one process and take
turns.
Model: as in benchmarks.iteration, on one rank.
Step: host time of one step with nothing queued on the device (measure.host_us), with gradients that keep their
    addresses; with those of two backwards in turn; and right after a forward and backward, after which the processor's
    caches hold little of what a step reads.
Iteration: the time until the device has finished a turn of `--iterations` iterations, and the host's time in it.
Ratio: over that of compute alone in the same turn, median [min, max] over the turns.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .host_time import CONTESTANTS
from .llama import LanguageModel, Llama
from .measure import Spread, Step, freed, host_us, join_group, machine
from .peer_steps import DECAY, Group
from .peers import MODES, shard_fsdp1, shard_fsdp2
from .step_alone import TwoSets
from .trainer import Trainer

WARM_UP = 4


def make_model(options: argparse.Namespace) -> LanguageModel:
    torch.manual_seed(0)
    with torch.device("cuda"):
        return LanguageModel(Llama(layers=options.layers, seq_len=options.seq_len))


# Steps ----------------------------------------------------------------------------------------------


STEPS = {name: CONTESTANTS[name] for name in ("lion_dist", "torch.optim.AdamW, fused=True")}  # that take DTensors


def unsharded(model: LanguageModel) -> LanguageModel:
    return model


def fsdp2(model: LanguageModel) -> LanguageModel:
    shard_fsdp2(model, reshard=False)
    return model


WRAPPERS: dict[str, Callable[[LanguageModel], Any]] = {"no FSDP": unsharded, "FSDP1": shard_fsdp1, "FSDP2": fsdp2}


class Contestant:
    """A step with a model of its own, and its readings."""

    def __init__(
        self, wrapper: str, make: Callable[[list[Group]], Step], tokens: Tensor, options: argparse.Namespace
    ) -> None:
        model = make_model(options)
        groups = model.groups(DECAY)  # FSDP1 keeps the objects but not their shapes; FSDP2 has other objects
        self.model, self.tokens = WRAPPERS[wrapper](model), tokens
        groups = model.groups(DECAY) if wrapper == "FSDP2" else groups
        self.step, self.params = make(groups), [p for group in groups for p in group["params"]]
        self.sets = TwoSets(self.params, self.backward)
        self.readings: tuple[list[float], list[float], list[float]] = ([], [], [])

    def backward(self, _: int = 0) -> None:
        for p in self.params:
            p.grad = None
        with torch.autocast("cuda", torch.bfloat16):
            loss = self.model(self.tokens)
        loss.backward()

    def take_turn(self) -> None:
        self.sets.exchange()
        self.step()
        for own, prepare in zip(self.readings, (lambda: None, self.sets.exchange, self.backward), strict=True):
            own.extend(host_us(self.step, prepare, 1))


def steps(wrapper: str, tokens: Tensor, options: argparse.Namespace) -> None:
    contestants = {name: Contestant(wrapper, make, tokens, options) for name, make in STEPS.items()}
    for turn in range(WARM_UP + options.turns):
        for contestant in contestants.values():
            contestant.take_turn()
            if turn == WARM_UP - 1:
                for own in contestant.readings:
                    own.clear()
    for name, contestant in contestants.items():
        spreads = map(Spread.of, contestant.readings)
        cells = [f"{s.median:.0f} [{s.p10:.0f}, {s.p90:.0f}]" for s in spreads]
        print(f"| {' | '.join([wrapper, name, *cells])} |", flush=True)


# Iterations -----------------------------------------------------------------------------------------


def turn_ms(trainer: Trainer, tokens: Tensor, iterations: int) -> tuple[float, float]:
    """Milliseconds of an iteration, until the device has finished and on the host."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(iterations):
        with torch.autocast("cuda", torch.bfloat16):
            loss = trainer.forward(tokens)
        trainer.backward(loss)
        trainer.step()
    on_host = time.perf_counter() - start
    torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3 / iterations, on_host * 1e3 / iterations


def iterations(tokens: Tensor, options: argparse.Namespace) -> None:
    modes = ["compute", "zero2_signs", "zero2"]
    trainers = {mode: MODES[mode].make(make_model(options), options) for mode in modes}
    for trainer in trainers.values():
        turn_ms(trainer, tokens, WARM_UP)
    turns = [
        {mode: turn_ms(trainers[mode], tokens, options.iterations) for mode in (modes if i % 2 else modes[::-1])}
        for i in range(options.turns)
    ]
    print("\n| mode | ms an iteration | host ms | over compute alone |\n|---|---|---|---|")
    for mode in modes:
        cells = [MODES[mode].what]
        for kind in range(2):
            spread = Spread.of([turn[mode][kind] for turn in turns])
            cells.append(f"{spread.median:.1f} [{spread.p10:.1f}, {spread.p90:.1f}]")
        ratios = [turn[mode][0] / turn["compute"][0] for turn in turns]
        cells.append(f"{statistics.median(ratios):.3f} [{min(ratios):.3f}, {max(ratios):.3f}]")
        print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--iterations", type=int, default=4, help="of a turn")
    parser.add_argument("--layers", type=int, default=Llama.layers)
    parser.add_argument("--sequences", type=int, default=1)
    parser.add_argument("--seq-len", type=int, default=Llama.seq_len)
    parser.add_argument("--bucket-mb", type=float, default=256)
    options = parser.parse_args()
    options.clip = False
    with tempfile.TemporaryDirectory() as folder:
        join_group(0, 1, f"{folder}/rendezvous")
        tokens = torch.randint(Llama.vocabulary, (options.sequences, options.seq_len), device="cuda")
        print(f"{machine(1)} | torch {torch.__version__} | {datetime.date.today()}\n")
        print("Host time of a step, us, median [10th, 90th percentile]\n")
        print("|  | optimizer | gradients kept | moved | after a backward |\n|---|---|---|---|---|")
        for wrapper in WRAPPERS:
            with freed():
                steps(wrapper, tokens, options)
        iterations(tokens, options)
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
