# status.json decides: exit codes of torchrun and srun hide those of the ranks. One that this start has not written says
# nothing about it.
state="no status.json of this start"
if [[ $run_dir/status.json -nt $began ]]; then
  state=$(sed -n 's/^ *"state": "\([a-z]*\)".*/\1/p' "$run_dir/status.json")
fi
# A job without a limit has all the time there is.
left=$((${SLURM_JOB_END_TIME:-99999999999} - $(date +%s)))
echo "run folder $run_dir: $state; exit code $code, $left s before the time limit"
case $state in
  completed) exit 0 ;;
  preempted)
    # Again where the time limit was the reason; whoever stopped the run by hand wants it to stay stopped.
    if ((left < @{near})); then
      scontrol requeue "$SLURM_JOB_ID"
    fi
    exit 0
    ;;
  "no status"*) exit "$code" ;;
  *) exit $((code == 0 ? 1 : code)) ;;
esac
