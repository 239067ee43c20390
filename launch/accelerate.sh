#!/usr/bin/env bash
# Sets up .venv where needed, then trains under Hugging Face Accelerate on this machine's GPUs. The first argument is
# fsdp1 or fsdp2 (a file in launch/accelerate); the others go to examples/accelerate_fsdp.py. NPROC is the number of
# processes, one per GPU: Accelerate has no FSDP on CPUs.
#
#   launch/accelerate.sh fsdp2 --steps 200 --out runs/accelerate
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
config=launch/accelerate/${1:-}.yaml
[[ $# -gt 0 && -f $config ]] || { echo "launch/accelerate.sh: the first argument must be fsdp1 or fsdp2" >&2; exit 2; }
shift
launch/setup

python=.venv/bin/python
$python -c 'import accelerate' 2>/dev/null ||
    { echo "launch/accelerate.sh: Accelerate is not installed: run .venv/bin/python -m pip install accelerate" >&2 && exit 1; }
nproc=${NPROC:-$($python -c 'import torch; print(torch.cuda.device_count())')}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec $python -m accelerate.commands.launch --config_file "$config" --num_processes "$nproc" \
    examples/accelerate_fsdp.py "$@"
