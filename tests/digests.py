"""Digests of weights and momenta after 20 steps, for every stage, synchronisation, strategy, dtype and backend.

    python -m tests.digests                     compares with tests/digests.json; exits 1 if a digest differs
    python -m tests.digests --write PATH        writes the digests of the code that is imported
    python -m tests.digests --only stage2/signs only scenarios whose name contains this

A change that must not change results is checked so: the digests of the code before it are those of the code after it.
Only the public interface of lion_dist is used, so the script also runs beside another version of the library: copy it
and tests/digest_strategies.py into tests/ of that version's tree.

Weights and gradients are made from integers, each by at most one division, and averages over the ranks are exact, so
that the digests are the same on every machine: with and without a GPU, for every number of threads, and for every
order of a reduction. Sizes split badly on purpose: 1, 127, 129, odd products, fewer elements than ranks.

On a machine with GPUs, `--device cuda` runs the scenarios for which there are enough GPUs (1, 2 or 4 ranks) on them,
with the compiled kernels in place of Triton's interpreter; the expected digests are the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.digest_strategies import DTYPES, STRATEGIES, Rank, Scenario

EXPECTED = Path(__file__).with_name("digests.json")
WORLD_SIZES = (1, 2, 3, 4)
DEADLINE_S = 1200.0


def scenarios() -> Iterator[Scenario]:
    for dtypes, in_interpreter in zip(DTYPES, ("", "infinite", "lr_tensor", "decoupled"), strict=True):
        for variant in ("", "decoupled", "infinite", "lr_tensor"):
            yield Scenario("lion", 1, dtypes, variant=variant)
        yield Scenario("lion", 1, dtypes, triton=True, variant=in_interpreter)
        yield Scenario("lion", 1, dtypes, shapes="large")
    for stage, sync, world_size in product((1, 2), ("params", "signs"), WORLD_SIZES):
        options = {"stage": stage, "param_sync": sync}
        for dtypes in DTYPES:
            yield Scenario("sharded", world_size, dtypes, options=options)
        for variant in ("clip", "decoupled", "infinite", "accumulate"):
            if stage == 2 or variant != "accumulate":
                yield Scenario("sharded", world_size, variant=variant, options=options)
        if world_size == 2:
            yield Scenario("sharded", 2, shapes="large", options=options)
            yield Scenario("sharded", 2, "bf16", triton=True, options=options)
            if stage == 2:
                yield Scenario("sharded", 2, triton=True, variant="clip", options=options)
        if world_size == 3 and sync == "signs":
            yield Scenario("sharded", 3, "fp16", triton=True, options=options)
    for world_size in WORLD_SIZES:
        for strategy in ("ddp", "fsdp1", "fsdp2"):
            yield Scenario(strategy, world_size)
            yield Scenario(strategy, world_size, "bf16_fp32", variant="decoupled")
    yield Scenario("hsdp", 4)
    for strategy, triton in product(("fsdp2", "tp"), (False, True)):
        yield Scenario(strategy, 2, "bf16", triton)
    yield Scenario("tp", 2)
    for stage in (1, 2, 3):
        yield Scenario(f"deepspeed_zero{stage}", 2)
        yield Scenario(f"deepspeed_zero{stage}", 2, "bf16")


# Running --------------------------------------------------------------------------------------------


def digest(tensors: dict[str, Tensor]) -> str:
    """A sha256 of names, dtypes, shapes and bits."""
    h = hashlib.sha256()
    for name, t in sorted(tensors.items()):
        h.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        flat = t.detach().cpu().contiguous().reshape(-1)
        h.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return h.hexdigest()[:20]


def run_rank(rank: int, world_size: int, device_type: str, chosen: list[Scenario], folder: str) -> None:
    """Runs all scenarios of one world size, one after another, in this process."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device("cpu")
    backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
    if device_type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend, init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size,
        timeout=timedelta(seconds=DEADLINE_S),
    )  # fmt: skip
    found, times = {}, {}
    try:
        for scenario in chosen:
            began = time.perf_counter()
            weights, momenta = STRATEGIES[scenario.strategy](scenario, Rank(rank, world_size, device))
            found[scenario.name] = [digest(weights), digest(momenta)]
            times[scenario.name] = round(time.perf_counter() - began, 2)
            del weights, momenta
        outcome: dict[str, Any] = {"digests": found, "seconds": times}
    except BaseException:
        outcome = {"error": f"{scenario.name}\n{traceback.format_exc()}"}
    Path(folder, f"outcome{rank}.json").write_text(json.dumps(outcome))
    os._exit(0)  # a rank that failed may hold threads that wait for others


