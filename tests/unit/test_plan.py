"""python -m lion_dist.plan: its bytes beside those that were measured and that documents state; and the command."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from benchmarks.model import LLAMA
from benchmarks.precision_memory import WAYS
from lion_dist.plan.__main__ import GIB, main
from lion_dist.plan.cluster import NETWORKS, Cluster
from lion_dist.plan.costs import Costs, costs_of
from lion_dist.plan.precision import PRECISIONS, Precision
from lion_dist.plan.strategies import STRATEGIES, Bytes, Policy, Shards
from tests.scenarios.documents import numbers_in, table_with, tables

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/RESULTS.md"
BY_NAME = {precision.name: precision for precision in PRECISIONS}
FP32, BF16 = BY_NAME["fp32"], BY_NAME["bf16"]
KEPT = Policy(reshard_after_forward=False)
WITHIN = 0.03


# Beside measurements ------------------------------------------------------------------------------------------


def test_memory_beside_what_was_counted_in_each_precision() -> None:
    """Each kind of memory: weights, gradients, state, and signs, which the table calls the rest."""
    rows = table_with(RESULTS, "Memory in each precision", "counted")
    assert len(rows) == len(WAYS) * len(PRECISIONS)
    for row in rows:
        strategy = STRATEGIES[row["strategy"]]
        shards, replicas = (2, 1) if strategy.shards is Shards.ALL else (1, 2)
        memory = strategy.memory(BY_NAME[row["precision"]])
        for kind, title in zip(memory, ("weights", "gradients", "state", "rest"), strict=True):
            assert kind.on(replicas) / shards == pytest.approx(float(row[title]), rel=WITHIN, abs=0.0051), row
        assert memory.total.on(replicas) / shards == pytest.approx(float(row["counted"]), rel=WITHIN), row


# What a mode of benchmarks.iteration holds, as a strategy of the plan.
DDP, STAGE_1, FSDP = "DDP", 'stage 1, "params"', "FSDP2"
INT8 = BY_NAME["fp32, int8 momentum"]  # FlashLion's momentum has 1.06 bytes an element, and ours 1.03
MEASURED_AS: dict[str, tuple[str, Precision, Policy]] = {
    "ShardedLion stage 2, signs": ('stage 2, "signs"', FP32, Policy()),
    "ShardedLion stage 2, bf16 reduction, signs": ('stage 2, "signs", 16 bits', FP32, Policy()),
    "ShardedLion stage 2, parameters": ('stage 2, "params"', FP32, Policy()),
    "DDP + Lion": (DDP, FP32, Policy()),
    "DDP + lion-pytorch, use_triton=True": (DDP, FP32, Policy()),
    "DDP + lion-pytorch 0.2.5, use_triton=True": (DDP, FP32, Policy()),
    "DDP + ZeroRedundancyOptimizer of the same": (STAGE_1, FP32, Policy()),
    "DDP + ZeroRedundancyOptimizer of lion-pytorch, use_triton=True": (STAGE_1, FP32, Policy()),
    "FSDP1 SHARD_GRAD_OP + Lion": (FSDP, FP32, KEPT),
    "FSDP1 SHARD_GRAD_OP + lion-pytorch, use_triton=True": (FSDP, FP32, KEPT),
    "FSDP1 SHARD_GRAD_OP + FlashLion (8-bit momentum)": (FSDP, INT8, KEPT),
    "FSDP2 + Lion": (FSDP, FP32, Policy()),
    "FSDP2 + lion-pytorch, use_triton=True, on local parts by hand": (FSDP, FP32, Policy()),
    "FSDP2 + FlashLion (8-bit momentum)": (FSDP, INT8, Policy()),
    "FSDP2 reshard_after_forward=False + Lion": (FSDP, FP32, KEPT),
    "FSDP2 reshard_after_forward=False + FlashLion (8-bit momentum)": (FSDP, INT8, KEPT),
    "FSDP2 without resharding + FlashLion (8-bit momentum)": (FSDP, INT8, KEPT),
}


@pytest.mark.parametrize(
    ("heading", "gpus", "rows"),
    [
        ("Whole iterations, two GPUs", 2, 13),
        ("Slow links: NCCL's socket transport", 2, 6),
        ("One GPU: a short iteration, and clipping", 1, 4),
    ],
)
def test_memory_beside_the_peaks_of_iterations(heading: str, gpus: int, rows: int) -> None:
    """At the peak the backward begins. The activations are then those of a forward and backward alone, which holds
    whole weights beside them."""
    table = tables(RESULTS, heading)[-1 if gpus == 1 else 0]
    peaks = {row["mode"]: float(row["peak GiB"]) for row in table}
    activations = peaks["forward and backward alone"] - LLAMA.params * 4 / GIB
    compared = 0
    for mode, peak in peaks.items():
        if mode not in MEASURED_AS or (gpus == 1 and mode.startswith("FSDP1")):  # which shards nothing on one rank
            continue
        name, precision, policy = MEASURED_AS[mode]
        strategy = STRATEGIES[name]
        costs = costs_of(LLAMA, Cluster(gpus, gpus, 1.0), strategy, precision, policy)
        planned = costs.held + costs.gathered
        if strategy.shards is Shards.ALL:  # its gradients were None when the backward began
            planned -= LLAMA.params * strategy.memory(precision).gradients.whole / gpus
        assert planned / GIB == pytest.approx(peak - activations, rel=WITHIN), mode
        compared += 1
    assert compared == rows


def test_bytes_of_a_step_beside_the_table_of_precisions() -> None:
    rows = table_with(RESULTS, "Step in other precisions, one GPU", "bytes an element")
    names = {name.replace(" weights", "").replace(", int8 momentum", " + int8"): p for name, p in BY_NAME.items()}
    bytes_of = {row[""]: float(row["bytes an element"]) for row in rows}
    assert names.keys() <= bytes_of.keys()
    for name, precision in names.items():
        assert precision.step_bytes(precision.weight_bytes) == pytest.approx(bytes_of[name], abs=0.005), name


# Beside the documents -----------------------------------------------------------------------------------------

HYBRID = ROOT / "docs/hybrid.md"
COLUMNS = {
    "HSDP + `Lion`": "HSDP",
    'this, "params"': 'hybrid, "params"',
    'this, "signs"': 'hybrid, "signs"',
    "FSDP2 over all ranks + `Lion`": "FSDP2",
}


def test_memory_of_meshes_as_the_page_states_it() -> None:
    formulas, values = tables(HYBRID, "Memory")
    cluster = Cluster(32, 8, 1.0)
    for formula, value in zip(formulas, values, strict=True):
        precision = BY_NAME[formula[""]]
        for title, name in COLUMNS.items():
            strategy = STRATEGIES[name]
            total = strategy.memory(precision).total
            over = "W" if strategy.shards is Shards.ALL else "S"
            expected = str(Bytes(total.whole, 0)) + f"/{over}"
            if total.sharded:
                expected += f" + {Bytes(0, total.sharded)}"
            assert formula[title] == expected
            assert value[title] == f"{costs_of(LLAMA, cluster, strategy, precision, Policy()).held / LLAMA.params:.2f}"


def numbers(cell: str) -> list[float]:
    """ "4 + 0.25" counts as one number, the sum, and "12 / 8.25" as two."""
    return [sum(numbers_in(part)) for part in cell.split("/")]


@pytest.mark.parametrize(("column", "precision"), [(0, FP32), (1, BF16)])
def test_bytes_between_nodes_as_the_page_states_them(column: int, precision: Precision) -> None:
    rows = tables(HYBRID, "Bytes on the links")[0]
    title = list(rows[0])[1 + column]
    stated = {row[""]: numbers(row[title]) for row in rows}
    for line, name in {
        "HSDP + `Lion`": "HSDP",
        'this, `param_sync="params"`': 'hybrid, "params"',
        'this, `param_sync="signs"`': 'hybrid, "signs"',
        'this, `param_sync="signs"`, `reduce_dtype=torch.bfloat16`': 'hybrid, "signs", 16 bits',
        'stage 1, `param_sync="signs"`': 'stage 1, "signs"',
    }.items():
        assert stated[line] == [STRATEGIES[name].wire(precision, Policy()).between], line
    # With reshard_after_forward=True, and with False.
    within = [STRATEGIES["FSDP2"].wire(precision, policy).within for policy in (Policy(), KEPT)]
    assert stated["FSDP2 over all ranks + `Lion`, rings"] == within


def test_bytes_on_the_wire_as_the_other_pages_state_them() -> None:
    def between(name: str, precision: Precision = FP32) -> float:
        return STRATEGIES[name].wire(precision, Policy()).between

    def within(policy: Policy, precision: Precision = FP32) -> float:
        return STRATEGIES["FSDP2"].wire(precision, policy).within

    rows = table_with(ROOT / "docs/choosing.md", "ShardedLion or DDP with Lion", "together")
    together = [numbers(row["together"]) for row in rows]
    sixteen = [between(f'stage 2, "{sync}", 16 bits') for sync in ("params", "signs")]
    stages = [[between(f'stage {stage}, "{sync}"') for sync in ("params", "signs")] for stage in (1, 2)]
    assert together == [[between("DDP")], *stages, sixteen]

    rows = table_with(ROOT / "docs/precision.md", "What goes over the wire", "DDP")
    for row, precision in ((rows[0], FP32), (rows[2], BF16)):
        assert numbers(row["DDP"]) == [between("DDP", precision)]
        for stage in (1, 2):
            expected = [between(f'stage {stage}, "{sync}"', precision) for sync in ("params", "signs")]
            assert numbers(row[f'stage {stage}, "params" / "signs"']) == expected
        assert numbers(row["FSDP2"]) == [within(Policy(), precision), within(KEPT, precision)]
    assert numbers(rows[1]['stage 2, "params" / "signs"']) == sixteen
    assert numbers(rows[1]["FSDP2"]) == [within(Policy(bf16=True)), within(Policy(False, bf16=True))]


# The command --------------------------------------------------------------------------------------------------


def costs(name: str, cluster: Cluster, policy: Policy = KEPT) -> Costs:
    return costs_of(LLAMA, cluster, STRATEGIES[name], FP32, policy)


def test_bytes_that_ranks_and_nodes_send() -> None:
    two, one, p = Cluster(16, 8, 1.0), Cluster(8, 8, 1.0), LLAMA.params
    assert costs("DDP", two).rank_sends == costs("DDP", two).node_sends == pytest.approx(8 * p * 15 / 16)
    assert costs("FSDP2", two).node_sends == pytest.approx(8 * p * 15 / 16)
    assert costs("HSDP", two).node_sends == pytest.approx(8 * p / 2)
    assert costs("HSDP", two).rank_sends == pytest.approx(8 * p * 7 / 8 + p / 2)
    assert costs('hybrid, "signs"', two).node_sends == pytest.approx(4.25 * p / 2)
    assert costs("DDP", one).node_sends == 0
    assert costs("FSDP2", two).gathered == 4 * p > costs("FSDP2", two, Policy()).gathered > 0
    assert costs("DDP", two).gathered == 0


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, list[str]]:
    """The rows of the first table."""
    assert main(["--params", "7e9", "--gpus", "64", *arguments]) == 0
    text = capsys.readouterr().out
    first = text.split("Held by a rank")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in first.splitlines() if line[:1] == "|"]
    assert len({len(line) for line in first.splitlines() if line[:1] == "|"}) == 1, "columns are aligned"
    return {name: cells for name, *cells in rows[2:]}


def test_the_command_prints_every_strategy(capsys: pytest.CaptureFixture[str]) -> None:
    rows = run(capsys)
    assert list(rows) == list(STRATEGIES)
    assert rows["DDP"][0] == f"{12 * 7e9 / GIB:.2f}"
    assert list(run(capsys, "--network", "nvlink")) == [n for n, s in STRATEGIES.items() if s.shards is not Shards.NODE]


def test_options_of_the_command_count(capsys: pytest.CaptureFixture[str]) -> None:
    rows = run(capsys)
    half = run(capsys, "--dtype", "bf16")
    assert half["DDP"][0] == f"{6 * 7e9 / GIB:.2f}"
    assert run(capsys, "--dtype", "bf16", "--master-weights")["DDP"][0] == f"{8 * 7e9 / GIB:.2f}"
    assert run(capsys, "--momentum", "int8")["DDP"][0] == f"{(8 + 1 + 4 / 128) * 7e9 / GIB:.2f}"
    assert run(capsys, "--no-reshard-after-forward")["FSDP2"][1] == f"{4 * 7e9 / GIB:.2f}"
    assert run(capsys, "--bf16-gathers")["FSDP2"][2] == f"{6 * 7e9 * 63 / 64 / 1e9:.2f}"
    for slower in (["--network", "100gbe"], ["--tokens", "8192"], ["--tflops", "100"], ["--compute-ms", "5000"]):
        assert float(run(capsys, *slower)["DDP"][4]) > float(rows["DDP"][4]), slower
    for other in (["--layers", "80"], ["--vocabulary", "256000"]):
        assert run(capsys, *other)["FSDP2"] != rows["FSDP2"], other


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "8"], "required: --params"),
        (["--params", "7b"], "argument --params: must be a whole number >= 1, such as 8 or 7e9, got '7b'"),
        (["--params", "inf"], "argument --params: must be a whole number"),
        (["--params", "7e9", "--gpus", "0"], "argument --gpus: must be a whole number >= 1"),
        (["--params", "7e9", "--gpus", "12"], "12 GPUs are not whole nodes of 8 GPUs: give a multiple of 8"),
        (["--params", "7e9", "--gpus", "8", "--network", "wlan"], "argument --network: invalid choice: 'wlan'"),
        (["--params", "7e9", "--gpus", "8", "--tflops", "-1"], "argument --tflops: must be a number > 0"),
        (["--params", "7e9", "--gpus", "8", "--tflops", "1e-305"], "--tflops 1e-305 makes an iteration take forever"),
        (["--params", "7e9", "--gpus", "8", "--master-weights"], "--master-weights are for bfloat16 weights: give"),
    ],
)
def test_bad_arguments_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert message in re.sub(r"\s+", " ", capsys.readouterr().err)


def test_the_help_explains_every_column_and_network(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    for word in (*NETWORKS, "held", "gathered", "a rank sends", "a node sends", "ms", "compute share", "hybrid"):
        assert word in text, word


def test_names_of_precisions() -> None:
    assert Precision(torch.bfloat16, torch.float32).name == "bf16, fp32 momentum"
    assert len(BY_NAME) == len(PRECISIONS)
