#!/usr/bin/env bash
# How optimizer.lr was chosen: the same small search for four arms, on the validation split, with a seed that no table
# uses. FedProx and FedNano-EF take FedAvg's and FedNano's.
#
#     bash scripts/tune.sh [OVERRIDE...]              results in runs/tune/
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
set_up
cd "$root"

mkdir -p runs/tune
printf '%s\n' 3e-3 6e-3 1.2e-2 | xargs -P "$(nproc)" -I{} sh -c 'fedmm run run.at_once=1 "$@" >runs/tune/lr_{}.log 2>&1 || exit 255' fedmm \
    seed=100 evaluate.split=validation optimizer.lr={} run.dir=runs/tune/lr_{} \
    'compare=[local,fedavg,centralised]' "$@"
for lr in 3e-3 6e-3 1.2e-2; do
    say "optimizer.lr=$lr"
    fedmm compare "runs/tune/lr_$lr"
done
