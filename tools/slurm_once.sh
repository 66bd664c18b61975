#!/usr/bin/env bash
# A real Slurm of one node in a temporary folder, for as long as one command runs.
set -euo pipefail

usage() {
  cat <<'HELP'
Usage: tools/slurm_once.sh [--install] [--cpus N] [COMMAND...]

Starts munged, slurmctld and slurmd on this machine, runs COMMAND with SLURM_CONF set, and stops all of them. Without a
COMMAND it runs the tests that need a Slurm. Needs root and Debian's slurm-wlm and munge. Ports, keys and logs are its own; a
Slurm that the machine has already is left alone.

  --install   install the two packages where they are missing
  --cpus N    cores that Slurm may give away (default: 4, whether the machine has them or not)

    tools/slurm_once.sh --install                                          # the tests
    tools/slurm_once.sh ./run.sh --conf debug --launcher slurm             # a recipe; slurm.yaml must ask for no GPU
HELP
}

fail() { echo "error: tools/slurm_once.sh: $1; $2" >&2; exit 2; }

cpus=4 install=''
while (($#)); do
  case $1 in
    --help) usage; exit 0 ;;
    --install) install=yes; shift ;;
    --cpus)
      (($# > 1)) || fail "--cpus needs a number" "see --help"
      [[ $2 =~ ^[1-9][0-9]?$ ]] || fail "--cpus needs a number, got '$2'" "see --help"
      cpus=$2
      shift 2
      ;;
    --) shift; break ;;
    -*) fail "unknown option $1" "see --help" ;;
    *) break ;;
  esac
done
(($#)) || set -- "$(dirname "$0")/../.venv/bin/pytest" --rootdir "$(dirname "$0")/.." -m slurm "$(dirname "$0")/../test"
((EUID == 0)) || fail "needs root" "run it in a container or a virtual machine of yours"

export PATH="$PATH:/usr/sbin"
missing=''
for program in munged slurmctld slurmd sbatch srun squeue; do
  command -v "$program" >/dev/null || missing+=" $program"
done
if [[ -n $missing ]]; then
  [[ -n $install ]] || fail "there is no$missing" "add --install, or apt-get install slurm-wlm munge"
  # no daemon is to start by itself: ours have folders of their own
  export DEBIAN_FRONTEND=noninteractive RUNLEVEL=1
  { apt-get update && apt-get install -y --no-install-recommends slurm-wlm munge; } >&2
fi

folder=$(mktemp -d /tmp/slurm_once.XXXXXX)
export SLURM_CONF=$folder/slurm.conf
daemons=()
stop() {
  local daemon environment
  # jobs first: they are no children of ours
  if [[ -S $folder/munge/socket ]]; then
    timeout 10 scancel --user=root 2>/dev/null || true
    for _ in {1..40}; do
      [[ -n $(timeout 5 squeue --noheader 2>/dev/null || true) ]] || break
      sleep 0.5
    done
  fi
  for daemon in "${daemons[@]}"; do kill "$daemon" 2>/dev/null || true; done
  wait || true
  # what is left of a job that did not end: its processes, and no others, began with this SLURM_CONF
  for environment in /proc/[0-9]*/environ; do
    if grep -qzxF "SLURM_CONF=$SLURM_CONF" "$environment" 2>/dev/null; then
      environment=${environment%/environ}
      kill -KILL "${environment#/proc/}" 2>/dev/null || true
    fi
  done
  rm -rf "$folder"
}
trap stop EXIT
trap 'exit 75' INT TERM

free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

mkdir -p "$folder"/{munge,state,spool}
chmod 755 "$folder" "$folder/munge"
(umask 377 && head -c 1024 /dev/urandom >"$folder/munge/key")
name=$(hostname -s)
cat >"$SLURM_CONF" <<CONF
ClusterName=once
SlurmctldHost=$name(127.0.0.1)
SlurmctldPort=$(free_port)
SlurmdPort=$(free_port)
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$folder/munge/socket,cred_expire=5
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2
ReturnToService=2
KillWait=5
SlurmdParameters=config_overrides
MpiDefault=none
NodeName=$name NodeAddr=127.0.0.1 CPUs=$cpus RealMemory=$(($(free -m | awk '/^Mem:/ {print $2}') - 512)) State=UNKNOWN
PartitionName=all Nodes=$name Default=YES MaxTime=INFINITE State=UP
CONF

# in sessions of their own: a signal to our group must not end them before they have ended the jobs
setsid munged --foreground --force --key-file="$folder/munge/key" --socket="$folder/munge/socket" --pid-file="$folder/munge/pid" \
  --seed-file="$folder/munge/seed" >"$folder/munge/log" 2>&1 &
daemons+=("$!")
for _ in {1..50}; do
  [[ ! -S $folder/munge/socket ]] || break
  sleep 0.1
done
setsid slurmctld -D -f "$SLURM_CONF" >/dev/null 2>&1 &
daemons+=("$!")
setsid slurmd -D -f "$SLURM_CONF" >/dev/null 2>&1 &
daemons+=("$!")
for ((tenth = 0; ; tenth++)); do
  [[ $(timeout 5 sinfo --noheader --format=%T 2>/dev/null || true) != idle ]] || break
  ((tenth < 300)) || { tail -n 20 "$folder"/*.log "$folder/munge/log" >&2; fail "Slurm did not start in 30 s" "see the lines above"; }
  sleep 0.1
done

"$@" &
command=$!
trap 'kill -TERM "$command" 2>/dev/null; wait "$command" || true; exit 75' INT TERM
wait "$command"
