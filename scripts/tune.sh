#!/usr/bin/env bash
# How the learning rates of conf/ were chosen: the same small search for four arms, on the validation split, with a seed
# that no table uses. FedProx takes FedAvg's, FedNano-EF takes FedNano's.
#
#     bash scripts/tune.sh              results in runs/tune/
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
set_up
cd "$root"

arms="local fedavg fednano centralised" rates="3e-3 6e-3 1.2e-2"
mkdir -p runs/tune
for arm in $arms; do for rate in $rates; do echo "$arm $rate"; done; done |
    xargs -P "$(nproc)" -L 1 sh -c 'arm=$0 rate=$1; fedmm run run.at_once=1 seed=100 evaluate.split=validation \
        arm="$arm" optimizer.lr="$rate" run.dir="runs/tune/${arm}_$rate" >"runs/tune/${arm}_$rate.log" 2>&1 || exit 255'
for arm in $arms; do
    for rate in $rates; do
        say "arm=$arm optimizer.lr=$rate"
        fedmm compare "runs/tune/${arm}_$rate"
    done
done
