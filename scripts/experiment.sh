#!/usr/bin/env bash
# The evidence: methods and bounds in every scenario on the embedded data, three seeds, the learning rate of each method
# chosen by the same small search on the validation split, on average over scenarios. Tables, picture and every run's
# figures land in docs/RESULTS.md and docs/records/RESULTS.jsonl. What these records have already is not run again;
# without them there are some 260 runs, hours on two cores.
#
#     bash scripts/experiment.sh           runs in runs/results/; a sweep that was stopped goes on
#     known= bash scripts/experiment.sh    all anew, as after a change of the code
#
# A part, any arms, or other settings stay in runs/results/, and docs/ as it is:
#
#     arms=fedavg,feddat_llm scenarios=domain bash scripts/experiment.sh
#     bash scripts/experiment.sh OVERRIDE...
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
set_up
cd "$root"

into=
[ -n "${arms:-}${scenarios:-}$*" ] || into=docs/RESULTS.md
arms=${arms:-local,fedavg,fedprox,fednano,feddat,feddat_weak,centralised,fedavg_llm}
scenarios=${scenarios:-dirichlet,domain,function,scene,task}
known=${known-docs/records/RESULTS.jsonl}
[ -f "$known" ] || known=
fedmm sweep runs/results "arm=$arms" "scenario=$scenarios" seed=0,1,2 evaluate.every=0 evaluate.predictions=false "$@" \
    --tune optimizer.lr=3e-3,6e-3,1.2e-2 --tune-across scenario ${known:+--known "$known"}
fedmm compare runs/results ${into:+--into "$into" --records docs/records/RESULTS.jsonl}
