"""The fused step on a GPU against the rule in plain torch, on the GPU and on the CPU: the same bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lion_dist import Lion
from lion_dist.update import reference
from lion_dist.update.lion_update import LionUpdate
from lion_dist.update.reference import NAN_BITS, STORAGE_DTYPES, HyperParameters
from lion_dist.update.segments import TILE, Segment, StepTensors
from lion_dist.update.state import EXP_AVG
from tests.asserts import assert_canonical_nan, assert_same_bits, bits
from tests.scenarios.mixes import MIXES, name, squares_by, step_by

from .common import BF16, F16, F32, GPU, LENGTHS, SHIFTS, Guarded, Twins, awkward, needs_gpu, reference_step

pytestmark = needs_gpu


Dtypes = tuple[torch.dtype, torch.dtype, torch.dtype]


class Trial:
    """StepTensors on the GPU between guards, and two copies for the reference: one on the GPU, one on the CPU.

    Args:
        mix: dtypes of parameters, gradients and momenta.
        odd: whether some gradients are at odd addresses; one is enough for another kernel to step all of them.
    """

    def __init__(self, mix: Dtypes, odd: bool) -> None:
        self.generator = torch.Generator().manual_seed(1)
        self.mix, self.odd = mix, odd
        # Every length meets the aligned path, and one of the unaligned ones.
        self.cases = [(n, s) for i, n in enumerate(LENGTHS) for s in (SHIFTS[0], SHIFTS[1 + i % (len(SHIFTS) - 1)])]
        self.groups = [i % 4 for i in range(len(self.cases))]
        self.params = [Guarded(awkward(n, mix[0], self.generator), s[0]) for n, s in self.cases]
        self.exp_avgs = [Guarded(awkward(n, mix[2], self.generator), s[2]) for n, s in self.cases]
        self.columns = StepTensors(
            [p.at for p in self.params], [], {EXP_AVG: [m.at for m in self.exp_avgs]}, self.groups
        )
        self.copies = [
            ([p.at.clone().to(device) for p in self.params], [m.at.clone().to(device) for m in self.exp_avgs])
            for device in (GPU, torch.device("cpu"))
        ]
        self.update = LionUpdate(None)

    def step(self, hypers: list[HyperParameters], number: int, grad_scale: float | None) -> None:
        """Entry number+1 has no gradient this time."""
        drawn = [Guarded(awkward(n, self.mix[1], self.generator), s[1] if self.odd else 0) for n, s in self.cases]
        grads = [None if i == (number + 1) % len(drawn) else g.at for i, g in enumerate(drawn)]
        self.columns.grads = grads
        scale = None if grad_scale is None else torch.tensor(grad_scale, device=GPU)
        step_by(self.update, self.columns, hypers, scale)
        for params, exp_avgs in self.copies:
            of_device = [None if g is None else g.to(params[0].device) for g in grads]
            reference_step(params, of_device, exp_avgs, self.groups, hypers, grad_scale)
        for g in drawn:
            g.assert_guards_hold()

    def check(self, when: str) -> None:
        for where, (params, exp_avgs) in zip(("GPU", "CPU"), self.copies, strict=True):
            for i, (p, m) in enumerate(zip(params, exp_avgs, strict=True)):
                what = f"{when}, entry {i} {self.cases[i]}, reference on the {where}"
                assert_same_bits(self.params[i].at.to(p.device), p, f"parameter, {what}")
                assert_same_bits(self.exp_avgs[i].at.to(m.device), m, f"momentum, {what}")
        for guarded in self.params + self.exp_avgs:
            guarded.assert_guards_hold()


def run(trial: Trial, steps: int, grad_scales: tuple[float | None, ...]) -> None:
    """Four groups: a plain one, one with an lr tensor that maximizes, one with lr = 0, and one with a
    float64 lr tensor and a decay as large as the step. Every lr but the zero changes at every step."""
    tensor32 = torch.tensor(0.0, device=GPU)
    tensor64 = torch.tensor([0.0], dtype=torch.float64, device=GPU)
    for number in range(steps):
        tensor32.fill_(0.03 / (1 + number))
        tensor64.fill_(0.07 / (2 + number))
        hypers = [
            HyperParameters(1e-3 * (1 + number), 0.1, 0.9, 0.99, False),
            HyperParameters(tensor32, 0.3, 0.95, 0.98, True),
            HyperParameters(0.0, 0.2, 0.9, 0.99, False),
            HyperParameters(tensor64, 10.0, 0.0, 0.5, False),
        ]
        trial.step(hypers, number, grad_scales[number % len(grad_scales)])
        if number in (0, steps - 1):
            trial.check(f"step {number}")


@pytest.mark.parametrize("odd", [True, False], ids=["odd gradients", "even gradients"])
@pytest.mark.parametrize("mix", MIXES, ids=name)
def test_every_mix_of_dtypes_gives_the_references_bits(mix: Dtypes, odd: bool) -> None:
    run(Trial(mix, odd), steps=20, grad_scales=(None,))


@pytest.mark.parametrize("odd", [True, False], ids=["odd gradients", "even gradients"])
@pytest.mark.parametrize(
    "mix", [(F32, F32, F32), (BF16, BF16, BF16), (F16, F16, F32), (F32, BF16, F32), (BF16, F32, F16)], ids=name
)
def test_a_grad_scale_gives_the_references_bits(mix: Dtypes, odd: bool) -> None:
    """A clipping coefficient, 1, and ones that bring the gradients to denormals, to infinity and to NaN (last:
    nothing is finite after it)."""
    trial = Trial(mix, odd)
    run(trial, steps=8, grad_scales=(0.37, 1.0, 1e-38, 1e38))
    run(trial, steps=1, grad_scales=(float("nan"),))


@pytest.mark.parametrize("dtype", STORAGE_DTYPES, ids=str)
@pytest.mark.parametrize("source", ["parameter", "gradient", "momentum"])
def test_nan_is_stored_in_one_form(dtype: torch.dtype, source: str) -> None:
    """Whatever form it came in, or from an infinity, and at whichever elements; beside them every weight moves."""
    integer, canonical = NAN_BITS[dtype]
    n, where = 2 * TILE + 77, slice(5, None, 97)
    sign = 1 << (torch.iinfo(integer).bits - 1)
    tensors = {key: torch.full((n,), 0.5, dtype=dtype) for key in ("parameter", "gradient", "momentum")}
    forms = torch.tensor([canonical, canonical | 1, canonical - sign, (canonical | 5) - sign], dtype=integer)
    if source != "parameter":  # whose infinity stays one
        infinities = torch.tensor([float("inf"), float("-inf")], dtype=dtype)
        forms = torch.cat([forms, infinities.view(integer)])
    target = tensors[source].view(integer)[where]
    target.copy_(forms.repeat(n)[: len(target)])
    p, g, m = (tensors[key].to(GPU) for key in ("parameter", "gradient", "momentum"))
    step_by(
        LionUpdate(None), StepTensors([p], [g], {EXP_AVG: [m]}, [0]), [HyperParameters(0.25, 0.0, 0.9, 0.99, False)]
    )
    expected = torch.zeros(n, dtype=torch.bool)
    expected[where] = True
    assert_canonical_nan(p.cpu(), expected, "parameter")
    assert_canonical_nan(m.cpu(), expected & (source != "parameter"), "momentum")
    assert (p.cpu()[~expected] == 0.25).all()


@pytest.mark.parametrize("dtype", STORAGE_DTYPES, ids=str)
def test_a_momentum_that_overflows_its_dtype(dtype: torch.dtype) -> None:
    """With beta2 = 0 it is the scaled gradient: the largest float32 that rounds to a number in its dtype, and the
    least that rounds to infinity, while c is finite."""
    least, n = torch.tensor(reference.OVERFLOW[dtype]), TILE + 77
    hyper = HyperParameters(0.25, 0.0, 0.5, 0.0, False)
    sign = torch.ones(n)
    sign[::3] = -1
    for scale, nan in ((least.nextafter(torch.tensor(0.0)), False), (least, True)):
        p, g, m = torch.full((n,), 0.5, device=GPU), sign.to(GPU), torch.zeros(n, dtype=dtype, device=GPU)
        step_by(LionUpdate(None), StepTensors([p], [g], {EXP_AVG: [m]}, [0]), [hyper], scale.to(GPU))
        assert_canonical_nan(p.cpu(), torch.full((n,), nan), "parameter")
        assert_canonical_nan(m.cpu(), torch.full((n,), nan), "momentum")
        if not nan:
            assert_same_bits(p.cpu(), 0.5 - 0.25 * sign, "parameter")
            assert_same_bits(m.cpu(), (sign * torch.finfo(dtype).max).to(dtype), "momentum")


@pytest.mark.parametrize("dtype", STORAGE_DTYPES, ids=str)
def test_lr_zero_writes_no_parameter(dtype: torch.dtype) -> None:
    """Not even a NaN in its own form; the momentum moves. As a number and as a tensor."""
    for lr in (0.0, torch.zeros((), device=GPU)):
        generator = torch.Generator().manual_seed(3)
        p, g, m = (awkward(TILE + 9, dtype, generator).to(GPU) for _ in range(3))
        before, momentum = p.clone(), m.clone()
        step_by(
            LionUpdate(None), StepTensors([p], [g], {EXP_AVG: [m]}, [0]), [HyperParameters(lr, 0.1, 0.9, 0.99, False)]
        )
        assert_same_bits(p, before, "parameter")
        assert (bits(m) != bits(momentum)).any()


def test_an_inactive_segment_is_not_touched() -> None:
    """Parameter and momentum hold NaNs of a form that no write of ours leaves."""
    poison = NAN_BITS[F32][1] | 0x123
    params = [torch.randn(TILE + 5, device=GPU) for _ in range(4)]
    exp_avgs = [torch.randn(TILE + 5, device=GPU) for _ in range(4)]
    for i in (1, 3):
        params[i].view(torch.int32).fill_(poison)
        exp_avgs[i].view(torch.int32).fill_(poison)
    columns = StepTensors(params, [torch.ones_like(p) for p in params], {EXP_AVG: exp_avgs}, [0] * 4)
    columns.grads[1] = columns.grads[3] = None
    update, hypers = LionUpdate(None), [HyperParameters(0.1, 0.1, 0.9, 0.99, False)]
    step_by(update, columns, hypers)
    step_by(update, columns, hypers)
    for i in (1, 3):
        assert (params[i].view(torch.int32) == poison).all()
        assert (exp_avgs[i].view(torch.int32) == poison).all()
    assert not any(params[i].isnan().any() for i in (0, 2))


def test_only_segments_are_written() -> None:
    """Slices of parameters that meet slices elsewhere, of flat buffers, as a shard's do."""
    generator = torch.Generator().manual_seed(4)
    p, q = (torch.randn(n, generator=generator).to(GPU) for n in (5 * TILE, 1000))
    grads = [torch.randn(n, generator=generator).to(GPU) for n in (5 * TILE, 700)]  # the second is a flat buffer
    m = torch.randn(5 * TILE, generator=generator).to(GPU)
    segments = [
        Segment(0, 0, 128, 7, 3),
        Segment(0, TILE - 1, 2 * TILE, 3 * TILE, TILE + 2),
        Segment(1, 999, 500, 5001, 1),
        Segment(1, 0, 600, 6000, 0),
    ]
    before = [t.clone() for t in (p, q, m)]
    expected = [t.clone() for t in (p, q, m)]
    hyper = HyperParameters(0.01, 0.1, 0.9, 0.99, False)
    for s in segments:
        runs = [
            t[start : start + s.length]
            for t, start in (
                (expected[s.entry], s.param_start),
                (grads[s.entry], s.grad_start),
                (expected[2], s.state_start),
            )
        ]
        reference_step(runs[:1], runs[1:2], runs[2:], [0], [hyper])
    step_by(LionUpdate(None), StepTensors([p, q], [*grads], {EXP_AVG: [m, m]}, [0, 0], segments), [hyper])
    for got, want, old, what in zip((p, q, m), expected, before, "pqm", strict=True):
        assert_same_bits(got, want, what)
        assert (bits(got) != bits(old)).sum() <= 3 + TILE + 2 + 1


