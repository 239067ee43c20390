"""The optimizer's step on the CPU: lion_dist.Lion beside lion-pytorch, torch's AdamW and DeepSpeedCPULion, in one run.

    python -m benchmarks.cpu_step                            all cases on one and on two threads, some minutes
    python -m benchmarks.cpu_step --cases 300x512 --threads 1
    (from the repository's root; peers: pip install -e '.[bench]')

Cases: number of tensors x elements of each; float32 parameters, gradients and momenta; one group, which decays.
First: seconds of the first step, which compiles what has to be compiled. Each case runs in a process of its own with an
    empty cache of torch.compile, so nothing has been compiled before.
Times: the contestants take turns, every second time in reverse order; the median of the turns, and the 10th and 90th
    percentiles. Ratios are medians over the turns of ours / the peer's in the same turn.
DeepSpeedCPULion is compiled from C++ when it is first made, which takes minutes; it takes part if it has been compiled
    (TORCH_EXTENSIONS_DIR), or with --deepspeed, which compiles it. Where Lion's c is 0 it moves the weight by +lr.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.cpp_extension import get_default_build_root

from lion_dist import Lion

from .measure import Spread, Step
from .peer_steps import BETAS, DECAY, LR, installed_version, missing

CASES = ["300x512", "40x20000", "12x262144", "20x589824", "4x1000000", "4x1100000"]
OURS, PEER = "lion_dist", "lion-pytorch"
MOST = 1.1  # what ours may take in units of lion-pytorch's time


def make_ours(params: list[Tensor]) -> Step:
    return Lion(params, lr=LR, betas=BETAS, weight_decay=DECAY).step


def make_lion_pytorch(params: list[Tensor]) -> Step:
    from lion_pytorch import Lion as Theirs

    step: Step = Theirs(params, lr=LR, betas=BETAS, weight_decay=DECAY).step
    return step


def make_adamw_foreach(params: list[Tensor]) -> Step:
    return torch.optim.AdamW(params, lr=LR, weight_decay=DECAY, foreach=True).step


def make_adamw_fused(params: list[Tensor]) -> Step:
    return torch.optim.AdamW(params, lr=LR, weight_decay=DECAY, fused=True).step


def make_deepspeed(params: list[Tensor]) -> Step:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.ops.lion import DeepSpeedCPULion

    step: Step = DeepSpeedCPULion(params, lr=LR, betas=BETAS, weight_decay=DECAY).step
    return step


CONTESTANTS: dict[str, Callable[[list[Tensor]], Step]] = {
    OURS: make_ours,
    PEER: make_lion_pytorch,
    "AdamW foreach": make_adamw_foreach,
    "AdamW fused": make_adamw_fused,
    "DeepSpeedCPULion": make_deepspeed,
}
DISTRIBUTIONS = {PEER: "lion-pytorch", "DeepSpeedCPULion": "deepspeed"}


def deepspeed_is_compiled() -> bool:
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    folders = [Path(root)] if root else list(Path(get_default_build_root()).glob("*"))
    return any((folder / "cpu_lion/cpu_lion.so").exists() for folder in folders)


def contestants(compile_deepspeed: bool) -> list[str]:
    """Names of the contestants that can run here."""
    names = [name for name in CONTESTANTS if not missing(DISTRIBUTIONS.get(name, ""))]
    if not compile_deepspeed and not deepspeed_is_compiled():
        names = [name for name in names if name != "DeepSpeedCPULion"]
    return names


def numbers_of(case: str) -> tuple[int, int]:
    """(number of tensors, elements of each) of a case such as "300x512"."""
    count, _, numel = case.partition("x")
    if not (count.isdigit() and numel.isdigit() and int(count) and int(numel)):
        raise ValueError(f"case {case!r}: expected the number of tensors and the elements of each, such as 300x512")
    return int(count), int(numel)


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def readings(case: str, names: Sequence[str], repeats: int) -> dict[str, Any]:
    """Measures one case in this process.

    Returns:
        ``first``: seconds of the first step by contestant; ``ms``: milliseconds of its turns.
    """
    count, numel = numbers_of(case)
    generator = torch.Generator().manual_seed(0)
    start, grads = ([torch.randn(numel, generator=generator).mul_(std) for _ in range(count)] for std in (0.02, 1e-3))
    steps: dict[str, Step] = {}
    first: dict[str, float] = {}
    for name in names:
        params = [torch.nn.Parameter(p.clone()) for p in start]
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        steps[name] = CONTESTANTS[name]([*params])
        first[name] = seconds(steps[name])
    for _ in range(2):
        for step in steps.values():
            step()
    ms: dict[str, list[float]] = {name: [] for name in names}
    for i in range(repeats):
        for name in list(names)[:: 1 if i % 2 else -1]:
            ms[name].append(1e3 * seconds(steps[name]))
    return {"first": first, "ms": ms}


def measure(case: str, threads: int, names: Sequence[str], repeats: int, cold: bool = True) -> dict[str, Any]:
    """`readings` in a new process.

    Args:
        cold: whether the process has an empty cache of torch.compile, instead of the user's.
    """
    with tempfile.TemporaryDirectory() as cache:
        # DeepSpeed's OpenMP reads the number when it is loaded; torch.compile writes it into what it generates.
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        if cold:
            environment["TORCHINDUCTOR_CACHE_DIR"] = cache
        command = [sys.executable, "-m", "benchmarks.cpu_step", "--child", case, str(repeats), ",".join(names)]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"case {case} on {threads} threads failed with exit code {done.returncode}; see above")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def ratio(ms: dict[str, list[float]], peer: str = PEER) -> float:
    """Ours in units of a peer's time: the median over the turns."""
    return statistics.median(a / b for a, b in zip(ms[OURS], ms[peer], strict=True))


