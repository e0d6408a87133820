#!/usr/bin/env bash
# A real deployment on one machine: a server and two sites, as docs/DEPLOYMENT.md sets them up on real machines.
#
#     bash scripts/loopback.sh [OVERRIDE...]      e.g. bash scripts/loopback.sh rounds=2
#
# TLS everywhere, a key for each site, and a gate in front of the SuperLink. The keys are new each time.
source "$(dirname "${BASH_SOURCE[0]}")/deploy.sh"
set_up
export FEDMM_ALLOW_TEXTS=1 # the sites' data are drawn, not theirs

dir="$root/runs/loopback_$(date +%Y-%m-%d_%H-%M-%S)"
for override in "$@"; do
    case $override in run.dir=*) dir=$(realpath -m "${override#run.dir=}") ;; esac
done

deploy="$root/scripts/deploy.sh" fleet="$state/fleet" port=$(free_port) door=$(free_port)
rm -rf "$fleet"
say "making keys in $fleet"
server_keys "$fleet"
for client in 0 1; do
    site_keys "$fleet/site_$client"
    cp "$fleet/ca.crt" "$fleet/site_$client"
done

say "starting a SuperLink, its gate on 127.0.0.1:$door and two SuperNodes; their logs are in $state/log"
start superlink bash "$deploy" superlink "$fleet" "$port"
start gate bash "$deploy" gate "$fleet" "127.0.0.1:$door" "$port"
connect fleet "$port" "$fleet/ca.crt"
for client in 0 1; do
    register "$fleet" "$port" "$fleet/site_$client/node.pub" "site-$client"
    start "supernode_$client" bash "$deploy" supernode "$fleet/site_$client" "127.0.0.1:$door" "$client" "$(free_port)"
done

run "$fleet" "$port" "$dir" clients=2 "$@"
