"""Prints what every strategy costs: ``python -m lion_dist.plan --params 7e9 --gpus 64``."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence

import torch

from .cluster import NETWORKS, Cluster
from .costs import costs_of
from .precision import PRECISIONS, Precision
from .strategies import STRATEGIES, Policy, Shards
from .timing import Model

GIB, GB = 2**30, 1e9
# Measured rate of a forward and backward on an H200 (the model of benchmarks/RESULTS.md), at 6 * P operations a token.
TFLOPS = 395.0
DESCRIPTION = """\
Prints what each strategy costs a model: memory of a rank, bytes on the wire, and time of an iteration. These are
predictions by arithmetic, and nothing is run. Bandwidths are those of H200s."""
EPILOG = """\
strategies:
  DDP              Lion under DistributedDataParallel
  stage 1, 2       ShardedLion; "params" and "signs" are its param_sync, "16 bits" is reduce_dtype=torch.bfloat16
  FSDP2            Lion over a model that fully_shard shards over all ranks
  HSDP             Lion over a model that fully_shard shards in each node and replicates; "16 bits":
                   MixedPrecisionPolicy(reduce_dtype=torch.bfloat16)
  hybrid           fully_shard in each node, ShardedLion (stage 2) between nodes

columns:
  held             weights, gradients, optimizer state and signs that a rank holds between steps. Activations, the
                   model's buffers and gradients on their way (at most three buckets) come on top.
  gathered         weights that FSDP2 has gathered when the backward begins, on top of what is held
  a rank sends     in a step of one micro-batch, to the GPUs of its own node too
  a node sends     of that, to other nodes, all its GPUs together
  ms               a predicted iteration. Between nodes it has not been compared with measurements.
  compute share    forward and backward alone, as a share of that time

