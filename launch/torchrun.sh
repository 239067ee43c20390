#!/usr/bin/env bash
# Trains on several nodes. Run it on every node, in any order, with the same HEAD_NODE; arguments go to
# examples/train.py. The nodes share this folder, or each has a copy. Make .venv first (launch/setup). Every rank writes
# its part of a checkpoint, so --out must be on a file system that all nodes share.
#
#   HEAD_NODE       host name or address of one of the nodes, which the others can reach; required
#   NODES           number of nodes; required
#   NPROC           processes per node (all GPUs)
#   PORT            a free port on HEAD_NODE (29400)
#   RESTARTS        number of times that a run continues by itself after a crash (0)
#   JOB             a name that no other job on HEAD_NODE and PORT uses at the time (lion)
#
#   HEAD_NODE=node1 NODES=2 launch/torchrun.sh --out runs/two-nodes --resume
#   HEAD_NODE=node1 NODES=2 launch/torchrun.sh --out runs/hybrid --strategy hybrid    FSDP2 in each node, signs between
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
: "${HEAD_NODE:?set it to the host name of one of the nodes}" "${NODES:?set it to the number of nodes}"

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Each restart gets a new store: in a shared one ranks find the addresses of processes that have ended.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec .venv/bin/python -m torch.distributed.run \
    --nnodes "$NODES" \
    --nproc_per_node "${NPROC:-gpu}" \
    --rdzv_backend c10d \
    --rdzv_endpoint "$HEAD_NODE:${PORT:-29400}" \
    --rdzv_id "${JOB:-lion}" \
    --max_restarts "${RESTARTS:-0}" \
    examples/train.py "$@"
