#!/usr/bin/env bash
# The evidence: methods and bounds in every scenario on the embedded data, three seeds, the learning rate of each chosen by
# the same small search on the validation split. Tables and picture land in docs/RESULTS.md. 330 runs,
# and one or two more where the best rate is an end of the search: hours on two cores.
#
#     bash scripts/experiment.sh [OVERRIDE...]        runs in runs/results/; a sweep that was stopped goes on
#     arms=local,fedavg,feddat scenarios=domain bash scripts/experiment.sh        a part of it, in the same folder
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
set_up
cd "$root"

arms=${arms:-local,fedavg,fedprox,fednano,fednano_ef,feddat,feddpa,fedsa_lora,fedavg_llm,feddat_llm,centralised}
scenarios=${scenarios:-dirichlet,domain,function,scene,task}
fedmm sweep runs/results "arm=$arms" "scenario=$scenarios" seed=0,1,2 evaluate.every=0 evaluate.predictions=false "$@" \
    --tune optimizer.lr=3e-3,6e-3,1.2e-2
fedmm compare runs/results --into docs/RESULTS.md
