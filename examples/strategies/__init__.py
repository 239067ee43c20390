"""Ways to spread one training job over ranks, one short file each.

A *strategy* owns what differs between them: what the forward goes through, which optimizer steps, how gradients are
clipped, and how the optimizer's state becomes one dict that every other strategy can load. `Single` says what the
training loop calls; to add one, write its file and name it here.
"""

from strategies.ddp import DDP
from strategies.deepspeed import DeepSpeed
from strategies.single import Single
from strategies.zero1 import Zero1
from strategies.zero2 import Zero2

STRATEGIES: dict[str, type[Single]] = {
    "single": Single,
    "ddp": DDP,
    "zero1": Zero1,
    "zero2": Zero2,
    "deepspeed": DeepSpeed,
}