@pytest.mark.parametrize("dtype", STORAGE_DTYPES, ids=str)
def test_memory_orders(dtype: torch.dtype) -> None:
    """Channels-last, transposed, and with gaps; gradients in another order than their parameters."""

    def shapes(device: torch.device) -> list[Tensor]:
        drawn = torch.Generator().manual_seed(5)
        conv = torch.randn(8, 6, 5, 3, generator=drawn).to(device, dtype).contiguous(memory_format=torch.channels_last)
        transposed = torch.randn(40, 70, generator=drawn).to(device, dtype).t()
        gaps = torch.randn(30, 50, generator=drawn).to(device, dtype)[:, ::3]
        scalar = torch.randn((), generator=drawn).to(device, dtype)
        empty = torch.empty(0, 3, device=device, dtype=dtype)
        return [t.detach().requires_grad_() for t in (conv, transposed, gaps, scalar, empty)]

    gpu, cpu = shapes(GPU), shapes(torch.device("cpu"))
    optimizers = [Lion(gpu, lr=0.01, weight_decay=0.5), Lion(cpu, lr=0.01, weight_decay=0.5, use_triton=False)]
    for number in range(4):
        for p, q in zip(gpu, cpu, strict=True):
            g = torch.randn(q.shape).to(dtype)
            q.grad = g if number % 2 else torch.empty_like(q).copy_(g)
            p.grad = g.to(GPU) if number % 2 else torch.empty_like(p).copy_(g)
        for optimizer in optimizers:
            optimizer.step()
    for i, (p, q) in enumerate(zip(gpu, cpu, strict=True)):
        assert_same_bits(p.detach().cpu(), q.detach(), f"parameter {i}")
        assert_same_bits(optimizers[0].state[p]["exp_avg"].cpu(), optimizers[1].state[q]["exp_avg"], f"momentum {i}")


