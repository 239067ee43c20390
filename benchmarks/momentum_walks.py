"""Wrong-way steps and slow turns of a momentum, seen in the walk of weights that are stepped by an optimizer.

Walk: weights of 0 stepped with a learning rate of 1. FlashLion's own kernel runs on a GPU, or in Triton's interpreter
(TRITON_INTERPRET=1, flashoptim on PYTHONPATH).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from lion_dist import Lion

Walk = Callable[[Tensor], Tensor]  # takes gradients, shape (n,), makes a step of lr 1, returns the weights


def spread_gradients(numel: int) -> tuple[Tensor, Tensor]:
    """Gradients before and after a change: 1/1000 to 1 of the largest, which is the first of every 32, and keeps its
    sign. All others change theirs. float32."""
    generator = torch.Generator().manual_seed(2)
    g = 10 ** (-3 * torch.rand(numel, generator=generator))
    g[::32] = 1.0
    after = -g
    after[::32] = 1.0
    return g, after


def share(follows: Tensor) -> float:
    """The share of momenta that follow, among the elements whose gradients changed."""
    changed = torch.arange(follows.numel()) % 32 != 0
    return float(follows.flatten()[changed].float().mean())


def lion_walk(numel: int, momentum_dtype: torch.dtype) -> Walk:
    p = torch.nn.Parameter(torch.zeros(numel))
    optimizer = Lion([p], lr=1.0, betas=(0.9, 0.99), momentum_dtype=momentum_dtype)

    def step(g: Tensor) -> Tensor:
        p.grad = g
        optimizer.step()
        return p.detach().clone()

    return step


def flashlion_walk(numel: int) -> Walk:
    """FlashLion's fused kernel with its 8-bit momentum, without the checks around it, which ask for a GPU."""
    from flashoptim import optimizers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        # In Triton's interpreter. There is no GPU to ask, and NumPy no longer takes arrays of one element for integers.
        optimizers._get_sm_count = lambda: 1
        optimizers.range = lambda *bounds: range(*(int(getattr(x, "handle", x).data.item()) for x in bounds))
    p, m = (torch.zeros(numel, dtype=dtype, device=device) for dtype in (torch.float32, torch.int8))
    scales = torch.zeros(-(-numel // 32), dtype=torch.float16, device=device)

    def step(g: Tensor) -> Tensor:
        optimizers._fused_momentum_step(
            m, scales, p, g.to(device), None, lr=1.0, mom_coef=0.99, update_coef=0.9, weight_decay=0.0, do_lion=True
        )
        return p.cpu().clone()

    return step


def wrong_way(walk: Walk, g: float, steps: int = 40, numel: int = 1024) -> float:
    """Steps against the mean of the gradients +g, +g, +g, -g/2, repeated; the mean over elements."""
    before, wrong = torch.zeros(numel), 0.0
    for step in range(steps):
        after = walk(torch.full((numel,), -g / 2 if step % 4 == 3 else g))
        wrong += float((after > before).float().mean())
        before = after
    return wrong


def walk_follows(walk: Walk, scales: tuple[float, ...], steps: int = 800, numel: int = 512) -> dict[str, float]:
    """As `momentum_codes.that_follow`, by scale of the gradients. A step with a gradient of zero shows a momentum's
    sign."""
    before, after = spread_gradients(numel)
    for step in range(2 * steps):
        g = before if step < steps else after
        weights = walk(torch.cat([scale * g for scale in scales]))
    moved = (walk(torch.zeros(numel * len(scales))) > weights).view(len(scales), numel)
    return {f"follow, {scale:g}": share(of) for scale, of in zip(scales, moved, strict=True)}


def walks() -> dict[str, dict[str, float]]:
    """Wrong-way steps of 40, by scale of the gradients, and the share that follows: of Lion and, where it is installed,
    FlashLion."""
    makers: dict[str, Callable[[], Walk]] = {
        "Lion, float32 momentum": lambda: lion_walk(1024, torch.float32),
        "Lion, int8 momentum": lambda: lion_walk(1024, torch.int8),
    }
    if importlib.util.find_spec("flashoptim"):
        makers["FlashLion's kernel"] = lambda: flashlion_walk(1024)
    rows = {}
    for name, make in makers.items():
        rows[name] = {f"wrong way, {g:g}": wrong_way(make(), g) for g in (1e-3, 1e-6, 1e-10)}
        rows[name] |= walk_follows(make(), (1.0, 1e-6))
        print(name, rows[name], flush=True)
    return rows
