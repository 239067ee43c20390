"""The error for ranks that did not make the same step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from .clipping import Clipping
from .update.reference import HyperParameters

_MUST = (
    "Hyper-parameters, the max_norm of clip_grad_norm_(), and in stage 1 which gradients are None, must be the same on "
    "every rank, and no rank may make a backward pass between clip_grad_norm_() and step()"
)


def mismatch(hypers: Sequence[HyperParameters], clipping: Clipping | None) -> Callable[[], str]:
    """Describes this rank's step, for an error that may be raised some steps later.

    Args:
        hypers: one for each parameter group. Tensors among them are copied, because schedulers fill them in place.
        clipping: the clipping of this step, if any.

    Returns:
        A function that makes the message, to follow the numbers of the ranks that differ. It makes the host wait for
        the tensors in the message.
    """
    kept = [h._replace(lr=h.lr.clone()) if isinstance(h.lr, Tensor) else h for h in hypers]

    def message() -> str:
        here = "; ".join(f"group {i}: {hyper._asdict()}" for i, hyper in enumerate(kept))
        clipped = "gradients were not clipped"
        if clipping is not None:
            clipped = f"gradients were clipped to max_norm {clipping.max_norm}, by a factor of {clipping.scale.item()}"
        return (
            "made a step that differs from that of the group's first rank. No parameter was updated; momenta may have "
            f"been. The step of this rank: {here}; {clipped}. {_MUST}"
        )

    return message


def refusal() -> str:
    """The message of a rank that could not make the step, to follow the numbers of the ranks that differ."""
    return (
        "made a step that differs from that of the group's first rank. No parameter was updated; momenta of other "
        f"ranks may have been. This rank could not make the step. {_MUST}"
    )
