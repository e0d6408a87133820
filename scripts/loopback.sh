#!/usr/bin/env bash
# A real deployment on one machine: a SuperLink and two SuperNodes, each client message a process of its own.
#
#     bash scripts/loopback.sh [OVERRIDE...]      e.g. bash scripts/loopback.sh rounds=2
#
# The commands are those of real machines but for TLS and node keys, which README.md adds.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
set_up

dir="$root/runs/loopback_$(date +%Y-%m-%d_%H-%M-%S)"
for override in "$@"; do
    case $override in run.dir=*) dir=$(realpath -m "${override#run.dir=}") ;; esac
done

port=$(free_port)
say "starting a SuperLink on 127.0.0.1:$port and two SuperNodes"
start superlink flower-superlink --insecure --host 127.0.0.1 --port "$port"
connect site "$port"
for client in 0 1; do
    start "supernode_$client" flower-supernode --insecure --superlink "127.0.0.1:$port" \
        --host 127.0.0.1 --port "$(free_port)" --node-config "partition-id=$client num-partitions=2"
done

run_app site "$dir" "" clients=2 link.tls=always "$@"
