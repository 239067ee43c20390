"""The host time of a step, and where Lion's goes.

    python -m benchmarks.host_time         half a minute on one GPU; peers: pip install -e '.[bench]'
    (from the repository's root)

Models: 146 and 1000 tensors of 8 float32 elements, so that the device never holds up the host; no weight decay.
Contestants take turns, and a reading is one step with nothing queued on the device (measure.host_us). Hosts differ by
up to four times, so compare with the peers of the same run only.
Parts: what a step calls, one after another; the fastest of seven means over many calls. They do not add up to the step,
in which each finds the processor's caches as the one before it left them.
"""

from __future__ import annotations

import datetime
import timeit
from collections.abc import Callable
from functools import partial

import torch

from lion_dist import Lion
from lion_dist._torch_compat import tensors_alike
from lion_dist.param_groups import count_step

from .measure import DEVICE, Spread, Step, host_us
from .peer_steps import BETAS, LR, Group, lion_pytorch, missing
from .step_model import Model, Shape, make_ours

COUNTS = (146, 1000)
REPEATS = 51


def fused_adamw(groups: list[Group]) -> Step:
    step: Step = torch.optim.AdamW(groups, lr=LR, betas=BETAS, fused=True).step
    return step


CONTESTANTS: dict[str, Callable[[list[Group]], Step]] = {
    "lion_dist": make_ours,
    "torch.optim.AdamW, fused=True": fused_adamw,
    "lion-pytorch, use_triton=True": partial(lion_pytorch, use_triton=True),
}


def steps_of(count: int) -> dict[str, tuple[Spread, Spread]]:
    """For each contestant, host time in us with gradients that keep their addresses and with gradients that move."""
    models = {
        name: Model.random([Shape((8,), False)] * count, torch.float32)
        for name in CONTESTANTS
        if not (name.startswith("lion-pytorch") and missing("lion-pytorch"))
    }
    steps = {name: CONTESTANTS[name](model.groups()) for name, model in models.items()}
    for name, step in steps.items():
        for _ in range(4):
            models[name].move_gradients()
            step()
    readings: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in steps}
    for _ in range(REPEATS):
        for name, step in steps.items():
            step()
            readings[name][0].extend(host_us(step, lambda: None, 1))
            readings[name][1].extend(host_us(step, models[name].move_gradients, 1))
    return {name: (Spread.of(kept), Spread.of(moved)) for name, (kept, moved) in readings.items()}


def parts_of(count: int) -> dict[str, float]:
    """Host time, in us, of the parts of Lion's step whose gradients keep their addresses."""
    model = Model.random([Shape((8,), False)] * count, torch.float32)
    optimizer = Lion(model.groups(), lr=LR, betas=BETAS)
    for _ in range(4):
        optimizer.step()
    hypers = optimizer._hypers.read(optimizer.param_groups)
    kept, members, _ = optimizer._prepare()
    tensors = members.tensors()
    prepared = kept.update.prepare(tensors)
    compared = [*tensors.params, *(entry["exp_avg"] for entry in members.states)]
    grads = [p.grad for p in tensors.params if p.grad is not None]
    alike = tensors_alike([*compared, *grads])

    def fastest(call: Step, number: int = 50) -> float:
        torch.cuda.synchronize()
        return min(timeit.repeat(call, number=number, repeat=7)) / number * 1e6

    return {
        "the same parameters and groups?": fastest(lambda: members.hold(optimizer.param_groups, optimizer.state)),
        "p.grad and state of every parameter": fastest(members.tensors),
        "dtypes, shapes and strides as before? (one call in C++)": fastest(lambda: alike(*compared, *grads)),
        "addresses of parameters and momenta": fastest(lambda: list(map(torch.Tensor.data_ptr, compared))),
        "addresses of gradients": fastest(lambda: list(map(torch.Tensor.data_ptr, grads))),
        "hyper-parameters": fastest(lambda: optimizer._hypers.read(optimizer.param_groups)),
        "version counters of the parameters": fastest(lambda: torch.autograd.graph.increment_version(tensors.params)),
        "launch, with these counters": fastest(lambda: kept.update.step(prepared, hypers), 20),
        "number of steps in the groups": fastest(lambda: count_step(optimizer.param_groups)),
        "the whole step": fastest(optimizer.step, 20),
    }


def main() -> None:
    print(f"{torch.cuda.get_device_name(DEVICE)} | torch {torch.__version__} | {datetime.date.today()}\n")
    for count in COUNTS:
        print(f"{count} tensors, us of host time, median [p10, p90]\n")
        print("|  | gradients kept | gradients moved |\n|---|---|---|")
        for name, spreads in steps_of(count).items():
            print("| " + " | ".join([name, *(f"{s.median:.0f} [{s.p10:.0f}, {s.p90:.0f}]" for s in spreads)]) + " |")
        print()
    print("Parts of lion_dist's step, us\n\n|  | " + " | ".join(f"{n} tensors" for n in COUNTS) + " |\n|---|---|---|")
    columns = [parts_of(count) for count in COUNTS]
    for name in columns[0]:
        print(f"| {name} | " + " | ".join(f"{column[name]:.1f}" for column in columns) + " |")


if __name__ == "__main__":
    main()
