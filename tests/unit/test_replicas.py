"""Checksums that tell whether replicas are alike, and the comparison of what the ranks sent one another."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from torch import Tensor

from lion_dist.sharding import replicas
from lion_dist.sharding.replicas import DeferredCheck, bits_checksum
from tests.asserts import bits

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CHUNK = 8


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "_CHUNK", CHUNK)


def of(t: Tensor) -> int:
    value = bits_checksum(t)
    assert value.dtype == torch.int64
    assert value.shape == ()
    return int(value)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64, torch.uint8, torch.bool], ids=str)
@pytest.mark.parametrize("n", [1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 3 * CHUNK + 5])
def test_every_flipped_bit_shows(dtype: torch.dtype, n: int) -> None:
    """No two of several parameters have the same checksum."""
    t = torch.randn(n).to(dtype)
    integer = bits(t).dtype
    width = 1 if dtype == torch.bool else torch.iinfo(integer).bits
    before, seen = of(t), set()
    for i in range(n):
        for bit in range(width):
            flipped = t.clone()
            flipped.view(integer)[i] ^= torch.tensor(1).bitwise_left_shift(bit).to(integer)
            seen.add(of(flipped))
    assert before not in seen
    assert dtype not in DTYPES or len(seen) == n * width
    assert of(t.clone()) == before


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_swap_shows(dtype: torch.dtype) -> None:
    """Elements are swapped within a chunk and between two, at the same place in them or not."""
    t = torch.randn(3 * CHUNK + 3).to(dtype)
    assert len(t.unique()) == len(t)
    before = of(t)
    for i, j in itertools.combinations(range(len(t)), 2):
        swapped = t.clone()
        swapped[i], swapped[j] = t[j], t[i]
        assert of(swapped) != before, f"elements {i} and {j}"
    for a, b in itertools.combinations(range(3), 2):
        chunks = list(t.split(CHUNK))
        chunks[a], chunks[b] = chunks[b], chunks[a]
        assert of(torch.cat(chunks)) != before, f"chunks {a} and {b}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_values_hide(dtype: torch.dtype) -> None:
    """Equal values of other bits: zeros of two signs, NaNs of two forms; a value moved by one place; zeros more."""
    t = torch.zeros(300, dtype=dtype)
    moved = [t.clone() for _ in range(3)]
    for i, x in enumerate(moved):
        x[100 * i] = 1.0
    negative, nan, other_nan = (t.clone() for _ in range(3))
    negative[7] = -0.0
    nan[7] = torch.nan
    other_nan[7] = torch.nan
    other_nan.view(bits(t).dtype)[7] += 1
    assert len({of(x) for x in (t, *moved, negative, nan, other_nan)}) == 7
    assert of(-t) != of(t)


def test_whole_chunks_of_the_real_size() -> None:
    """A bit in the last element of a chunk, in the first of the next, and both: past one chunk of 2^22."""
    t = torch.zeros(replicas._CHUNK + 1, dtype=torch.bfloat16)
    seen = {of(t)}
    for where in ([-1], [-2], [-1, -2], [0], [0, -1]):
        changed = t.clone()
        changed[where] = 1.0
        seen.add(of(changed))
    assert len(seen) == 6


@pytest.mark.parametrize("shape", [(0,), (0, 3), (), (1, 1)])
def test_small_shapes(shape: tuple[int, ...]) -> None:
    t = torch.ones(shape)
    assert (of(t) != 0) == (t.numel() > 0)


def test_memory_order_is_what_counts() -> None:
    """The indices do not count, as replicas have the same strides; nor does what lies beside a view."""
    t = torch.randn(6, 4, 5, 3)
    last = t.contiguous(memory_format=torch.channels_last)
    assert of(last) == of(last.permute(0, 2, 3, 1).flatten())
    assert of(last) != of(t)
    buffer = torch.randn(100)
    view = buffer[3:77]
    before = of(view)
    buffer[:3] = buffer[77:] = 0.0
    assert of(view) == before == of(view.clone())


# -- DeferredCheck


def test_equal_numbers_agree() -> None:
    comparison = DeferredCheck()
    for numbers in ([7], [7, 7, 7], [-(1 << 63)] * 2):
        agree = comparison.compare(torch.tensor(numbers), lambda: pytest.fail("asked for nothing"))
        assert agree.shape == ()
        assert agree.dtype == torch.bool
        assert agree.item() is True
        comparison.check(all=True)  # nothing is left to tell


@pytest.mark.parametrize(
    ("numbers", "named"),
    [
        ([1, 2], "ranks [1] "),
        ([2, 1, 1], "ranks [1, 2] "),
        ([1, 1, 2], "ranks [2] "),
        ([0, 1 << 62, 0, -1], "ranks [1, 3] "),
        ([1 << 62, 1 << 62 | 1], "ranks [1] "),  # alike in float64
    ],
)
def test_ranks_with_other_numbers_are_named(numbers: list[int], named: str) -> None:
    """The error names those that are unlike the first, says what this rank did, and is raised once."""
    comparison = DeferredCheck()
    assert comparison.compare(torch.tensor(numbers), lambda: "step 5, lr=0.1").item() is False
    with pytest.raises(ValueError, match=r"step 5, lr=0\.1") as error:
        comparison.check()
    assert str(error.value).startswith(named)
    comparison.check(all=True)  # nothing is left to tell


def test_several_comparisons_before_a_check() -> None:
    """The first mismatch is raised; those that followed from it are dropped."""
    comparison = DeferredCheck()
    for number, numbers in enumerate([[1, 1], [1, 2], [3, 4], [5, 5]]):
        comparison.compare(torch.tensor(numbers), partial("step {}".format, number))
    with pytest.raises(ValueError, match="step 1"):
        comparison.check(all=True)  # nothing is left to tell
    comparison.compare(torch.tensor([1, 1]), lambda: "step 4")
    comparison.check()


def test_numbers_between_others() -> None:
    """The numbers are every other element of a buffer, as in the buffer of signs."""
    buffer = torch.tensor([[5, 1], [5, 2], [6, 3]])
    comparison = DeferredCheck()
    assert not comparison.compare(buffer[:, 0], str)
    with pytest.raises(ValueError, match=r"ranks \[2\]"):
        comparison.check()


class Late:
    """An event of a GPU that nobody has waited for."""

    def __init__(self) -> None:
        self.waited = False

    def synchronize(self) -> None:
        self.waited = True


def late(comparison: DeferredCheck, numbers: list[int], message: str) -> Late:
    """Compares numbers as if they were on a GPU."""
    comparison.compare(torch.tensor(numbers), lambda: message)
    _, kept, say = comparison._pending.pop()
    event = Late()
    comparison._pending.append((event, kept, say))  # type: ignore[arg-type]
    return event


def test_numbers_on_a_gpu_are_judged_two_calls_later() -> None:
    comparison = DeferredCheck()
    first = late(comparison, [1, 2], "step 0")
    comparison.check()
    late(comparison, [1, 1], "step 1")
    comparison.check()
    assert not first.waited
    late(comparison, [1, 1], "step 2")
    with pytest.raises(ValueError, match="step 0"):
        comparison.check()
    assert first.waited


def test_all_numbers_are_judged_where_asked() -> None:
    comparison = DeferredCheck()
    events = [late(comparison, numbers, f"step {i}") for i, numbers in enumerate(([1, 1], [1, 2]))]
    with pytest.raises(ValueError, match="step 1"):
        comparison.check(all=True)
    assert all(event.waited for event in events)
    comparison.check(all=True)  # nothing is left to tell
