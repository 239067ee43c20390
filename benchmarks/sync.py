"""A step and its synchronisation alone, on several GPUs: parameters gathered, or signs gathered and applied.

    python -m benchmarks.sync                                     float32 and bfloat16, 2^30 parameters
    NCCL_P2P_DISABLE=1 NCCL_SHM_DISABLE=1 NCCL_SOCKET_IFNAME=lo python -m benchmarks.sync --repeats 10
                                                                  the same over NCCL's socket transport
    (from the repository's root; --help for sizes)

The step: ShardedLion.step() with stage=1 on gradients that are ready, in two groups (decay and none): a fused step and
    an all-gather of parameters (`params`); or an update of momenta that packs signs, an all-gather of signs, and a
    kernel that applies them (`signs`).
Device time: the time between two CUDA events around the step, on the slowest rank. Devices are kept busy beforehand, so
    that host time is not part of it. The modes take turns; medians [10th, 90th percentile].
Parts: time in which kernels of one kind ran during the step on rank 0, by the profiler.
Bits: whether, after 100 further steps on changing gradients, all parameters under `signs` equal those under `params`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lion_dist import ShardedLion

from .measure import Spread, cycles_a_ms, events_ms, join_group, machine, run_ranks

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LEAD_MS = 5.0  # how long the devices are kept busy while the hosts enqueue a step


def make(numel: int, tensors: int, dtype: torch.dtype, device: torch.device, sync: str) -> tuple[list, ShardedLion]:
    generator = torch.Generator(device).manual_seed(1)
    length = numel // tensors
    params = [
        torch.nn.Parameter(torch.randn(length, dtype=dtype, device=device, generator=generator)) for _ in range(tensors)
    ]
    groups: list[dict[str, Any]] = [
        {"params": params[::2], "weight_decay": 0.1}, {"params": params[1::2], "weight_decay": 0.0}
    ]  # fmt: skip
    return params, ShardedLion(groups, lr=1e-3, stage=1, param_sync=sync)


def parts(step: Any) -> dict[str, float]:
    """Milliseconds of one step by kind of kernel, the longest first."""
    torch.cuda.synchronize()
    dist.barrier()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(3):
            step()
        torch.cuda.synchronize()
    found: dict[str, float] = {}
    for e in profile.key_averages():
        if e.device_time_total > 0:
            name = "gather" if "nccl" in e.key else e.key if "_kernel" in e.key and "void" not in e.key else "others"
            found[name] = found.get(name, 0.0) + e.device_time_total / 3e3
    return {name: round(ms, 3) for name, ms in sorted(found.items(), key=lambda item: -item[1])}


def run(rank: int, options: argparse.Namespace, rendezvous: str, out: str) -> None:
    device = join_group(rank, options.ranks, rendezvous)
    cycles = cycles_a_ms()
    reports = []
    for name in options.dtypes.split(","):
        dtype = DTYPES[name]
        optimizers: dict[str, tuple[list, ShardedLion]] = {
            sync: make(options.numel, options.tensors, dtype, device, sync) for sync in ("params", "signs")
        }
        generator = torch.Generator(device).manual_seed(2)  # the same averaged gradient on every rank
        grads = [torch.empty_like(p).normal_(generator=generator) for p in optimizers["params"][0]]
        for params, _ in optimizers.values():
            for p, g in zip(params, grads, strict=True):
                p.grad = g
        times: dict[str, list[float]] = {sync: [] for sync in optimizers}
        for i in range(options.repeats + 3):
            for sync, (_, optimizer) in optimizers.items():
                torch.cuda.synchronize()
                dist.barrier()
                torch.cuda._sleep(int(LEAD_MS * cycles))
                ms = torch.tensor(events_ms(optimizer.step), device=device)
                dist.all_reduce(ms, op=dist.ReduceOp.MAX)
                if i >= 3:
                    times[sync].append(ms.item())
        within = {sync: parts(optimizer.step) for sync, (_, optimizer) in optimizers.items()}
        for _ in range(options.steps):
            for g in grads:
                g.normal_(generator=generator)
            for _, optimizer in optimizers.values():
                optimizer.step()
        same = all(map(same_bits, optimizers["params"][0], optimizers["signs"][0]))
        optimizers["signs"][1].check_replicas()
        spreads = {sync: Spread.of(values) for sync, values in times.items()}
        reports.append({"dtype": name, "ms": spreads, "same_bits": same, "parts": within, "raw": times})
        del optimizers, grads, params, optimizer, p, g
        torch.cuda.empty_cache()
    if rank == 0:
        Path(out).write_text(json.dumps(reports))
    dist.barrier()
    dist.destroy_process_group()


def same_bits(a: Tensor, b: Tensor) -> bool:
    integer = {4: torch.int32, 2: torch.int16}[a.element_size()]
    return torch.equal(a.detach().view(integer), b.detach().view(integer))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--ranks",
        type=int,
        default=torch.cuda.device_count(),
        help="where these are more than the GPUs, ranks share GPUs",
    )
    parser.add_argument("--numel", type=int, default=2**30)
    parser.add_argument("--tensors", type=int, default=128)
    parser.add_argument("--dtypes", default="fp32,bf16")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--steps", type=int, default=100, help="number of steps after which bits are compared")
    parser.add_argument("--json", help="write the raw figures here")
    options = parser.parse_args()
    print(f"{datetime.date.today()}, {machine(options.ranks)}, torch {torch.__version__}")
    print(f"{options.numel:,} parameters in {options.tensors} tensors")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "report.json"
        run_ranks(run, (options, f"{folder}/rendezvous", str(out)), options.ranks)
        reports = json.loads(out.read_text())
    print("| dtype | params, ms | signs, ms | ratio | same bits | parts of params, ms | parts of signs, ms |")
    print("|---|---|---|---|---|---|---|")
    for r in reports:
        params, signs = (Spread(*r["ms"][sync]) for sync in ("params", "signs"))
        within = (", ".join(f"{k} {v}" for k, v in r["parts"][sync].items()) for sync in ("params", "signs"))
        print(
            f"| {r['dtype']} | {params.median:.2f} [{params.p10:.2f}, {params.p90:.2f}] "
            f"| {signs.median:.2f} [{signs.p10:.2f}, {signs.p90:.2f}] | {params.median / signs.median:.2f} "
            f"| {'yes' if r['same_bits'] else 'NO'} | {' | '.join(within)} |"
        )
    if options.json:
        Path(options.json).write_text(json.dumps(reports, indent=1))


if __name__ == "__main__":
    main()
