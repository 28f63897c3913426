#!/bin/sh
# Bring up a Slurm of one machine in a directory, without systemd: one-machine.sh DIRECTORY
# Debian's packages: slurm-wlm munge. "one-machine.sh DIRECTORY stop" ends it.
set -eu
PATH=$PATH:/usr/sbin:/sbin
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1" && chmod 755 "$1"
place=$(cd "$1" && pwd)
if [ "${2:-}" = stop ]; then
    for daemon in slurmctld slurmd munge; do
        [ ! -f "$place/$daemon.pid" ] || kill "$(cat "$place/$daemon.pid")" || true
    done
    exit
fi
mkdir -p "$place/state" "$place/spool"
if [ ! -f "$place/munge.key" ]; then
    (umask 077 && head -c 1024 /dev/urandom > "$place/munge.key")
fi
memory=$(awk '/^MemTotal/ {print int($2 / 1024 * 0.9)}' /proc/meminfo)
sed -e "s#@HOST@#$(hostname -s)#; s#@USER@#$(id -un)#; s#@PLACE@#$place#" \
    -e "s#@CPUS@#$(nproc)#; s#@MEMORY@#$memory#" "$here/slurm.conf" > "$place/slurm.conf"
munged --force --key-file="$place/munge.key" --socket="$place/munge.socket" \
    --pid-file="$place/munge.pid" --log-file="$place/munge.log" --seed-file="$place/munge.seed"
slurmctld -f "$place/slurm.conf"
slurmd -f "$place/slurm.conf" -N localhost
echo "export SLURM_CONF=$place/slurm.conf"
