"""Every snippet of README.md and docs/, as it is written. Python runs on two ranks, or on one where `Lion` is put
into a package of others; shell commands run, or their options are read by the program that they start; JSON is read.

`NOT_RUN` has the exceptions. A page's snippets run in one process of each rank (tests/snippets.py)."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lion_dist.plan.__main__ import main as plan
from tests.deepspeed.common import start_deepspeed
from tests.documents import ROOT, Fence, Page, guides, imports_of
from tests.harness import run_ranks, spawn_only
from tests.snippets import run_page, without_gpus

PAGES = guides()
LANGUAGES = {"", "text", "python", "sh", "json"}

# Shell snippets by page and first line -> why they do not run.
NOT_RUN = {
    ("README.md", "pip install git+"): "the project has no address yet",
    ("docs/hybrid.md", "torchrun --nnodes 4"): "needs four nodes",
    ("docs/hybrid.md", "#SBATCH --nodes=4"): "needs Slurm",
    ("docs/release.md", "launch/setup"): "builds a release; tests/unit/test_package.py builds and checks both files",
}
GPU = "torch.cuda.CUDAGraph()"  # what only a GPU has
# Words of a snippet -> the package that it needs without an import of its own.
NEEDED = {
    "deepspeed": "deepspeed",
    "lion_dist.huggingface": "accelerate",
    "lion_dist.lightning": "lightning",
    "BitsAndBytesConfig": "bitsandbytes",
}


def packages_of(fence: Fence) -> frozenset[str]:
    """The packages beside torch and lion_dist that a snippet needs."""
    own = {"torch", "lion_dist", *sys.stdlib_module_names}
    found = set(imports_of(fence.code).values()) - own
    return frozenset(found | {package for words, package in NEEDED.items() if words in fence.code})


def python_snippets() -> Iterator[tuple[Page, frozenset[str]]]:
    """Each page with each set of packages that some of its snippets need."""
    for page in PAGES:
        for packages in sorted({packages_of(fence) for fence in page.fences("python")}, key=sorted):
            yield page, packages


def fences_with(page: Page, packages: frozenset[str]) -> list[Fence]:
    """The snippets of a page that run on a CPU and need these packages and no others."""
    return [fence for fence in page.fences("python") if packages_of(fence) == packages and GPU not in fence.code]


def body_snippets(rank: int, world_size: int, page: Page, packages: frozenset[str], folder: Path) -> None:
    fences = fences_with(page, packages)
    if "deepspeed" in packages:
        start_deepspeed(rank, world_size)
    elif packages and world_size == 1:
        dist.destroy_process_group()  # these begin on their own
    elif packages:  # the variables of `accelerate launch --cpu`
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
        os.environ.update({name: str(value) for name, value in names.items()}, ACCELERATE_USE_CPU="true")
        os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0")
    else:
        os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", WORLD_SIZE=str(world_size))  # nodes with one GPU
    with contextlib.nullcontext() if packages else without_gpus():
        space = run_page(page, fences, folder)
    if packages == {"transformers"}:  # what the page says of the Trainer's groups
        groups = space["trainer"].optimizer.param_groups
        assert [(group["weight_decay"], group["initial_lr"]) for group in groups] == [(1.0, 1e-4), (0.0, 1e-4)]
    if "bitsandbytes" in packages:  # what it says of QLoRA's parameters
        params = set(space["model"].parameters())
        assert any(p.dtype == torch.uint8 for p in params)
        assert set(space["optimizer"].state) == {p for p in params if p.requires_grad} < params


@spawn_only  # a snippet's files are in the folder of all ranks, and packages of others leave their marks on a process
@pytest.mark.parametrize(
    ("page", "packages"),
    [pytest.param(*case, id="-".join([case[0].name, *sorted(case[1])])) for case in python_snippets()],
)
def test_python_runs(page: Page, packages: frozenset[str], tmp_path: Path) -> None:
    for package in packages:
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    alone = packages and not any("ShardedLion" in fence.code for fence in fences_with(page, packages))
    run_ranks(body_snippets, 1 if alone else 2, tmp_path, (page, packages, tmp_path), on_cpu=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_python_for_gpus_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = [(page, fence) for page in PAGES for fence in page.fences("python") if GPU in fence.code]
    assert found
    for page, fence in found:
        run_page(page, [fence], tmp_path, device="cuda")


def commands(code: str) -> Iterator[list[str]]:
    """The words of each command of a shell snippet, variables that it sets left out."""
    for line in code.replace("\\\n", "").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            del words[0]
        if words:
            yield words


def check_options_of_train(options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets examples/train.py read them: it would train for minutes, as tests/examples/test_train.py does."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    from config import Config, make_parser

    with contextlib.suppress(SystemExit) if "--help" in options else contextlib.nullcontext():
        chosen = vars(make_parser(options).parse_args(options))
        del chosen["preset"]
        Config(**chosen)


def check_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if words[0] == "sbatch":  # its own options, and then the script with its options
        words = words[words.index("launch/slurm.sbatch") :]
    if words[:3] == ["python", "-m", "lion_dist.plan"]:
        with contextlib.suppress(SystemExit) if "--help" in words else contextlib.nullcontext():
            assert plan(words[3:]) == 0
    elif words[0].startswith("launch/"):
        assert os.access(ROOT / words[0], os.X_OK) or words[0].endswith(".sbatch")
        if words[0] == "launch/deepspeed.sh":
            assert (ROOT / words[1]).is_file()
            check_options_of_train(["--strategy", "deepspeed", "--deepspeed_config", *words[1:]], monkeypatch)
        elif words[0] in ("launch/train", "launch/torchrun.sh", "launch/slurm.sbatch"):
            check_options_of_train(words[1:], monkeypatch)
    else:
        pytest.fail(f"no test knows how to run {shlex.join(words)}: add it here, or to NOT_RUN with the reason")


def reason_not_to_run(page: Page, fence: Fence) -> str | None:
    found = [why for (name, first), why in NOT_RUN.items() if name == page.name and fence.code.startswith(first)]
    return found[0] if found else None


@pytest.mark.parametrize("page", [page for page in PAGES if page.fences("sh")], ids=lambda page: page.name)
def test_shell_commands_run(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    for fence in page.fences("sh"):
        if reason_not_to_run(page, fence) is None:
            for words in commands(fence.code):
                check_command(words, monkeypatch)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_within_the_text_run(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those in backticks: the launch scripts with options, and the plan."""
    for code in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", page.prose):
        if re.match(r"([A-Z_]+=\S+ )*(launch/\S+ |sbatch |python -m lion_dist.plan )", code):
            for words in commands(code):
                check_command(words, monkeypatch)


def test_every_block_of_code_is_looked_at() -> None:
    assert {fence.language for page in PAGES for fence in page.fences()} <= LANGUAGES
    shell = [(page, fence) for page in PAGES for fence in page.fences("sh")]
    left_out = [fence for page, fence in shell if reason_not_to_run(page, fence)]
    assert len(left_out) == len(NOT_RUN), "a reason in NOT_RUN belongs to no snippet any more"
    for fence in left_out:
        if "<" not in fence.code:  # a placeholder
            subprocess.run(["bash", "-n"], input=fence.code, text=True, check=True)
