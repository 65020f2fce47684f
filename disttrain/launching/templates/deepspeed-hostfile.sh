hostfile=${HOSTFILE:-hostfile}
if [[ ! -f $hostfile ]]; then
  echo "error: there is no $hostfile: write a line 'NAME slots=@{nproc}' for each node, or set HOSTFILE" >&2
  exit 2
fi
