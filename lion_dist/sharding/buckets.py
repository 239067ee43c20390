"""Which parameters are reduced together, and in which order: integers only, no torch.

Bucket: parameters whose gradients travel in one group of collectives, as soon as all of them are ready. A
    bucket owns no memory, so buckets can be made anew at no cost.
Order: of readiness in a backward, near enough. All ranks must use one order, because collectives match by
    the order of their calls: it is the first rank's.
"""

from __future__ import annotations

from collections.abc import Sequence


def complete_order(seen: Sequence[int], count: int) -> list[int]:
    """The parameters 0 to count - 1: first those ``seen`` to become ready, in that order, then the others,
    last first, which is the likely order of a backward as long as nothing has been seen."""
    first = list(dict.fromkeys(seen))
    known = set(first)
    return first + [i for i in reversed(range(count)) if i not in known]


def make_buckets(sizes: Sequence[int], order: Sequence[int], limit: int) -> tuple[tuple[int, ...], ...]:
    """Cuts the order into buckets.

    Args:
        sizes: of each parameter's gradient, in bytes.
        order: every parameter number once.
        limit: bytes of a bucket; a parameter that is larger has a bucket of its own.

    Returns:
        At least one bucket, empty if there are no parameters.
    """
    if limit < 1 or sorted(order) != list(range(len(sizes))):
        raise ValueError(f"expected limit >= 1 and an order of {len(sizes)} parameters, got {limit} and {list(order)}")
    buckets: list[list[int]] = [[]]
    filled = 0
    for param in order:
        if buckets[-1] and filled + sizes[param] > limit:
            buckets.append([])
            filled = 0
        buckets[-1].append(param)
        filled += sizes[param]
    return tuple(tuple(bucket) for bucket in buckets)
