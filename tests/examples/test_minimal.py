"""examples/minimal.py on two ranks: it trains, and a run that was resumed ends with the bits of one that was not."""

from __future__ import annotations

import os
import runpy
from pathlib import Path

from torch.distributed import TCPStore

from lion_dist.checkpoint import Reader, checkpoints, read_extra
from tests.harness import DEADLINE_S, processes

ROOT = Path(__file__).parents[2]


def _rank(rank: int, ports: list[int], folder: Path) -> None:
    """Runs the example as torchrun would, three times in one process: to the end, half of it, and the other half."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    os.environ.update(TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0", CUDA_VISIBLE_DEVICES="")
    main = runpy.run_path(str(ROOT / "examples/minimal.py"))["main"]
    for port, (name, steps) in zip(ports, [("whole", 60), ("parts", 30), ("parts", 60)], strict=True):
        os.environ["MASTER_PORT"] = str(port)
        (folder / name).mkdir(exist_ok=True)
        os.chdir(folder / name)
        main(steps)


def test_trains_and_resumes_with_the_same_bits(tmp_path: Path) -> None:
    # As torchrun's agent keeps one; a process group needs one that no other has used.
    stores = [TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in range(3)]
    ranks = processes(_rank, [(rank, [store.port for store in stores], tmp_path) for rank in range(2)])
    for process in ranks:
        process.join(DEADLINE_S)
        process.kill()
        process.join()
    assert [process.exitcode for process in ranks] == [0, 0]

    whole, parts = (checkpoints(tmp_path / name / "runs/minimal") for name in ("whole", "parts"))
    assert [path.name for path in whole] == ["step-50", "step-60"]
    assert [path.name for path in parts] == ["step-50", "step-60"]  # keep_last=2 of step-30, step-50 and step-60
    assert read_extra(parts[-1]) == {"step": 60}
    files = [{name: held for name, held in Reader(path[-1]).manifest.tensors.items()} for path in (whole, parts)]
    assert files[0] == files[1]  # with the checksums of every tensor
