"""Ways to distribute one training job over ranks, one short file each.

A *strategy* holds what differs between them: what wraps the model, which optimizer steps and how gradients are clipped.
`Single` defines what the training loop calls. To add a strategy, write its file and name it here.
"""

from strategies.ddp import DDP
from strategies.deepspeed import DeepSpeed
from strategies.fsdp1 import FSDP1
from strategies.fsdp2 import FSDP2
from strategies.hsdp import HSDP
from strategies.hybrid import Hybrid
from strategies.single import Single
from strategies.zero1 import Zero1
from strategies.zero2 import Zero2

STRATEGIES: dict[str, type[Single]] = {
    "single": Single,
    "ddp": DDP,
    "zero1": Zero1,
    "zero2": Zero2,
    "fsdp1": FSDP1,
    "fsdp2": FSDP2,
    "hsdp": HSDP,
    "hybrid": Hybrid,
    "deepspeed": DeepSpeed,
}
