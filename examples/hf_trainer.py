"""Trains a tiny Llama on bytes with Hugging Face's Trainer, DeepSpeed and lion_dist's Lion. It downloads nothing.

    torchrun --nproc_per_node 2 examples/hf_trainer.py launch/deepspeed/zero3.json
    torchrun --nproc_per_node 2 examples/hf_trainer.py launch/deepspeed/zero2.json --device cpu --steps 20

lion_dist needs `lion_dist.deepspeed.register()` before the Trainer is made, and `"type": "Lion"` in the config. The
Trainer replaces "auto" by its own arguments, and refuses numbers that differ from them: give it Lion's betas as
adam_beta1 and adam_beta2, whose defaults are Adam's. The last line on stdout is

    optimizer=<class> first_loss=<nats per byte> last_loss=<nats per byte>
"""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lion_dist
from data import load_corpus


class Windows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Neighbouring windows of a corpus, int64 (seq_len,). Inputs and labels are the same: the model shifts them."""

    def __init__(self, data: Tensor, seq_len: int) -> None:
        self.data, self.seq_len = data, seq_len

    def __len__(self) -> int:
        return len(self.data) // self.seq_len

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        window = self.data[i * self.seq_len : (i + 1) * self.seq_len].long()
        return {"input_ids": window, "labels": window}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("config", type=Path, help="a DeepSpeed config with an optimizer of type Lion")
    parser.add_argument("--data", type=Path, help="a file or folder; if absent, the Python standard library's sources")
    parser.add_argument("--out", type=Path, default=Path("runs/hf_trainer"), help="the Trainer's output_dir")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=8, help="windows per rank and step")
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--width", type=int, default=128)
    return parser.parse_args(argv)


def deepspeed_config(path: Path) -> dict[str, Any]:
    """Reads the file, and leaves the batch sizes to the Trainer."""
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    return {**json.loads(path.read_text()), **dict.fromkeys(sizes, "auto")}


def train(options: argparse.Namespace) -> str:
    """The job; the line that sums it up."""
    on_cpu = options.device == "cpu"
    if on_cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"  # read when DeepSpeed is imported
    import deepspeed
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    if on_cpu:
        # It would be compiled first, for half a minute, and makes collectives on one machine faster.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    lion_dist.deepspeed.register()

    config = deepspeed_config(options.config)
    params = config["optimizer"]["params"]
    arguments = TrainingArguments(
        output_dir=str(options.out),
        deepspeed=config,
        bf16=config.get("bf16", {}).get("enabled", False),
        use_cpu=on_cpu,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=params["lr"],
        adam_beta1=params["betas"][0],
        adam_beta2=params["betas"][1],
        weight_decay=params["weight_decay"],
        max_grad_norm=config["gradient_clipping"],
        logging_steps=max(1, options.steps // 20),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )
    # The arguments come first: at stage 3 the model is then sharded while it is made.
    sizes = {"hidden_size": options.width, "intermediate_size": 3 * options.width, "num_hidden_layers": 2}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=256, num_attention_heads=2, max_position_embeddings=options.seq_len, **sizes)
    )
    corpus = load_corpus(options.data, options.seq_len)
    trainer = Trainer(model=model, args=arguments, train_dataset=Windows(corpus.train, options.seq_len))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    optimizer = type(trainer.model_wrapped.basic_optimizer).__name__
    return f"optimizer={optimizer} first_loss={losses[0]:.4f} last_loss={losses[-1]:.4f}"


def main(argv: Sequence[str] | None = None) -> None:
    summary = train(parse(argv))
    if os.environ.get("RANK", "0") == "0":
        print(summary, flush=True)
    if torch.distributed.is_initialized():  # at the interpreter's end its destructor may abort the process
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
