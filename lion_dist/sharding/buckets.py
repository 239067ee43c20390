"""Which parameters are reduced together, and in which order: integers only, no torch.

Bucket: parameters whose gradients travel in one group of collectives, as soon as all of them have arrived. A bucket
    owns no memory, so new buckets cost nothing.
Order: a list of all parameters, roughly as their gradients arrive in a backward. All ranks use the same order, since
    ranks match collectives by the order of their calls.
"""

from __future__ import annotations

from collections.abc import Sequence


def complete_order(seen: Sequence[int], count: int) -> list[int]:
    """The parameters 0 to count - 1: first those ``seen`` to arrive, in that order, then the others from the last to
    the first. A backward is likely to reach them so."""
    first = list(dict.fromkeys(seen))
    known = set(first)
    return first + [i for i in reversed(range(count)) if i not in known]


def make_buckets(sizes: Sequence[int], order: Sequence[int], limit: int) -> tuple[tuple[int, ...], ...]:
    """Cuts an order into buckets.

    Args:
        sizes: bytes of each parameter's gradient.
        order: every parameter index once.
        limit: maximum bytes of a bucket. A parameter that is larger gets a bucket of its own.

    Returns:
        At least one bucket, which is empty if there are no parameters.

    Raises:
        ValueError: the limit is below 1, or the order does not name every parameter once.
    """
    if limit < 1 or sorted(order) != list(range(len(sizes))):
        raise ValueError(
            f"got limit {limit} and order {list(order)}, expected limit >= 1 and an order that names each of "
            f"{len(sizes)} parameters once"
        )
    buckets: list[list[int]] = [[]]
    filled = 0
    for param in order:
        if buckets[-1] and filled + sizes[param] > limit:
            buckets.append([])
            filled = 0
        buckets[-1].append(param)
        filled += sizes[param]
    return tuple(tuple(bucket) for bucket in buckets)
