"""The job that `accelerate launch` starts in test_accelerate.py: examples/accelerate_fsdp.py, and then its checkpoint
loaded.

Accelerate offers FSDP on accelerators alone. Where there are none, this job claims that these processes have one, and
then goes the same ways, on gloo.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType, PartialState
from torch.distributed.tensor import DTensor

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))

from accelerate_fsdp import parse, prepare, train  # noqa: E402
from tests.asserts import assert_same_bits  # noqa: E402


def local(t: Any) -> torch.Tensor:
    return t._local_tensor if isinstance(t, DTensor) else t


def main() -> None:
    if not torch.cuda.is_available():
        PartialState(cpu=True)
        torch._C._get_accelerator = lambda *_: torch.device("cpu")  # else what torch was built for, there or not
        PartialState._shared_state |= {"distributed_type": DistributedType.MULTI_GPU, "device": torch.device("cpu")}
    options = parse()
    accelerator, model, optimizer = train(options)
    lion = optimizer.optimizer
    assert accelerator.distributed_type == DistributedType.FSDP
    version = 2 if accelerator.is_fsdp2 else 1
    params: list[Any] = list(model.parameters())
    assert params
    assert all(isinstance(p, DTensor) if version == 2 else p._fsdp_flattened for p in params)
    assert {id(p) for group in lion.param_groups for p in group["params"]} == set(map(id, params))
    before = [(local(p.detach()).clone(), local(lion.state[p]["exp_avg"]).clone()) for p in params]
    assert any(m.any() for _, m in before)
    accelerator.free_memory()
    model, optimizer = prepare(accelerator, options)  # as a run that goes on does: there is no state yet
    lion = optimizer.optimizer
    accelerator.load_state(str(options.out))
    for p, (weight, exp_avg) in zip(model.parameters(), before, strict=True):
        assert_same_bits(local(p.detach()), weight)
        assert_same_bits(local(lion.state[p]["exp_avg"]), exp_avg)
    accelerator.print(f"loaded fsdp{version}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
