#!/usr/bin/env bash
# MLLM-FL's evidence: its stages, their controls and CReFF on long-tailed digits, imbalance 10 and 50, three seeds. Table and
# picture land in docs/LONG_TAIL.md. 48 runs: two hours on two cores (estimate).
#
#     bash scripts/long_tail.sh [OVERRIDE...]        runs in runs/long_tail/; a sweep that was stopped goes on
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
set_up
cd "$root"

arms=${arms:-fedavg,mllmfl,fedavg_pretrained,balanced_tuning,creff,mllmfl_not_pretrained,mllmfl_at_server,mllmfl_unlabelled}
fedmm sweep runs/long_tail experiment=mllmfl_embedded "arm=$arms" dataset.imbalance=50,10 seed=0,1,2 evaluate.every=0 "$@"
fedmm compare runs/long_tail --into docs/LONG_TAIL.md
