"""Trains a small model with ShardedLion, and goes on from its last checkpoint when it is started again. To copy.

torchrun --nproc_per_node 2 examples/minimal.py          2 GPUs, or 2 processes on a CPU
torchrun --nproc_per_node 2 examples/minimal.py 400      to step 400
"""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn

from lion_dist import ShardedLion, checkpoint

FOLDER = "runs/minimal"


def main(steps: int) -> None:
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    rank = dist.get_rank()

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 1)).to(device)  # not wrapped
    optimizer = ShardedLion(model.named_parameters(), lr=1e-3, weight_decay=0.1)
    last = checkpoint.latest(FOLDER, default=None)
    done = 0 if last is None else checkpoint.load(last, model, optimizer)["step"]

    for step in range(done + 1, steps + 1):
        torch.manual_seed(step * dist.get_world_size() + rank)  # each rank has its own batch: put your data here
        x = torch.randn(128, 64, device=device)
        loss = nn.functional.mse_loss(model(x), x.square().mean(1, keepdim=True))
        loss.backward()  # gradients are averaged meanwhile, and leave p.grad
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps:
            checkpoint.save(f"{FOLDER}/step-{step}", model, optimizer, extra={"step": step}, keep_last=2)
            if rank == 0:
                print(f"step {step}: loss {loss.item():.4f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
