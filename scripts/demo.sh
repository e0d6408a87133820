#!/usr/bin/env bash
# The main job, in Flower's simulation: FedNano over five clients, and its bounds beside it.
#
#     bash scripts/demo.sh [OVERRIDE...]          e.g. bash scripts/demo.sh rounds=2 clients=3
#
# Ends with a table of zero-shot, local, FedAvg, FedNano and centralised accuracy and the path of the report.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
set_up
export FEDMM_ALLOW_TEXTS=1 # the data are drawn, nobody's

clients=5 dir="$root/runs/demo_$(date +%Y-%m-%d_%H-%M-%S)"
for override in "$@"; do
    case $override in
    clients=*) clients=${override#clients=} ;;
    run.dir=*) dir=$(realpath -m "${override#run.dir=}") ;;
    esac
done

port=$(free_port)
say "starting Flower's SuperLink for simulation on 127.0.0.1:$port"
start superlink flower-superlink --insecure --simulation --host 127.0.0.1 --port "$port"
connect demo "$port"

cores=$(nproc)
run_app demo "$dir" \
    "num-supernodes=$clients client-resources-num-cpus=1 init-args-num-cpus=$((cores < clients ? cores : clients))" \
    arm=fednano 'compare=[local,fedavg,centralised]' "$@"
