"""Measures which error each rank of two nodes raises, and after how long, if one is killed or stopped in its backward.

    python -m benchmarks.failing_rank      a minute on a CPU (from the repository's root)

Two replicas of two ranks on gloo: FSDP2 in each node, ShardedLion between them. All groups have a time-out of 12 s.
Rank 1 fails in its fourth backward, after it has sent some of its gradients.
"""

from __future__ import annotations

import os
import signal
import tempfile
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lion_dist import ShardedLion

TIMEOUT = timedelta(seconds=12)
RANKS, FAILING, PASSES = 4, 1, 4
SIGNALS = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}


class Fail(torch.autograd.Function):
    """Sends this process a signal in its backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, number: int) -> Tensor:
        ctx.number = number
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        os.kill(os.getpid(), ctx.number)
        return grads[0], None


def run(rank: int, rendezvous: str, how: str, reports: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=RANKS, timeout=TIMEOUT)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for name in ("replicate", "shard"):
        dist.distributed_c10d._set_pg_timeout(TIMEOUT, mesh[name].get_group())
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 129), nn.Linear(129, 64), nn.Linear(64, 7))
    for unit in (*model, model):
        fully_shard(unit, mesh=mesh["shard"])
    group = mesh["replicate"].get_group()
    optimizer = ShardedLion(model.named_parameters(), lr=1e-3, process_group=group, bucket_mb=0.01)
    start = time.monotonic()
    try:
        for number in range(PASSES):
            start = time.monotonic()
            if number == PASSES - 1 and rank == FAILING:
                model[1].register_forward_hook(lambda module, args, output: Fail.apply(output, SIGNALS[how]))
            model(torch.randn(4, 64)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        reports.put((rank, 0.0, "it did not notice"))
    except RuntimeError as error:
        reports.put((rank, time.monotonic() - start, str(error).splitlines()[0]))
        time.sleep(3)  # a rank that ends at once would tell the others earlier
    os._exit(0)


def main() -> None:
    context = multiprocessing.get_context("spawn")
    for how in SIGNALS:
        reports = context.SimpleQueue()
        with tempfile.TemporaryDirectory() as folder:
            arguments = f"{folder}/rendezvous", how, reports
            processes = [context.Process(target=run, args=(rank, *arguments)) for rank in range(RANKS)]
            for process in processes:
                process.start()
            for rank, process in enumerate(processes):
                if rank != FAILING:
                    process.join()
            processes[FAILING].kill()
        print(f"rank {FAILING} is {how}:")
        while not reports.empty():
            rank, seconds, what = reports.get()
            print(f"  rank {rank} after {seconds:.1f} s: {what[:160]}", flush=True)


if __name__ == "__main__":
    main()
