#!/usr/bin/env bash
# How the learning rates of conf/arm/ were chosen: the same small search for every arm, on the validation split, with a
# seed that no table uses.
#
#     bash scripts/tune.sh [OVERRIDE...]              results in runs/tune/
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
set_up
cd "$root"

mkdir -p runs/tune
printf '%s\n' 1e-3 3e-3 1e-2 | xargs -P "$(nproc)" -I{} sh -c 'fedmm run "$@" >runs/tune/lr_{}.log 2>&1 || exit 255' fedmm \
    seed=100 evaluate.split=validation optimizer.lr={} run.dir=runs/tune/lr_{} \
    'compare=[local,fedavg,fedprox,fednano_ef,centralised]' "$@"
for lr in 1e-3 3e-3 1e-2; do
    say "optimizer.lr=$lr"
    fedmm compare "runs/tune/lr_$lr"
done