@pytest.mark.parametrize("maximize", [False, True])
def test_lion_equals_its_twin_on_the_cpu(maximize: bool) -> None:
    twins = Twins(dtype=BF16, lr=0.03, maximize=maximize, momentum_dtype=F32, decoupled_weight_decay=True)
    for number in range(20):
        twins.gpu.param_groups[1]["lr"] = 0.02 / (1 + number)
        twins.new_gradients()
        twins.step()
    twins.assert_equal()


def test_triton_and_torch_agree_on_the_gpu() -> None:
    """use_triton=False is another path to the same bits."""
    results = []
    for use_triton in (True, False):
        drawn = torch.Generator().manual_seed(6)
        params = [torch.randn(n, generator=drawn).to(GPU).requires_grad_() for n in LENGTHS]
        optimizer = Lion(params, lr=0.01, weight_decay=0.1, use_triton=use_triton)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(p.shape, generator=drawn).to(GPU)
            optimizer.step()
        results.append(params)
    for p, q in zip(*results, strict=True):
        assert_same_bits(p, q)


def test_past_int32() -> None:
    """2**31 + 128 bfloat16 elements. All start equal but for runs at both ends and around element 2**31; the
    runs must match the reference, and every other element the one value that it gives."""
    n = (1 << 31) + 128
    needed = 3 * 2 * n + (4 << 30)
    if torch.cuda.mem_get_info(GPU)[0] < needed:
        pytest.skip(f"needs {needed >> 30} GiB of free GPU memory")
    tensors = [torch.full((n,), value, dtype=BF16, device=GPU) for value in (1.0, 2.0, -0.5)]
    border = 1 << 31
    runs = [slice(0, 4096), slice(border - 4096, border + 1), slice(border + 1, n)]
    generator = torch.Generator().manual_seed(7)
    for t in tensors:
        for run_ in runs:
            t[run_].copy_(awkward(run_.stop - run_.start, BF16, generator))
    expected = [[t[run_].clone() for t in tensors] for run_ in runs]
    plain = [torch.tensor([v], dtype=BF16, device=GPU) for v in (1.0, 2.0, -0.5)]
    hyper = HyperParameters(0.25, 0.5, 0.9, 0.99, False)
    for p, g, m in [*expected, plain]:
        reference_step([p], [g], [m], [0], [hyper])
    p, g, m = tensors
    step_by(LionUpdate(None), StepTensors([p], [g], {EXP_AVG: [m]}, [0]), [hyper])
    for run_, (want_p, _, want_m) in zip(runs, expected, strict=True):
        assert_same_bits(p[run_], want_p, f"parameter {run_}")
        assert_same_bits(m[run_], want_m, f"momentum {run_}")
    for t, value in ((p, plain[0]), (m, plain[2])):
        for run_ in runs:
            t[run_] = value
        wrong = sum(int((chunk != value).sum()) for chunk in t.split(1 << 28))
        assert wrong == 0


