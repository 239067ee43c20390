"""Which 8-bit code a momentum should have: signs that differ from those of a float32 momentum, under each code.

    python -m benchmarks.momentum_codes --json benchmarks/results/momentum_codes.json \\
        --out benchmarks/momentum_codes.png                                             (from the repository's root)

Code: 128 levels in [0, 1], and their negatives. A block of 128 momenta is stored as codes and its largest magnitude.
    The code of lion_dist/update/codecs.py is "float, 4 bits": the floats of 4 fraction bits from 1 on, less 1.
Rounding: to nearest; stochastic, with independent random numbers; or stochastic, with the dither of codecs.py (Weyl).
    All but the first are unbiased.
Signs that differ: the share of elements at which sign(beta1*m + (1-beta1)*g) differs between a stored momentum and a
    float32 one that was given the same gradients. Lost: the sum of |c| over these elements, over the sum of all |c|.
Spread: standard deviation, within a block, of the logarithm of the gradients' root mean squares.

Follow: the share of momenta that have the gradient's sign 800 steps after it changed, which it did after 800 steps, for
    gradients of 1/1000 to 1 of their block's largest, which does not change.

Gradients are simulated, and those of examples/train.py (preset tiny, trained with float32 Lion). momentum_walks.py has
the comparison with FlashLion's own kernel, which needs a GPU or TRITON_INTERPRET=1, and flashoptim on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lion_dist.update import codecs
from lion_dist.update.codecs import BLOCK, GOLDEN, seed_of

from .byte_model import Training, make_config
from .momentum_walks import share, spread_gradients, walks

SPREADS = (0.5, 1.0, 1.75, 2.5)
Store = Callable[[Tensor, int], Tensor]  # momenta, shape (blocks, BLOCK), and the step -> what is read back later


# Codes ----------------------------------------------------------------------------------------------


def powers(exponent: int) -> Tensor:
    return torch.arange(128, dtype=torch.float64) ** exponent


def softsign() -> Tensor:
    """Inverse of y = 2x / (1 + x), as in FlashLion."""
    y = torch.arange(128, dtype=torch.float64) / 127
    return y / (2 - y)


def logarithm() -> Tensor:
    """0, and 127 levels of one ratio from 2**-16 to 1."""
    return torch.cat([torch.zeros(1, dtype=torch.float64), 2 ** torch.linspace(-16, 0, 127, dtype=torch.float64)])


def floats(mantissa: int) -> Tensor:
    """The levels w - 1 of the first 128 floats w of that many fraction bits, from 1 on."""
    k = torch.arange(128, dtype=torch.float64)
    exponent = (k / 2**mantissa).floor()
    return 2**exponent * (1 + k / 2**mantissa - exponent) - 1


# Levels, and the operations on one element, beside those with the scale, that encoding and decoding take. Special: a
# logarithm, exponential, root or reciprocal, which GPUs compute at an eighth or a quarter of the rate of additions. Its
# last bits differ between backends, so that for equal codes two neighbouring levels must be computed and compared.
FLOATS = "add; add integers, shift / shift, add integers; subtract"
CODES: dict[str, tuple[Tensor, str]] = {
    "linear": (powers(1), "multiply, add, floor / convert"),
    "softsign": (softsign(), "special, add, 2 multiplies, add, floor, comparison / special, subtract, multiply"),
    "square": (powers(2), "special, multiply, add, floor, comparison / multiply"),
    "cube": (powers(3), "2 special, 2 multiplies, add, floor, comparison / 2 multiplies"),
    "logarithm": (logarithm(), "special, multiply, add, floor, comparison, case for 0 / special, multiply, case for 0"),
    "float, 3 bits": (floats(3), FLOATS),
    "float, 4 bits": (floats(4), FLOATS),
    "float, 5 bits": (floats(5), FLOATS),
}
ROUNDINGS = ("nearest", "random", "Weyl")
OURS, FLOAT32, BFLOAT16, FLASHLION = "codecs.py", "float32", "bfloat16", "FlashLion's rule, blocks of 32"


def quantizer(levels: Tensor, rounding: str, group: int = BLOCK, scale_dtype: torch.dtype = torch.float64) -> Store:
    """Storage of momenta in a code of these levels.

    Args:
        levels: ascending, shape (128,).
        rounding: of ROUNDINGS.
        group: number of elements that share a scale.
        scale_dtype: dtype in which the scale is stored. Codes are computed from the scale before that.
    """
    generator = torch.Generator().manual_seed(3)
    exact = levels / levels[-1]

    def dither_like(m: Tensor, step: int) -> Tensor | float:
        if rounding == "nearest":
            return 0.5
        if rounding == "random":
            return torch.rand(m.shape, generator=generator)
        index = torch.arange(m.numel()).view_as(m)
        return 1 - (index * GOLDEN + seed_of(step) & 0xFFFFFFFF) / 2**32

    def store(m: Tensor, step: int) -> Tensor:
        table = exact.to(m.dtype)
        grouped = m.view(-1, group)
        largest = grouped.abs().amax(1, keepdim=True)
        y = torch.where(largest > 0, grouped.abs() / largest, 0).view_as(m)
        above = torch.searchsorted(table, y).clamp(1, 127)
        low, high = table[above - 1], table[above]
        rounded = m.sign() * torch.where(y - low > dither_like(m, step) * (high - low), high, low)
        return (rounded.view(-1, group) * largest.to(scale_dtype).to(m.dtype)).view_as(m)

    return store


def ours(m: Tensor, step: int) -> Tensor:
    return codecs.decode(*codecs.encode(m.float().flatten(), seed=torch.tensor(seed_of(step)))).view_as(m).to(m.dtype)


def all_stores() -> dict[str, Store]:
    """By name: each code with each rounding, the code as codecs.py has it, bfloat16, and FlashLion's rule."""
    stores = {
        f"{code}, {rounding}": quantizer(levels, rounding)
        for code, (levels, _) in CODES.items()
        for rounding in ROUNDINGS
    }
    stores[OURS] = ours
    stores[BFLOAT16] = lambda m, step: m.bfloat16().to(m.dtype)
    stores[FLASHLION] = quantizer(softsign(), "nearest", 32, torch.float16)
    return stores


