#!/usr/bin/env bash
# Several processes of one run on this machine:
#
#   launch/local.sh N ARGS...          python -m dtm_jax.main ARGS... in N processes
#   DEVICES_PER_PROCESS=4 launch/local.sh 2 --config=configs/quickstart.py
#
# With NVIDIA GPUs each of several processes has one of its own, and a single one has them all; DEVICES_PER_PROCESS (1)
# is for CPUs. PYTHON is the interpreter.
# Prints what process 0 says, and errors of the others behind their number. SIGTERM and Ctrl-C reach all of them.
# Exit code: 0 where all have it; else the first of 2, 3 and 143 that a process ends with, or the first other one.
set -u

grace=${GRACE_SECONDS:-60} # for the others, where one has failed
devices=${DEVICES_PER_PROCESS:-1}
python=${PYTHON:-python}

fail() {
  echo "error: $1" >&2
  exit 2
}
is_number() { case $1 in '' | *[!0-9]* | 0*) return 1 ;; esac; }

# macOS's own bash is of 2007 and does not know `exec {out}>`.
[ $((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1])) -ge 401 ] || fail "bash $BASH_VERSION is too old; brew install bash"
if [ "${1:-}" = --help ]; then
  sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
  exit 0
fi
is_number "${1:-}" || fail "usage: launch/local.sh N ARGS..., N processes"
is_number "$devices" || fail "DEVICES_PER_PROCESS=$devices is no number of devices"
count=$1
shift

gpus=0
if [ "${JAX_PLATFORMS:-}" != cpu ] && command -v nvidia-smi > /dev/null; then
  gpus=$(nvidia-smi --list-gpus 2> /dev/null | grep -c '^GPU') || true
  [ "$gpus" -eq 0 ] || [ "$count" -le "$gpus" ] || fail "$count processes, and $gpus GPUs: one each; or JAX_PLATFORMS=cpu"
fi

port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])') ||
  fail "$python does not run; activate the environment, or set PYTHON"
export JAX_COORDINATOR_ADDRESS=127.0.0.1:$port JAX_NUM_PROCESSES=$count JAX_NUM_CPU_DEVICES=$devices

pids=()
pass_on() {
  local pid
  for pid in "${pids[@]}"; do
    [ -z "$pid" ] || kill -s "$1" "$pid" 2> /dev/null
  done
}

# Behind its number, line by line; a signal to the group is for the process, whose last words are still to come.
number() {
  trap '' INT TERM
  while IFS= read -r line || [ -n "$line" ]; do printf '[%d] %s\n' "$1" "$line" >&2; done
}

readers=()
start() {
  local out
  export JAX_PROCESS_ID=$1
  [ "$gpus" -eq 0 ] || export JAX_LOCAL_DEVICE_IDS=$1
  shift
  if [ "$JAX_PROCESS_ID" -eq 0 ]; then
    "$python" -m dtm_jax.main "$@" &
  else
    exec {out}> >(number "$JAX_PROCESS_ID")
    readers+=($!)
    "$python" -m dtm_jax.main "$@" > /dev/null 2>&"$out" &
    exec {out}>&-
  fi
  pids+=($!)
}

for ((i = 0; i < count; i++)); do start "$i" "$@"; done
trap 'pass_on TERM' INT TERM

code=0 left=$count failed_at='' is_ended=''
note() {
  case $1 in
    0) ;;
    2 | 3 | 143) case $code in 2 | 3 | 143) ;; *) code=$1 ;; esac ;;
    *) [ "$code" -ne 0 ] || code=$1 ;;
  esac
}

while [ "$left" -gt 0 ]; do
  sleep 0.2
  for i in "${!pids[@]}"; do
    pid=${pids[i]}
    if [ -z "$pid" ] || kill -0 "$pid" 2> /dev/null; then continue; fi
    wait "$pid"
    status=$?
    pids[i]='' left=$((left - 1))
    [ -n "$is_ended" ] && continue
    note "$status"
    case $status in
      0 | 143) ;;
      2 | 3) failed_at=${failed_at:-$SECONDS} ;;
      *)
        failed_at=${failed_at:-$SECONDS}
        echo "error: process $i has ended with exit code $status" >&2
        ;;
    esac
  done
  # A process that waits for one that is no more does not hear SIGTERM.
  if [ -z "$is_ended" ] && [ "$left" -gt 0 ] && [ -n "$failed_at" ] && [ $((SECONDS - failed_at)) -ge "$grace" ]; then
    echo "error: $left of $count processes still ran $grace s after another had failed, and are ended" >&2
    is_ended=yes
    pass_on KILL
  fi
done
[ ${#readers[@]} -eq 0 ] || wait "${readers[@]}"
exit "$code"
