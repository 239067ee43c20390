"""One logical checkpoint: saved under any strategy, loaded under any other.

    lion_dist.checkpoint.save("runs/step-100", model, optimizer, schedulers=scheduler, extra={"step": 100})
    extra = lion_dist.checkpoint.load(lion_dist.checkpoint.latest("runs"), model, optimizer, schedulers=scheduler)

State is held by name and in the parameters' own shapes: `Lion` on one device, under DDP, FSDP1 or FSDP2 and
`ShardedLion` on any number of ranks read what any of them wrote. No file is ever unpickled. What is behind it, in the
order in which it is used:

    named.py      model and optimizer as tensors by name
    outgoing.py   what a rank saves of them, and
    union.py      what the ranks have together
    incoming.py   what a rank loads, and
    undo.py       what is put back if that fails
    saving.py     plan, stage, write
    manifest.py   what a checkpoint says it holds
    writer.py     Writer, and
    reader.py     Reader, for torch's own doors too
    blocks.py     bytes
    folders.py    the rename, the last K, the sweep

``python -m lion_dist.checkpoint PATH`` lists and verifies a checkpoint.
"""

from . import convert
from .api import async_save, load, read_extra, save
from .folders import checkpoints, latest
from .reader import Reader
from .saving import PendingSave
from .writer import Writer

__all__ = [
    "PendingSave",
    "Reader",
    "Writer",
    "async_save",
    "checkpoints",
    "convert",
    "latest",
    "load",
    "read_extra",
    "save",
]
