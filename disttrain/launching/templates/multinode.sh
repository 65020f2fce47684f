#!/usr/bin/env bash
# Train @{name} on @{size}: run this same script on every node, in any order.
#
#   HEAD=10.0.0.1 bash FILE [key.path=value ...]
#
#   HEAD       name or address of the first node, as the others reach it
#   JOB_ID     what tells jobs on one head apart (default: the run's name); the port follows from it
#   PORT       in place of the one that follows from JOB_ID
#   INTERFACE  in place of the one on the route to the head
#   RUN_DIR    the run folder, on storage that all nodes share
#
# Written by: disttrain launch --target torchrun.
set -euo pipefail

head=${HEAD:-@{default_head}}
if [[ -z $head ]]; then
  echo "error: HEAD is not set: say HEAD=ADDRESS, the first node's, on every node" >&2
  exit 2
fi
job=${JOB_ID:-@{name}}
port=${PORT:-$((@{first_port} + $(cksum <<<"$job" | cut -d ' ' -f 1) % @{ports}))}
run_dir=${RUN_DIR:-@{run_dir}}
@{check_run_dir}
python=${PYTHON:-python}

# What another launcher left in the environment would point elsewhere: a shell of Slurm says 0 on each node.
unset SLURM_PROCID RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# disttrain.launching.node checks head, port and interface, waits for the other nodes (and names who is missing), tells
# gloo and nccl which interface to take, then becomes torchrun. --stop: how long ranks may take to save after SIGTERM.
exec "$python" -m disttrain.launching.node --head "$head" --port "$port" ${INTERFACE:+--interface "$INTERFACE"} \
  --nodes @{nnodes} --stop @{stop} -- \
  "$python" -m torch.distributed.run --nnodes @{nnodes} --nproc-per-node @{nproc} --max-restarts @{restarts} \
  --rdzv-backend c10d --rdzv-endpoint "$head:$port" --rdzv-id "$job" \
  --log-dir "$run_dir/logs" --tee 3 \
  -m disttrain train @{arguments} "$@" "run.dir=$run_dir"
