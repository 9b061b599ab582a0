#!/usr/bin/env bash
# A run on all hosts of a Cloud TPU slice, from a laptop with gcloud. See docs/launch.md.
set -euo pipefail

usage() {
  [ $# -eq 0 ] || echo "error: $1" >&2
  cat >&2 <<'END'
usage: launch/tpu_pod.sh COMMAND --name=NAME --zone=ZONE [OPTION...] [-- ARGS...]

  create --type=TYPE   a slice, such as v5litepod-64 or v6e-64
      --spot           cheaper, and taken back when it is needed elsewhere
      --queued         wait in the queue for it (to be said to `delete` too)
      --runtime=NAME   software of the hosts, where it does not follow from the type
  setup                this code and what it needs, on every host
      --nfs=HOST:/DIR  a share for data and work folders, as ~/shared of every host
  run -- ARGS...       python -m dtm_jax.main ARGS on every host, in the background
  logs                 what process 0 says, from its first line until it ends
      --worker=N       another one
  stop                 every process saves and leaves
  delete               the slice, and all that is only there

  --project=PROJECT    another one than gcloud's
  --dry_run            print each command, run none
END
  exit 2
}

# Its arguments as a shell would have to read them.
quote() {
  local word sep="" escaped="'\\''"
  for word; do
    case "$word" in
      "" | *[!A-Za-z0-9_./:=@%+,-]*) word="'${word//\'/$escaped}'" ;;
    esac
    printf %s "$sep$word"
    sep=" "
  done
}

# Prints a command, or runs it.
execute() {
  if [ -n "$dry_run" ]; then
    quote "$@"
    echo
  else
    "$@"
  fi
}

create() {
  [ -n "$type" ] || usage "--type is missing"
  [ -n "$runtime" ] || runtime=$(usual_runtime)
  [ -n "$runtime" ] || usage "what runs on --type=$type is not known here; give --runtime"
  local options=("$name" "${where[@]}" --accelerator-type="$type")
  [ -z "$spot" ] || options+=(--spot)
  if [ -n "$queued" ]; then
    execute gcloud compute tpus queued-resources create "${options[@]}" --node-id="$name" --runtime-version="$runtime"
    wait_until_active
  else
    execute gcloud compute tpus tpu-vm create "${options[@]}" --version="$runtime"
  fi
}

# https://cloud.google.com/tpu/docs/runtimes
usual_runtime() {
  case "$type" in
    v[234]-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
  esac
}

wait_until_active() {
  local ask=(gcloud compute tpus queued-resources describe "$name" "${where[@]}" --format="value(state.state)") state
  if [ -n "$dry_run" ]; then
    execute "${ask[@]}"
    return
  fi
  while state=$("${ask[@]}"); do
    echo "$(date +%T) $name: $state"
    case "$state" in
      ACTIVE) return ;;
      FAILED | SUSPENDING | SUSPENDED) break ;;
    esac
    sleep 30
  done
  echo "error: $name will not become active; delete it and create it again" >&2
  exit 1
}

setup() {
  local root archive="${TMPDIR:-/tmp}/$name.tar.gz"
  root=$(cd "$(dirname "$0")/.." && pwd)
  execute tar -czf "$archive" --exclude=__pycache__ -C "$root" dtm_jax configs setup.py pyproject.toml README.md LICENSE
  execute gcloud compute tpus tpu-vm scp "$archive" "$name:dtm_jax.tar.gz" "${where[@]}" --worker=all
  # The hosts' own Python is older than 3.11.
  on_hosts all "set -e; mkdir -p dtm_jax; tar -xzf dtm_jax.tar.gz -C dtm_jax; python3 -m pip install -q --user uv;\
 [ -d .venv ] || ~/.local/bin/uv venv -q --python=3.12 .venv;\
 ~/.local/bin/uv pip install -q --python=.venv/bin/python -e './dtm_jax[tpu]'"
  if [ -n "$nfs" ]; then
    on_hosts all "set -e; sudo apt-get install -qq -y nfs-common; mkdir -p shared;\
 mountpoint -q shared || sudo mount -t nfs $(quote "$nfs") shared"
  fi
}

run() {
  on_hosts all "if kill -0 \$(cat dtm_jax.pid 2> /dev/null) 2> /dev/null; then\
 echo 'a run is there; stop it first' >&2; exit 1; fi;\
 cd dtm_jax && { [ ! -d ../shared ] || export JAX_COMPILATION_CACHE_DIR=\$HOME/shared/compiled;\
 setsid $(quote ../.venv/bin/python -m dtm_jax.main "$@") < /dev/null >> ../dtm_jax.log 2>&1 &\
 echo \$! > ../dtm_jax.pid; }"
}

logs() { on_hosts "$worker" "tail -n +1 -F --pid=\$(cat dtm_jax.pid) dtm_jax.log"; }

stop() { on_hosts all "kill -TERM \$(cat dtm_jax.pid)"; }

delete() {
  if [ -n "$queued" ]; then
    execute gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
  else
    execute gcloud compute tpus tpu-vm delete "$name" "${where[@]}" --quiet
  fi
}

# A command line for the shells of these hosts.
on_hosts() { execute gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker="$1" --command="$2"; }

command="${1-}"
case "$command" in
  create | setup | run | logs | stop | delete) shift ;;
  "") usage ;;
  *) usage "there is no command $command" ;;
esac

name="" zone="" type="" spot="" queued="" runtime="" nfs="" worker=0 project="" dry_run=""
while [ $# -gt 0 ]; do
  case "$1" in
    --name=* | --zone=* | --type=* | --runtime=* | --nfs=* | --worker=* | --project=*)
      option=${1%%=*}
      printf -v "${option#--}" %s "${1#*=}"
      ;;
    --spot | --queued | --dry_run) printf -v "${1#--}" yes ;;
    --) shift && break ;;
    *) usage "$1 is no option; what is for dtm_jax.main goes behind --" ;;
  esac
  shift
done
[ -n "$name" ] || usage "--name is missing"
[ -n "$zone" ] || usage "--zone is missing"
[ $# -eq 0 ] || [ "$command" = run ] || usage "$command takes nothing behind --"
where=(--zone="$zone")
[ -z "$project" ] || where+=(--project="$project")

"$command" "$@"
