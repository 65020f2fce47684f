#!/usr/bin/env bash
# Train @{name} on @{nproc} processes of this machine under torchrun. Further settings: key.path=value arguments.
# Written by: disttrain launch --target torchrun. Start it where the config's path leads somewhere.
set -euo pipefail

run_dir=${RUN_DIR:-@{run_dir}}
@{check_run_dir}

# What another launcher left in the environment would point elsewhere.
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT
# What torchrun would choose, said here so that it does not warn.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# With one store for all attempts, ranks that were started again look for those that died.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# How long ranks may take to save after SIGTERM; torchrun's own are 30 seconds.
export PET_SHUTDOWN_TIMEOUT=@{stop}

# A standalone job has a rendezvous of its own at a free port: two of them on one machine do not meet.
exec "${PYTHON:-python}" -m torch.distributed.run --standalone --nproc-per-node @{nproc} --max-restarts @{restarts} \
  --log-dir "$run_dir/logs" --tee 3 \
  -m disttrain train @{arguments} "$@" "run.dir=$run_dir"
