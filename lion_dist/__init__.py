"""Lion for distributed PyTorch: a fused step, and momentum sharded over the ranks."""

from typing import Any

from . import deepspeed
from .adamw import from_adamw
from .decay import decay_groups
from .grad_norm import clip_grad_norm_
from .lion import Lion
from .sharded_lion import ShardedLion

__version__ = "0.1.0"
__all__ = [
    "Lion",
    "ShardedLion",
    "__version__",
    "checkpoint",
    "clip_grad_norm_",
    "decay_groups",
    "deepspeed",
    "from_adamw",
]


def __getattr__(name: str) -> Any:
    """lion_dist.checkpoint, when it is first used: torch.distributed.checkpoint takes a second to import."""
    if name == "checkpoint":
        from importlib import import_module

        return import_module(".checkpoint", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
