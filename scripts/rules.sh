#!/usr/bin/env bash
# Rules that merge beside each other: how far their products B A are from the clients' mean, and what they answer; and
# what it costs a rule where one of five clients sends garbage. In a calm setting, so that three seeds tell a few points:
# words that the LLM has read, a low rate. Tables and picture land in docs/RULES.* and docs/GARBAGE.*.
#
#     bash scripts/rules.sh [OVERRIDE...]        runs in runs/rules and runs/garbage; a sweep that was stopped goes on
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
set_up
cd "$root"

calm=(dataset.vocabulary=english dataset.test=2000 optimizer.lr=3e-3 seed=0,1,2 evaluate.every=0 evaluate.predictions=false "$@")
fedmm sweep runs/rules scenario=dirichlet "${calm[@]}" \
    arm=fedavg,fednano,exact_lowrank,ffa_lora,rolora,flora,hetlora,fedsa_lora,feddpa,fedavgm,fedadam,fedyogi,norm_clip
fedmm sweep runs/garbage arm=fedavg,median,trimmed_mean,krum,multi_krum fault=none,scaled,flipped,not_finite \
    partition=iid "${calm[@]}" --against "FedAvg, fault=none"
[ $# -gt 0 ] || fedmm compare runs/rules --into docs/RULES.md
[ $# -gt 0 ] || fedmm compare runs/garbage --against "FedAvg, fault=none" --into docs/GARBAGE.md
