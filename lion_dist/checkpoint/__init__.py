"""One logical checkpoint: saved under any strategy, loaded under any other.

    lion_dist.checkpoint.save("runs/step-100", model, optimizer, schedulers=scheduler, extra={"step": 100})
    extra = lion_dist.checkpoint.load(lion_dist.checkpoint.latest("runs"), model, optimizer, schedulers=scheduler)

State is stored by name and in the parameters' own shapes. `Lion` on one device, under DDP, FSDP1 or FSDP2 and
`ShardedLion` on any number of ranks read what any of them wrote. No file is ever unpickled.

``python -m lion_dist.checkpoint PATH`` lists and verifies a checkpoint.

The files of this package, in the order in which a save and a load use them:

    api.py              save, async_save, load, read_extra
    names.py, keys.py   names of parameters, keys of a checkpoint
    logical.py          tensors in the shapes of whole parameters
    model_state.py, optimizer_state.py, groups.py, schedulers.py, generators.py     what is saved, by key
    codes.py, computed.py       8-bit momenta where they lie; tensors that are computed as they are written
    outgoing.py         what this rank saves
    union.py            what the ranks hold together
    saving.py           plan, stage, write
    contents.py         what a checkpoint holds, by key
    incoming.py, incoming_state.py      what this rank loads
    incoming_columns.py, conversions.py     from which form of weights and momenta, and how that is converted
    loading.py          compare, plan, read, apply
    undo.py             what is put back if a load fails
    writer.py, reader.py    torch.distributed.checkpoint's interfaces to
    manifest.py, json_values.py, blocks.py, files.py    the manifest, values, tensors as bytes, and files
    folders.py, unfinished.py, locks.py     checkpoints as folders: finding, committing and sweeping them
    runs.py, retention.py                   which checkpoints belong to one training, and keep_last
    convert/            from and to other optimizers' checkpoints, and safetensors files
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
