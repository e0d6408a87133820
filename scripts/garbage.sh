#!/usr/bin/env bash
# What it costs a rule where one of five clients sends garbage: a thousand times its change, the opposite, NaN. In a calm
# setting, where three seeds tell a few points: words that the LLM has read, everybody's mix of kinds, a low rate. Table
# and picture land in docs/GARBAGE.md. 48 runs: half an hour on two cores.
#
#     bash scripts/garbage.sh [OVERRIDE...]        runs in runs/garbage; a sweep that was stopped goes on
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
set_up
cd "$root"

calm=(partition=iid dataset.vocabulary=english dataset.test=2000 optimizer.lr=3e-3 seed=0,1,2 evaluate.every=0
    evaluate.predictions=false "$@")
fedmm sweep runs/garbage arm=local,centralised "${calm[@]}"
fedmm sweep runs/garbage arm=fedavg,median,trimmed_mean,krum fault=none,scaled,flipped,not_finite "${calm[@]}" \
    --against fault=none
[ $# -gt 0 ] || fedmm compare runs/garbage --against fault=none --into docs/GARBAGE.md --records docs/records/GARBAGE.jsonl
