#!/usr/bin/env bash
# Rules for low-rank adapters and rules on the server, beside the plain mean: accuracy, bytes, and how far what a rule
# makes is from the mean of the clients' products. In a calm setting, where three seeds tell a few points: words that the
# LLM has read; clients have other shares of the kinds of question. The rate of each is chosen by the search that the other
# tables have. Table and picture land in docs/RULES.md. Some 100 runs: an hour on two cores.
#
#     bash scripts/rules.sh [OVERRIDE...]        runs in runs/rules; a sweep that was stopped goes on
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
set_up
cd "$root"

fedmm sweep runs/rules seed=0,1,2 scenario=dirichlet dataset.vocabulary=english dataset.test=2000 \
    arm=fedavg,fednano,exact_lowrank,flora,hetlora,ffa_lora,rolora,fedsa_lora,feddpa,fedavgm,fedadam,fedyogi,norm_clip,local,centralised,fedavg_llm \
    evaluate.every=0 evaluate.predictions=false "$@" --tune optimizer.lr=3e-3,6e-3,1.2e-2
[ $# -gt 0 ] || fedmm compare runs/rules --into docs/RULES.md
