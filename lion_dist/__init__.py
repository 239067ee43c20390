"""Lion for distributed PyTorch: a fused step, and momentum sharded over the ranks."""

from . import deepspeed
from .lion import Lion
from .sharded_lion import ShardedLion

__version__ = "0.1.0"
__all__ = ["Lion", "ShardedLion", "__version__", "deepspeed"]