def row(case: str, threads: int, result: dict[str, Any], names: Sequence[str]) -> list[str]:
    cells = [case.replace("x", " x "), str(threads), f"{result['first'][OURS]:.2f}"]
    for name in names:
        s = Spread.of(result["ms"][name])
        cells.append(f"{s.median:.2f} [{s.p10:.2f}, {s.p90:.2f}]")
    return [*cells, *(f"{ratio(result['ms'], name):.2f}" for name in names if name != OURS)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--cases", default=",".join(CASES), help="number of tensors x elements of each, with commas")
    parser.add_argument("--threads", default="1,2", help="numbers of threads, with commas")
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--deepspeed", action="store_true", help="compile DeepSpeedCPULion if it has not been")
    parser.add_argument("--json", type=Path, help="write every reading here")
    parser.add_argument("--child", nargs=3, metavar=("CASE", "REPEATS", "NAMES"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        case, repeats, chosen = options.child
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        print(json.dumps(readings(case, chosen.split(","), int(repeats))))
        return
    names = contestants(options.deepspeed)
    versions = [f"torch {torch.__version__}"]
    versions += [f"{d} {installed_version(d)}" for name, d in DISTRIBUTIONS.items() if name in names]
    print(f"{', '.join(versions)}, {os.cpu_count()} cores; not here: {', '.join(set(CONTESTANTS) - set(names)) or '-'}")
    print(f"`{shlex.join(['python', '-m', 'benchmarks.cpu_step', *sys.argv[1:]])}`\n")
    header = ["elements", "threads", "first step, s", *(f"{name}, ms [p10, p90]" for name in names)]
    header += [f"ours / {name}" for name in names if name != OURS]
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}", flush=True)
    raw = []
    for case in options.cases.split(","):
        for threads in map(int, options.threads.split(",")):
            result = measure(case, threads, names, options.repeats)
            raw.append({"case": case, "threads": threads, **result})
            print(f"| {' | '.join(row(case, threads, result, names))} |", flush=True)
    if PEER in names:
        worse = [f"{r['case']} on {r['threads']} threads" for r in raw if ratio(r["ms"]) > MOST]
        print(f"\nmore than {MOST} times {PEER}'s time: {', '.join(worse) or 'none'}")
    if options.json:
        options.json.write_text(json.dumps(raw))


if __name__ == "__main__":
    main()