@pytest.mark.parametrize("dtype", STORAGE_DTYPES, ids=str)
def test_sum_of_squares(dtype: torch.dtype) -> None:
    """Only the order of float64 sums may differ: exact for dyadic gradients, else by 1e-12. The same bits twice."""
    generator = torch.Generator().manual_seed(8)
    drawn = [torch.randn(n, generator=generator).to(dtype) for n in LENGTHS]
    dyadic = [torch.randint(-8, 9, (n,), generator=generator).to(dtype) / 8 for n in LENGTHS]
    for values, tolerance in ((drawn, 1e-12), (dyadic, 0.0)):
        grads: list[Tensor | None] = [Guarded(v, i % 3).at for i, v in enumerate(values)]
        grads[4] = None
        params = [torch.zeros(n, dtype=dtype, device=GPU) for n in LENGTHS]
        columns = StepTensors(params, grads, {EXP_AVG: [torch.zeros_like(p) for p in params]}, [0] * len(params))
        update = LionUpdate(None)
        total = squares_by(update, columns)
        assert total is not None
        assert total.dtype == torch.float64
        assert total.shape == ()
        expected = sum(float(reference.sum_of_squares(v)) for i, v in enumerate(values) if i != 4)
        assert abs(float(total) - expected) <= tolerance * expected
        again = squares_by(update, columns)
        assert again is not None
        assert float(again) == float(total)


def test_sum_of_squares_of_nan_and_of_large_gradients() -> None:
    """Squares that overflow float32 do not; an infinity and a NaN are not lost."""
    p = torch.zeros(TILE + 1, device=GPU)
    g = torch.full_like(p, 1e30)
    columns = StepTensors([p], [g], {EXP_AVG: [torch.zeros_like(p)]}, [0])
    total = squares_by(LionUpdate(None), columns)
    assert total is not None
    assert float(total) == pytest.approx((TILE + 1) * float(g[0].double()) ** 2, rel=1e-12)
    for special in (float("-inf"), float("nan")):
        g[TILE] = special
        total = squares_by(LionUpdate(None), columns)
        assert total is not None
        assert float(total) == pytest.approx(abs(special), nan_ok=True)
