"""Trains the small GPT under Hugging Face Accelerate, which shards it by FSDP1 or FSDP2 as its configuration says.

    accelerate launch --config_file launch/accelerate/fsdp2.yaml --num_processes 2 examples/accelerate_fsdp.py
    (on all GPUs: launch/accelerate.sh fsdp2)

Lion is made from the plain model and prepared together with it: Accelerate puts the sharded parameters into its groups.
The last line on stdout is `last_loss=<nats per byte, mean of the ranks>`.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from data import load_corpus, training_batch
from lion_dist import Lion, decay_groups
from model import GPT, GPTConfig


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a file or folder; if absent, the Python standard library's sources")
    parser.add_argument("--out", type=Path, default=Path("runs/accelerate"), help="folder of Accelerate's checkpoint")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=8, help="windows per rank")
    parser.add_argument("--seq-len", type=int, default=128, help="bytes per window")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    return parser.parse_args(argv)


def prepare(accelerator: Accelerator, options: argparse.Namespace) -> tuple[nn.Module, AcceleratedOptimizer]:
    torch.manual_seed(0)  # the same model on every rank
    plain = GPT(GPTConfig(options.layers, options.width, heads=4, seq_len=options.seq_len))
    lion = Lion(decay_groups(plain, weight_decay=0.5), lr=options.lr, betas=(0.95, 0.98))
    model, optimizer = accelerator.prepare(plain, lion)
    return model, optimizer


def train(options: argparse.Namespace) -> tuple[Accelerator, nn.Module, AcceleratedOptimizer]:
    accelerator = Accelerator()
    model, optimizer = prepare(accelerator, options)
    text = load_corpus(options.data, options.seq_len).train
    for step in range(options.steps):
        place = {"seed": 0, "step": step, "micro_step": 0, "rank": accelerator.process_index}
        windows = training_batch(text, options.batch_size, options.seq_len, **place).to(accelerator.device).long()
        logits = model(windows[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    accelerator.save_state(str(options.out))  # load_state() reads it on any number of ranks
    accelerator.print(f"last_loss={accelerator.reduce(loss.detach(), 'mean').item():.4f}")
    return accelerator, model, optimizer


if __name__ == "__main__":
    train(parse())[0].end_training()
