"""Lion's hyper-parameters for those who come from AdamW: advice as numbers, of arXiv 2302.06675."""

from __future__ import annotations

import math
from typing import Any

from .hyper_values import to_float, to_lr, to_weight_decay

# How many times smaller than AdamW's the lr should be, and larger the weight decay: from, to.
FACTORS = (3, 10)
RANGE = f"{FACTORS[0]} to {FACTORS[1]} times"  # in messages
BETAS = (0.9, 0.99)


def from_adamw(lr: float, weight_decay: float, *, factor: float = FACTORS[1]) -> dict[str, Any]:
    """Converts the hyper-parameters of AdamW to keyword arguments for `Lion` and `ShardedLion`.

    Every update of Lion has the size of lr, so that its lr must be smaller than AdamW's. Weight decay is multiplied by
    lr in both, and grows by the same factor, so that the product stays what it was. The paper finds factors of 3 to 10;
    10 is that of the pairs that it lists. Divide the lr of every group and of the whole schedule (start, peak and end)
    by the same factor. Example::

        optimizer = Lion(model.parameters(), **lion_dist.from_adamw(lr=1e-3, weight_decay=0.1))

    Args:
        lr: AdamW's peak learning rate, finite and >= 0; a number of any kind.
        weight_decay: AdamW's weight decay, finite and >= 0.
        factor: how many times smaller the lr becomes, and larger the weight decay; finite and > 0.

    Returns:
        ``lr`` and ``weight_decay``, floats, and ``betas``, those of the paper. AdamW's betas mean something else. For
        language models, or if training is unstable, set ``betas`` to (0.95, 0.98).

    Raises:
        TypeError: an argument is not a number.
        ValueError: an argument is out of range.
    """
    times = to_float(factor, "factor")
    if not (math.isfinite(times) and times > 0):
        raise ValueError(f"factor must be finite and > 0, got {times}: the paper advises {FACTORS[0]} to {FACTORS[1]}")
    decay = to_weight_decay(to_weight_decay(weight_decay) * times)
    own = float(to_lr(lr)) / times
    if math.isinf(own):
        raise ValueError(f"factor {times} is too small for lr {lr}: lr / factor is infinite")
    return {"lr": own, "betas": BETAS, "weight_decay": decay}
