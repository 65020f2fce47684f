#!/usr/bin/env bash
# Train on the processes of this machine under torchrun.
set -euo pipefail

if [[ $# -lt 2 ]]; then
  cat >&2 <<USAGE
usage: launch/local.sh STRATEGY NPROC [key.path=value ...]

  STRATEGY  ddp, zero1, zero2, fsdp or hsdp (with parallel.dp_replicate=N)
  NPROC     processes on this machine
  CONFIG    environment variable: the config to train, by default configs/quickstart.toml

example: launch/local.sh fsdp 2 train.steps=100
USAGE
  exit 2
fi

strategy=$1 nproc=$2
shift 2
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
config=${CONFIG:-$root/configs/quickstart.toml}

torchrun=torchrun
if [[ -x $root/.venv/bin/torchrun ]]; then
  torchrun=$root/.venv/bin/torchrun
fi

# The package is found without being installed, whatever the working directory is.
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
# A standalone run has its own rendezvous: what another launcher left in the environment would point elsewhere.
unset MASTER_ADDR MASTER_PORT RANK WORLD_SIZE LOCAL_RANK
# What torchrun would choose, said here so that it does not warn.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
name=$(basename "$config" .toml)

exec "$torchrun" --standalone --nproc-per-node "$nproc" -m disttrain train "$config" \
  "parallel.strategy=$strategy" "run.name=$name-$strategy" "$@"
