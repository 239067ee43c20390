"""Runs the Python code of a page as it is written, with the names that the page takes for granted.

The snippets of a page run in order, in one process of each rank. A snippet may leave out what everybody has (`torch`,
and the three names that lion_dist is about) and what an earlier one of its page has imported. All other names that it
does not make itself are attributes of `Names`: they are made anew for each snippet, since what a page writes first is
an alternative to what it writes next as often as its beginning.

The ranks have no GPU. There "cuda" means the CPU, and the process group that a snippet would make is there already.
"""

from __future__ import annotations

import contextlib
import math
import os
import traceback
from collections.abc import Iterator
from functools import cached_property, partialmethod
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

import lion_dist
from lion_dist import Lion, ShardedLion
from tests.documents import ROOT, Fence, Page, imports_of, names_read

WIDTH = 8
EVERYBODY = {"torch": torch, "lion_dist": lion_dist, "Lion": Lion, "ShardedLion": ShardedLion}


class Model(nn.Module):
    """`model(batch)` is a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, batch: Tensor) -> Tensor:
        for block in self.blocks:
            batch = torch.tanh(block(batch.to(next(block.parameters()).dtype)))
        return batch.square().mean()


class Names:
    """The names that snippets take for granted, each made when it is first asked for."""

    Model = Model
    nodes, gpus_per_node = 2, 1
    replicas, tp = 2, 1
    steps, step = 2, 0
    rank = property(lambda self: dist.get_rank())

    def __init__(self, device: str = "cpu") -> None:
        self.device = device

    @cached_property
    def model(self) -> Any:
        return Model().to(self.device)

    @cached_property
    def optimizer(self) -> ShardedLion:
        return ShardedLion(self.model.named_parameters(), lr=1e-4)

    @cached_property
    def lr(self) -> Tensor:
        return torch.tensor(1e-4, device=self.device)

    @cached_property
    def scheduler(self) -> torch.optim.lr_scheduler.LRScheduler:
        on_one_gpu = self.device == "cuda"
        optimizer = Lion(self.model.parameters(), lr=self.lr) if on_one_gpu else self.optimizer
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)

    def next_batch(self) -> Tensor:
        return torch.randn(4, WIDTH, device=self.device)

    batch = first_half = second_half = property(next_batch)
    batches = micro_batches = property(lambda self: [self.next_batch(), self.next_batch()])

    @cached_property
    def loader(self) -> torch.utils.data.DataLoader:
        samples: Any = torch.randn(24, WIDTH)
        return torch.utils.data.DataLoader(samples, batch_size=4)

    @cached_property
    def language_model(self) -> Any:
        """A Llama of Hugging Face's, with 256 tokens."""
        from transformers import LlamaConfig, LlamaForCausalLM

        sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32}
        sizes |= {"num_hidden_layers": 1, "num_attention_heads": 2}
        return LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=WIDTH, **sizes))

    @cached_property
    def base(self) -> str:
        """The folder of a language model that is trained already."""
        self.language_model.save_pretrained("base")
        return "base"

    @property
    def tokens(self) -> list[dict[str, Tensor]]:
        """Data for it, as the Trainer takes them."""
        windows = torch.randint(256, (24, WIDTH))
        return [{"input_ids": window, "labels": window} for window in windows]

    def loss(self, batch: Tensor) -> Tensor:
        return self.model(batch)

    def loss_of(self, output: Tensor) -> Tensor:
        return output

    def log(self, what: dict[str, Any]) -> None:
        """Takes norms of gradients as tensors, and statistics as numbers."""
        assert what
        assert all(n > 0 if isinstance(n, Tensor) else math.isfinite(n) for n in what.values())

    def generate(self, model: nn.Module) -> None:
        with torch.no_grad():
            model(self.batch)

    @cached_property
    def mesh(self) -> device_mesh.DeviceMesh:
        return device_mesh.init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))

    @cached_property
    def plan(self) -> dict[str, Any]:
        return {"blocks.0": ColwiseParallel(), "blocks.1": RowwiseParallel()}

    @cached_property
    def dense_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.model.named_parameters() if "blocks.0" in name]

    @cached_property
    def expert_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.model.named_parameters() if "blocks.1" in name]

    @cached_property
    def all_ranks(self) -> dist.ProcessGroup:
        return dist.new_group()

    @cached_property
    def ranks_with_the_same_experts(self) -> dist.ProcessGroup:
        return dist.new_group()

    @cached_property
    def path(self) -> str:
        """A checkpoint that torch.distributed.checkpoint has saved with its own storage."""
        from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

        model = Model()
        optimizer = ShardedLion(model.named_parameters(), lr=1e-4)
        state = {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, optimizer)}
        torch.distributed.checkpoint.save(state, checkpoint_id="saved-by-torch")
        return "saved-by-torch"


def flash_file(names: Names, page: Page, path: Path) -> None:
    """FlashLion's state_dict of the model in bfloat16."""
    from tests.scenarios.flash import flash, in_8_bits

    torch.save(flash(names.model, in_8_bits, 24), path)


def json_file(names: Names, page: Page, path: Path) -> None:
    """The JSON of the page."""
    (config,) = page.fences("json")
    path.write_text(config.code)


# Files that snippets read.
FILES = {"flash.pt": flash_file, "zero2.json": json_file}


@contextlib.contextmanager
def without_gpus() -> Iterator[None]:
    """What code for GPUs says, done on the CPU."""

    def on_cpu(device: str, *args: Any, **kwargs: Any) -> Any:
        return make_mesh("cpu", *args, **kwargs)

    make_mesh, wrap = device_mesh.init_device_mesh, FullyShardedDataParallel.__init__
    with contextlib.ExitStack() as stack:
        for target, name, put in (
            (device_mesh, "init_device_mesh", on_cpu),
            (torch.cuda, "set_device", lambda device: None),
            (nn.Module, "cuda", lambda module: module),
            (dist, "init_process_group", lambda backend: None),
            (FullyShardedDataParallel, "__init__", partialmethod(wrap, device_id=torch.device("cpu"))),
        ):
            stack.enter_context(mock.patch.object(target, name, put))
        yield


def run_page(page: Page, fences: list[Fence], folder: Path, device: str = "cpu") -> dict[str, Any]:
    """Runs snippets of one page in a folder, which becomes the current one, and returns the names of the last.

    Raises:
        AssertionError: a snippet raised. The lines of its traceback are those of the page.
    """
    os.chdir(folder)
    imported: dict[str, Any] = {}
    space: dict[str, Any] = {}
    for fence in fences:
        torch.manual_seed(0)  # the same on every rank
        names = Names(device)
        for file, make in FILES.items():
            if f'"{file}"' in fence.code:
                own = Path(f"{file}.{os.getpid()}")  # every rank makes it, while another may read it: so it comes whole
                make(names, page, own)
                own.replace(file)
        given = {name: getattr(names, name) for name in sorted(names_read(fence.code)) if hasattr(Names, name)}
        space = {**EVERYBODY, **imported, **given, "__name__": "__main__"}
        try:
            exec(compile("\n" * (fence.line - 1) + fence.code, ROOT / page.name, "exec"), space)
        except Exception:
            raise AssertionError(f"{page.name}:{fence.line}: this snippet raised\n{traceback.format_exc()}") from None
        imported |= {name: space[name] for name in imports_of(fence.code)}
    return space