# Signs ----------------------------------------------------------------------------------------------


class Comparison:
    """Momenta stored in every way, which are given the same gradients.

    Attributes:
        differ, lost: by name, a number a step, see the module.
    """

    def __init__(self, stores: dict[str, Store], like: Tensor, betas: tuple[float, float]) -> None:
        self.stores, self.betas = stores, betas
        self.exact = torch.zeros_like(like)
        self.momenta = {name: torch.zeros_like(like) for name in stores}
        self.differ: dict[str, list[float]] = {name: [] for name in stores}
        self.lost: dict[str, list[float]] = {name: [] for name in stores}
        self.steps = 0

    def step(self, g: Tensor) -> None:
        beta1, beta2 = self.betas
        c = beta1 * self.exact + (1 - beta1) * g
        self.exact = beta2 * self.exact + (1 - beta2) * g
        sign, size = c.sign(), c.abs()
        whole = float(size.sum()) or 1.0
        for name, store in self.stores.items():
            m = self.momenta[name]
            differ = (beta1 * m + (1 - beta1) * g).sign() != sign
            self.differ[name].append(float(differ.float().mean()))
            self.lost[name].append(float(size[differ].sum()) / whole)
            self.momenta[name] = store(beta2 * m + (1 - beta2) * g, self.steps)
        self.steps += 1

    def means(self, of: dict[str, list[float]], first: int) -> dict[str, float]:
        return {name: sum(values[first:]) / len(values[first:]) for name, values in of.items()}


