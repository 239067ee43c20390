"""What an error says where the ranks did not make the same step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from .clipping import Clipping
from .update.reference import HyperParameters


def mismatch(hypers: Sequence[HyperParameters], clipping: Clipping | None) -> Callable[[], str]:
    """Describes this rank's step, for an error that may be raised some steps later.

    Args:
        hypers: one a parameter group. Tensors among them are copied, because schedulers fill them in place.
        clipping: the clipping of this step, if any.

    Returns:
        Makes the message, to follow the numbers of the ranks; the host waits for the tensors in it.
    """
    kept = [h._replace(lr=h.lr.clone()) if isinstance(h.lr, Tensor) else h for h in hypers]

    def message() -> str:
        here = "; ".join(f"group {i}: {hyper._asdict()}" for i, hyper in enumerate(kept))
        clipped = "gradients were not clipped"
        if clipping is not None:
            clipped = f"gradients were clipped to max_norm {clipping.max_norm}, by a factor of {clipping.scale.item()}"
        return (
            "made a step that is not that of its first rank, so that no parameter was changed by it, though momenta "
            f"may have been. On this rank it was {here}; {clipped}. Hyper-parameters, the max_norm of "
            "clip_grad_norm_(), and in stage 1 which gradients are None, must be the same on every rank, and no rank "
            "may make a backward pass between clip_grad_norm_() and step()"
        )

    return message
