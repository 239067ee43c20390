"""Converts checkpoints of other optimizers to Lion's, and Lion's to lion-pytorch's and to safetensors files.

lion-pytorch's own state_dict needs no conversion: `Lion.load_state_dict` and `ShardedLion.load_state_dict` take it as
it is. They also take whatever the functions here return, and round a momentum to 8 bits where its group has
``momentum_dtype=torch.int8``. Hyper-parameters are those that were saved only where the other optimizer is a Lion.
Files are read with ``weights_only=True``. (Checkpoints in torch.distributed.checkpoint's own format are pickled: if you
trust them, load them with torch's functions, as the documentation shows.)
"""

from .adamw import from_adamw
from .bitsandbytes import from_bitsandbytes
from .deepspeed import from_deepspeed_universal
from .flashoptim import from_flashoptim
from .lion_pytorch import to_lion_pytorch
from .llm_foundry import from_decoupled_lionw
from .safetensors import to_safetensors

__all__ = [
    "from_adamw",
    "from_bitsandbytes",
    "from_decoupled_lionw",
    "from_deepspeed_universal",
    "from_flashoptim",
    "to_lion_pytorch",
    "to_safetensors",
]