The documentation, "Which one do I need", says how to choose; lion_dist/plan/timing.py says what is assumed."""


def _count(text: str) -> int:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (number >= 1 and number.is_integer() and number < 2**53):
        raise argparse.ArgumentTypeError(f"must be a whole number >= 1, such as 8 or 7e9, got {text!r}")
    return int(number)


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise argparse.ArgumentTypeError(f"must be a number > 0, got {text!r}")
    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lion_dist.plan",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    networks = ", ".join(f"{name} ({network.what})" for name, network in NETWORKS.items())
    add = parser.add_argument
    add("--params", type=_count, required=True, metavar="N", help="number of parameters, such as 7e9")
    add("--gpus", type=_count, required=True, metavar="N", help="number of GPUs, each with one rank")
    add("--gpus-per-node", type=_count, default=8, metavar="N", help="GPUs of a node, connected by NVLink (default 8)")
    add("--network", choices=NETWORKS, default="400g-gpu", help=f"between nodes: {networks}; default 400g-gpu")
    add("--dtype", choices=("fp32", "bf16"), default="fp32", help="dtype of the weights (default fp32, under autocast)")
    add("--master-weights", action="store_true", help="master weights for bf16")
    add("--momentum", choices=("auto", "int8"), default="auto", help="dtype of the momentum: auto (the weights'), int8")
    add(
        "--reshard-after-forward",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="FSDP2, HSDP and hybrid: free gathered weights after the forward and gather them again in the backward, "
        "as fully_shard does by default for all but the root; or keep them (--no-...), which takes memory and saves "
        "bytes on the wire",
    )
    add(
        "--bf16-gathers",
        action="store_true",
        help="FSDP2, HSDP and hybrid: gather fp32 weights and reduce their gradients in bfloat16, as "
        "MixedPrecisionPolicy(param_dtype=torch.bfloat16) does",
    )
    add("--tokens", type=_count, default=4096, metavar="N", help="tokens of a rank in an iteration (default 4096)")
    add(
        "--tflops",
        type=_positive,
        default=TFLOPS,
        metavar="X",
        help=f"speed of a GPU in forward and backward, in 6 operations for each parameter and token (default "
        f"{TFLOPS:g}, measured on an H200)",
    )
    add("--compute-ms", type=_positive, metavar="X", help="time of forward and backward alone, if you have measured it")
    add("--layers", type=_count, default=32, metavar="N", help="number of the model's blocks (default 32)")
    add("--vocabulary", type=_count, default=32000, metavar="N", help="rows of the embedding (default 32000)")
    return parser


def _precision(options: argparse.Namespace) -> Precision:
    if options.master_weights and options.dtype != "bf16":
        raise ValueError("--master-weights are for bfloat16 weights: give --dtype bf16 too")
    weights = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.dtype]
    return Precision(weights, torch.int8 if options.momentum == "int8" else weights, options.master_weights)


def _model(options: argparse.Namespace) -> Model:
    """The model, with an embedding as wide as that of a transformer of so many parameters, 12 * width^2 a block."""
    width = math.sqrt(options.params / (12 * options.layers))
    embedding = min(options.vocabulary * width, options.params / 2)
    compute_ms = options.compute_ms or 6 * options.params * options.tokens / (options.tflops * 1e12) * 1e3
    if not math.isfinite(compute_ms):
        raise ValueError(f"--tflops {options.tflops:g} makes an iteration take forever: expected a GPU's speed")
    return Model(options.params, round(embedding), options.layers, compute_ms)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        numbers = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return f"| {' | '.join([cells[0].ljust(widths[0]), *numbers])} |"

    rule = "".join(["|", "-" * (widths[0] + 2), "|", *("-" * (width + 1) + ":|" for width in widths[1:])])
    return "\n".join([line(head), rule, *map(line, rows)])


def report(model: Model, cluster: Cluster, network: str, precision: Precision, policy: Policy) -> str:
    """The tables of the command.

    Args:
        model: the model and the work of an iteration.
        cluster: the GPUs and the links between them.
        network: describes the links between nodes.
        precision: dtypes of weights and state in the first table; the second has all of them.
        policy: how FSDP2 gathers weights.
    """
    over_nodes = cluster.nodes > 1
    strategies = {name: s for name, s in STRATEGIES.items() if over_nodes or s.shards is not Shards.NODE}
    where = f"{cluster.nodes} nodes of {cluster.node}, {network}" if over_nodes else "one node, NVLink"
    gpus = "1 GPU" if cluster.gpus == 1 else f"{cluster.gpus} GPUs"
    costs, memory = [], []
    for name, strategy in strategies.items():
        c = costs_of(model, cluster, strategy, precision, policy)
        costs.append([
            name, f"{c.held / GIB:.2f}", f"{c.gathered / GIB:.2f}", f"{c.rank_sends / GB:.2f}",
            f"{c.node_sends / GB:.2f}", f"{c.ms:.1f}", f"{100 * model.compute_ms / c.ms:.0f} %",
        ])  # fmt: skip
        all_held = [costs_of(model, cluster, strategy, p, policy).held for p in PRECISIONS]
        memory.append([name, *(f"{held / GIB:.2f}" for held in all_held)])
    head = ["strategy", "held, GiB", "gathered, GiB", "a rank sends, GB", "a node sends, GB", "ms", "compute share"]
    return "\n".join([
        f"{model.params:,} parameters in {precision.name}, {gpus} ({where}); forward and backward alone "
        f"take {model.compute_ms:.1f} ms. FSDP2 has reshard_after_forward={policy.reshard_after_forward} and gathers "
        f"{8 * policy.gathered_bytes(precision):.0f} bits.",
        "",
        _table(head, costs),
        "",
        "Held by a rank in each precision, GiB",
        "",
        _table(["strategy", *(p.name for p in PRECISIONS)], memory),
        "",
        "By arithmetic. Activations, buffers and gradients on their way come on top; --help explains the columns.",
    ])  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: the arguments; None: those of the process.

    Returns:
        The exit status.
    """
    parser = _parser()
    options = parser.parse_args(argv)
    network = NETWORKS[options.network]
    try:
        precision, cluster = _precision(options), network.cluster(options.gpus, options.gpus_per_node)
        model = _model(options)
    except ValueError as error:
        parser.error(str(error))
    policy = Policy(options.reshard_after_forward, options.bf16_gathers)
    print(report(model, cluster, network.what, precision, policy))
    return 0


if __name__ == "__main__":
    sys.exit(main())