def run(device_type: str, only: str) -> tuple[dict[str, list[str]], dict[str, float]]:
    """Digests and seconds of all scenarios, by name.

    Raises:
        RuntimeError: a rank failed, or ranks came to different digests.
    """
    if device_type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch._dynamo", "torch.distributed.fsdp", "lion_dist"])
    digests: dict[str, list[str]] = {}
    seconds: dict[str, float] = {}
    every = [s for s in scenarios() if only in s.name]
    # DeepSpeed's scenarios have processes of their own, because DeepSpeed changes torch when it is imported.
    for world_size, with_deepspeed in product(WORLD_SIZES, (False, True)):
        chosen = [
            s for s in every if s.world_size == world_size and s.strategy.startswith("deepspeed") == with_deepspeed
        ]
        if device_type == "cuda" and (world_size == 3 or torch.cuda.device_count() < world_size):
            chosen = []
        if not chosen:
            continue
        with tempfile.TemporaryDirectory() as folder:
            ranks = [
                context.Process(target=run_rank, args=(rank, world_size, device_type, chosen, folder))
                for rank in range(world_size)
            ]
            for process in ranks:
                process.start()
            outcomes = wait_for(ranks, folder)
        for scenario in chosen:
            of_ranks = [outcome["digests"][scenario.name] for outcome in outcomes]
            if of_ranks.count(of_ranks[0]) != len(of_ranks):
                raise RuntimeError(f"{scenario.name}: the ranks differ: {of_ranks}")
            digests[scenario.name] = of_ranks[0]
            seconds[scenario.name] = outcomes[0]["seconds"][scenario.name]
    return digests, seconds


def wait_for(ranks: list[Any], folder: str) -> list[dict[str, Any]]:
    end = time.monotonic() + DEADLINE_S
    files = [Path(folder, f"outcome{rank}.json") for rank in range(len(ranks))]
    while any(process.is_alive() for process in ranks) and time.monotonic() < end:
        errors = [json.loads(f.read_text()).get("error") for f in files if f.exists() and f.stat().st_size]
        if any(errors):
            break  # the others wait for the one that failed
        time.sleep(0.05)
    for process in ranks:
        process.kill() if time.monotonic() >= end or any(f.exists() for f in files) else None
        process.join()
    missing = [(rank, ranks[rank].exitcode) for rank, f in enumerate(files) if not f.exists()]
    outcomes = [json.loads(f.read_text()) for f in files if f.exists()]
    failed = [outcome["error"] for outcome in outcomes if "error" in outcome]
    if failed or missing:
        raise RuntimeError(
            "\n".join([*failed, *(f"rank {rank} ended with exit code {code} and no result" for rank, code in missing)])
        )
    return outcomes


def differences(found: dict[str, list[str]], expected: dict[str, list[str]]) -> list[str]:
    """A line for each scenario whose digests are not those expected."""
    lines = []
    for name, got in found.items():
        if name not in expected:
            lines.append(f"{name}: no digest is expected for it; --write makes a new file")
            continue
        for what, one, other in zip(("weights", "momenta"), got, expected[name], strict=True):
            if one != other:
                lines.append(f"{name}: the {what} have digest {one}, expected {other}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="write the digests here instead of comparing them")
    parser.add_argument("--only", default="", help="run only scenarios whose name contains this")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--times", action="store_true", help="print the seconds that each scenario took")
    options = parser.parse_args()
    began = time.monotonic()
    found, seconds = run(options.device, options.only)
    if options.times:
        for name, s in sorted(seconds.items(), key=lambda item: -item[1]):
            print(f"{s:7.2f}  {name}")
    import lion_dist

    print(f"{len(found)} scenarios of {Path(lion_dist.__file__).parent} in {time.monotonic() - began:.0f} s")
    if options.write:
        options.write.write_text(json.dumps(found, indent=0, sort_keys=True) + "\n")
        return 0
    expected = json.loads(EXPECTED.read_text())
    if options.device == "cuda":
        # The compiled kernels give plain torch's bits in bfloat16 too, where the interpreter truncates.
        expected |= {s.name: expected[s.plain_name] for s in scenarios() if s.triton}
    lines = differences(found, expected)
    print("\n".join(lines) if lines else "all digests are those expected")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
