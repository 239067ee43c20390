#!/usr/bin/env bash
# Sets up .venv where needed, then trains under DeepSpeed on this machine's GPUs, with lion_dist's Lion for
# `"type": "Lion"`. The first argument is a DeepSpeed config; the others go to examples/train.py. NPROC is the number of
# processes (one per GPU, or 2 on CPUs).
#
#   launch/deepspeed.sh launch/deepspeed/zero3.json --steps 500
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
config=${1:?the first argument must be a DeepSpeed config, such as launch/deepspeed/zero2.json}
shift
launch/setup

python=.venv/bin/python
$python -c 'import deepspeed' 2>/dev/null ||
    { echo "launch/deepspeed.sh: DeepSpeed is not installed: run .venv/bin/python -m pip install -e '.[deepspeed]'" >&2 && exit 1; }
nproc=${NPROC:-$($python -c 'import torch; print(torch.cuda.device_count() or 2)')}
# With offload_optimizer the step runs on the CPU.
cores=$($python -c 'import os; print(len(os.sched_getaffinity(0)))')
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > nproc ? cores / nproc : 1))}
export LOCAL_WORLD_SIZE=$nproc # torchrun sets this, DeepSpeed's launcher does not
# --no_local_rank: train.py reads LOCAL_RANK and takes no argument of that name.
exec $python -m deepspeed.launcher.runner --num_gpus "$nproc" --no_local_rank \
    examples/train.py --strategy deepspeed --deepspeed_config "$config" "$@"
