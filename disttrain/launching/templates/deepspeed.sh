#!/usr/bin/env bash
# Train @{name} on @{size}, started by the deepspeed launcher over ssh: run it on one
# node, from which the others take ssh without a password. Further settings: key.path=value arguments.
# The launcher is DeepSpeed's, the training engine is disttrain's own.
@{about}
#
# Written by: disttrain launch --target deepspeed.
set -euo pipefail

run_dir=${RUN_DIR:-@{run_dir}}
@{check_run_dir}
job=${JOB_ID:-@{name}}
port=${PORT:-$((@{first_port} + $(cksum <<<"$job" | cut -d ' ' -f 1) % @{ports}))}
@{check}

# --no_local_rank: ranks know themselves by LOCAL_RANK. Each of them looks for its interface before it starts.
exec deepspeed @{hosts} --master_port "$port" \
  @{exclude}
  --no_local_rank --module disttrain.launching.node --wait 0 \
  "${PYTHON:-python}" -m disttrain train @{arguments} "$@" "run.dir=$run_dir"
