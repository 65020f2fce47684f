#!/usr/bin/env bash
# Train quickstart on 2 processes of this machine under torchrun. Further settings: key.path=value arguments.
# Written by: disttrain launch --target torchrun. Start it where the config's path leads somewhere.
set -euo pipefail

run_dir=${RUN_DIR:-runs/quickstart}
for one in "$@"; do
  if [[ $one == run.dir=* || ($one == run.name=* && -z ${RUN_DIR:-}) ]]; then
    echo "error: $one: the run folder is $run_dir here, as the script was written; start it with RUN_DIR=FOLDER" >&2
    exit 2
  fi
done

# What another launcher left in the environment would point elsewhere.
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT
# What torchrun would choose, said here so that it does not warn.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# With one store for all attempts, ranks that were started again look for those that died.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# How long ranks may take to save after SIGTERM; torchrun's own are 30 seconds.
export PET_SHUTDOWN_TIMEOUT=120

# A standalone job has a rendezvous of its own at a free port: two of them on one machine do not meet.
exec "${PYTHON:-python}" -m torch.distributed.run --standalone --nproc-per-node 2 --max-restarts 3 \
  --log-dir "$run_dir/logs" --tee 3 \
  -m disttrain train configs/quickstart.toml "$@" "run.dir=$run_dir"
