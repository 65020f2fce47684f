for one in "$@"; do
  if [[ $one == run.dir=* || ($one == run.name=* && -z ${RUN_DIR:-}) ]]; then
    echo "error: $one: the run folder is $run_dir here, as the script was written; start it with RUN_DIR=FOLDER" >&2
    exit 2
  fi
done
