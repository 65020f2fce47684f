#!/usr/bin/env bash
# Train quickstart on 2 nodes with 2 processes each, started by the deepspeed launcher over ssh: run it on one
# node, from which the others take ssh without a password. Further settings: key.path=value arguments.
# The launcher is DeepSpeed's, the training engine is disttrain's own.
#
#   HOSTFILE  a line `NAME slots=2` for each node, the head first; default: hostfile
#
# Written by: disttrain launch --target deepspeed.
set -euo pipefail

run_dir=${RUN_DIR:-runs/quickstart}
for one in "$@"; do
  if [[ $one == run.dir=* || ($one == run.name=* && -z ${RUN_DIR:-}) ]]; then
    echo "error: $one: the run folder is $run_dir here, as the script was written; start it with RUN_DIR=FOLDER" >&2
    exit 2
  fi
done
job=${JOB_ID:-quickstart}
port=${PORT:-$((20000 + $(cksum <<<"$job" | cut -d ' ' -f 1) % 10000))}
hostfile=${HOSTFILE:-hostfile}
if [[ ! -f $hostfile ]]; then
  echo "error: there is no $hostfile: write a line 'NAME slots=2' for each node, or set HOSTFILE" >&2
  exit 2
fi

# --no_local_rank: ranks know themselves by LOCAL_RANK. Each of them looks for its interface before it starts.
exec deepspeed --hostfile "$hostfile" --master_port "$port" \
  --no_local_rank --module disttrain.launching.node --wait 0 \
  "${PYTHON:-python}" -m disttrain train configs/quickstart.toml "$@" "run.dir=$run_dir"
