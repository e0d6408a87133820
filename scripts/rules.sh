#!/usr/bin/env bash
# Rules for low-rank adapters and rules on the server, beside the plain mean: accuracy, bytes, and how far what a rule
# makes is from the mean of the clients' products. In a calm setting, where three seeds tell a few points: words that the
# LLM has read; clients have other shares of the kinds of question. The rate of each is chosen by the search that the other
# tables have; of a rule with a rate of its own that one is, and of LoRA in the LLM, which wants higher ones, beyond them.
# Table and picture land in docs/RULES.md. Some 120 runs: an hour and a half on two cores.
#
#     bash scripts/rules.sh [OVERRIDE...]        runs in runs/rules; a sweep that was stopped goes on
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
set_up
cd "$root"

sweep() {
    fedmm sweep runs/rules seed=0,1,2 scenario=dirichlet dataset.vocabulary=english dataset.test=2000 evaluate.every=0 \
        evaluate.predictions=false "$@"
}
lowrank=fedavg,fednano,exact_lowrank,flora,hetlora,ffa_lora,rolora,fedsa_lora,feddpa
sweep "arm=$lowrank,norm_clip,local,centralised" "$@" --tune optimizer.lr=3e-3,6e-3,1.2e-2
sweep arm=fedavgm optimizer.lr=6e-3 "$@" --tune rule.lr=0.03,0.1,0.3
sweep arm=fedadam,fedyogi optimizer.lr=6e-3 "$@" --tune rule.lr=3e-4,1e-3,3e-3
sweep arm=fedavg_llm "$@" --tune optimizer.lr=1.2e-2,2.4e-2,4.8e-2
[ $# -gt 0 ] || fedmm compare runs/rules --into docs/RULES.md --records docs/records/RULES.jsonl
