#!/usr/bin/env bash
# The README's table: every arm on the embedded data with three seeds, each seed a run of one process.
#
#     bash scripts/experiment.sh [OVERRIDE...]        results in runs/embedded/
#
# Settings were fixed on the validation split (scripts/tune.sh) before any of these was scored on the test split.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
set_up
cd "$root"

say "three seeds, $(nproc) at a time, logs in runs/embedded/; a run that was stopped goes on"
mkdir -p runs/embedded
printf '%s\n' 0 1 2 | xargs -P "$(nproc)" -I{} sh -c 'fedmm run run.at_once=1 "$@" >runs/embedded/seed_{}.log 2>&1 || exit 255' fedmm \
    seed={} run.dir=runs/embedded/seed_{} 'compare=[local,fedavg,fedprox,fednano_ef,fedavg_plateau,centralised]' "$@"
fedmm compare runs/embedded/seed_*/
