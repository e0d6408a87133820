#!/usr/bin/env bash
# MLLM-FL's evidence: its stages, their controls and CReFF on long-tailed digits, imbalance 10 and 50, three seeds; what its
# texts are worth; and NanoEdges through the LLM in the place of a classifier. Tables and picture land in
# docs/LONG_TAIL.md. 66 runs: three hours on two cores (estimate).
#
#     bash scripts/long_tail.sh [OVERRIDE...]        runs in runs/long_tail*/; a sweep that was stopped goes on
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
set_up
cd "$root"

arms=fedavg,mllmfl,fedavg_pretrained,balanced_tuning,creff,mllmfl_not_pretrained,mllmfl_at_server,mllmfl_unlabelled
common=(experiment=mllmfl_embedded seed=0,1,2 evaluate.every=0 "$@")
fedmm sweep runs/long_tail "arm=$arms" dataset.imbalance=50,10 "${common[@]}"
fedmm sweep runs/long_tail arm=fedavg_distilled,mllmfl_oracle 'data="long_tail, dataset.imbalance=50"' "${common[@]}"
fedmm sweep runs/long_tail_llm arm=fedavg,fedavg_pretrained,balanced_tuning,mllmfl head=llm 'data="long_tail, head=llm"' \
    rounds=8 epochs=2 "${common[@]}"
fedmm compare runs/long_tail runs/long_tail_llm --into docs/LONG_TAIL.md --records docs/records/LONG_TAIL.jsonl