def simulated(spread: float, blocks: int, steps: int, betas: tuple[float, float] = (0.9, 0.99)) -> dict[str, float]:
    """Signs that differ where gradients have noise 20 times their mean, and a lognormal spread within a block."""
    generator = torch.Generator().manual_seed(1)

    def normal() -> Tensor:
        return torch.randn(blocks, BLOCK, generator=generator, dtype=torch.float64)

    size = torch.exp(spread * normal())
    mean = size * normal().sign() / 20
    compared = Comparison(all_stores(), size, betas)
    for _ in range(steps):
        compared.step(mean + size * normal())
    return compared.means(compared.differ, steps // 3)


def that_follow(store: Store, blocks: int, steps: int = 800, beta2: float = 0.99) -> float:
    """The share of momenta that have the gradient's sign ``steps`` after it changed, which it did after ``steps``."""
    before, after = (g.view(blocks, BLOCK).double() for g in spread_gradients(blocks * BLOCK))
    m = torch.zeros_like(before)
    for step in range(2 * steps):
        m = store(beta2 * m + (1 - beta2) * (before if step < steps else after), step)
    return share(m < 0)


# Gradients of a training ----------------------------------------------------------------------------


def real(betas: tuple[float, float], steps: int, every: int) -> dict[str, Any]:
    """Trains the byte model with float32 Lion, and gives its gradients to every momentum.

    Args:
        betas: of the training and of the momenta.
        every: of so many blocks of a parameter, one is compared.

    Returns:
        differ and lost (by name, each step), their means over the last half, and quantiles of the spreads.
    """
    training = Training(make_config("tiny", steps=steps, beta1=betas[0], beta2=betas[1], device="cpu"))

    def sample() -> Tensor:
        grads = [p.grad for p in training.model.parameters() if p.grad is not None]
        assert all(g.numel() % BLOCK == 0 for g in grads)
        return torch.cat([g.reshape(-1, BLOCK)[::every] for g in grads])

    stores, compared, squares = all_stores(), None, torch.zeros(())
    for step in range(steps):
        loss = training.step()
        g = sample()
        compared = compared or Comparison(stores, g, betas)
        compared.step(g)
        if step >= steps // 2:
            squares = squares + g.square()
        if step % 50 == 49:
            print(f"step {step + 1}: loss {float(loss):.3f}", flush=True)
    assert compared is not None
    return {
        "betas": betas, "steps": steps, "blocks": len(g), "val_loss": training.evaluate(),
        "spread": spreads(squares.sqrt()), "relative": relative(compared.exact),
        "mean_differ": compared.means(compared.differ, steps // 2),
        "mean_lost": compared.means(compared.lost, steps // 2),
        "differ": {name: [round(x, 5) for x in values] for name, values in compared.differ.items()},
    }  # fmt: skip


def quantiles(x: Tensor) -> dict[str, float]:
    return {f"{q:.0%}": float(x.quantile(q)) for q in (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)}


def spreads(rms: Tensor) -> dict[str, float]:
    """Quantiles over blocks of the spread. Elements that never had a gradient do not count."""
    of_blocks = [block[block > 0].log().std() for block in rms if (block > 0).sum() > 1]
    return quantiles(torch.stack(of_blocks))


def relative(m: Tensor) -> dict[str, float]:
    """Quantiles over elements of |m| / largest |m| of the block. Blocks of zeros do not count."""
    largest = m.abs().amax(1, keepdim=True)
    return quantiles((m.abs() / largest)[largest[:, 0] > 0].flatten())


# Output ---------------------------------------------------------------------------------------------


def draw(path: Path, runs: list[dict[str, Any]], rounding: str = "Weyl") -> None:
    """Draws the fraction of signs that differ, step by step: one panel for each training."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(runs), figsize=(6 * len(runs), 5), layout="constrained", squeeze=False)
    names = {f"{code}, {rounding}": code for code in CODES} | {BFLOAT16: BFLOAT16, FLASHLION: FLASHLION}
    for axis, run in zip(axes[0], runs, strict=True):
        for name, label in names.items():
            style: dict[str, Any] = {"color": "black", "linewidth": 2} if label == "float, 4 bits" else {"linewidth": 1}
            style["linestyle"] = "--" if name in (BFLOAT16, FLASHLION) else "-"
            values = torch.tensor(run["differ"][name])
            smooth = values.unfold(0, 10, 1).mean(1)
            axis.plot(range(9, len(values)), 100 * smooth, label=label, **style)
        axis.set(xlabel="step", title=f"byte model, betas {tuple(run['betas'])}", yscale="log")
        axis.grid(alpha=0.3, which="both")
    axes[0, 0].set_ylabel("signs that differ from float32 momentum's, % (means of 10 steps)")
    axes[0, -1].legend(fontsize=8)
    figure.suptitle(f"8-bit momentum, blocks of {BLOCK}, stochastic rounding; FlashLion: to nearest", fontsize=10)
    figure.savefig(path, dpi=100)


def table(header: list[str], rows: list[list[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def report(found: dict[str, Any]) -> str:
    """The tables."""
    runs, names = found["real"], list(found["follow"])
    header = ["code, rounding", *(f"spread {spread}" for spread in found["simulated"]), "follow"]
    header += [f"{what}, betas {tuple(run['betas'])}" for run in runs for what in ("real", "lost")]
    rows = []
    for name in names:
        cells = [f"{100 * of[name]:.2f}" for of in found["simulated"].values()] + [f"{found['follow'][name]:.3f}"]
        cells += [f"{100 * run[mean][name]:.2f}" for run in runs for mean in ("mean_differ", "mean_lost")]
        rows.append([name, *cells])
    parts = [table(header, rows)]
    for key in ("spread", "relative"):
        parts.append(table(
            [key, *runs[0][key]], [[run["betas"], *(f"{x:.4f}" for x in run[key].values())] for run in runs]
        ))  # fmt: skip
    parts.append(table(["code", "encode / decode"], [[code, cost] for code, (_, cost) in CODES.items()]))
    walked = found["walks"]
    parts.append(table(["", *next(iter(walked.values()))], [[name, *row.values()] for name, row in walked.items()]))
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=200, help="of each training")
    parser.add_argument("--every", type=int, default=32, help="of so many blocks of a parameter, one is compared")
    parser.add_argument("--blocks", type=int, default=32, help="of the simulations")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--out", type=Path, help="the picture")
    options = parser.parse_args()
    began = time.monotonic()
    found: dict[str, Any] = {"torch": torch.__version__, "options": {k: str(v) for k, v in vars(options).items()}}
    found["real"] = [real(betas, options.steps, options.every) for betas in ((0.95, 0.98), (0.9, 0.99))]
    found["simulated"] = {spread: simulated(spread, options.blocks, 300) for spread in SPREADS}
    found["follow"] = {name: that_follow(store, options.blocks // 4) for name, store in all_stores().items()}
    found["walks"] = walks()
    print(f"{time.monotonic() - began:.0f} s\n\n{report(found)}")
    if options.json:
        options.json.write_text(json.dumps(found) + "\n")
    if options.out:
        draw(options.out, found["real"])


if __name__ == "__main__":
    main()
