# What the scripts share: an environment of this checkout's own, and Flower kept inside it. Sourced, not run.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv="${FEDMM_VENV:-$root/.venv}" # FEDMM_VENV: an environment that has the package already
state="${FEDMM_STATE:-$root/.fedmm}" # Flower's home, logs, the cache of frozen modules, loopback.sh's keys
export PATH="$venv/bin:$PATH"
export FEDMM_HOME="${FEDMM_HOME:-$state/cache}" FLWR_HOME="$state/flower"
export FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 RAY_USAGE_STATS_ENABLED=0
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1 # the app runs in this environment, not in one Flower makes per run
export TOKENIZERS_PARALLELISM=false

say() { printf '\033[1m==> %s\033[0m\n' "$*"; }

# set_up [EXTRA]: .venv with the package (and an extra) in it; does nothing where pyproject.toml has not changed.
set_up() {
    local extra=${1:-} want python
    [ -z "${FEDMM_VENV:-}" ] || return 0
    want=$(cksum <"$root/pyproject.toml")
    for stamp in "$root/.venv/.fedmm-dev" "$root/.venv/.fedmm-$extra"; do # dev holds everything
        [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ] && return
    done
    python=$(command -v python3.11 || command -v python3)
    say "installing into .venv (once; a few minutes)"
    [ -x "$root/.venv/bin/python" ] || "$python" -m venv "$root/.venv"
    "$root/.venv/bin/python" -m pip install --quiet --disable-pip-version-check -e "$root${extra:+[$extra]}"
    printf '%s' "$want" >"$root/.venv/.fedmm-$extra"
}

free_port() { python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

# start NAME COMMAND...: in the background, its output in a log; it ends with this script, and so do its own processes.
pids=()
start() {
    local name=$1
    shift
    mkdir -p "$state/log"
    set -m # a process group of its own
    "$@" >"$state/log/$name.log" 2>&1 &
    set +m
    pids+=($!)
}
end_all() {
    local pid
    stop_run
    for pid in "${pids[@]}"; do kill -- "-$pid" 2>/dev/null || true; done
    for pid in "${pids[@]}"; do
        wait "$pid" 2>/dev/null || true
        for _ in $(seq 50); do kill -0 -- "-$pid" 2>/dev/null && sleep 0.2 || break; done
        kill -KILL -- "-$pid" 2>/dev/null || true
    done
}
trap end_all EXIT

# connect NAME PORT [CA]: let `flwr run APP NAME` find the SuperLink on this port, and wait until it answers.
connect() {
    export FLWR_HOME="$state/flower/$1-$2" # another deployment's connection is another file
    mkdir -p "$FLWR_HOME"
    toml "superlink.default=$1" "superlink.$1.address=127.0.0.1:$2" \
        ${3:+"superlink.$1.root-certificates=$(realpath "$3")"} >"$FLWR_HOME/config.toml"
    [ -n "${3:-}" ] || echo "insecure = true" >>"$FLWR_HOME/config.toml" # of the last table
    for _ in $(seq 120); do
        python -c "import socket; socket.create_connection(('127.0.0.1', $2), 1)" 2>/dev/null && return
        sleep 0.5
    done
    say "the SuperLink did not start; see $state/log/superlink.log"
    return 1
}

toml() { # NAME.OF.A.STRING=VALUE..., quoted as TOML wants it
    python - "$@" <<'PYTHON'
import sys, tomli_w
tree = {}
for word in sys.argv[1:]:
    name, _, value = word.partition("=")
    *tables, last = name.split(".")
    at = tree
    for table in tables:
        at = at.setdefault(table, {})
    at[last] = value
print(tomli_w.dumps(tree), end="")
PYTHON
}

# run_app NAME DIR FEDERATION OVERRIDE...: one run of the app, watched from its folder. Fails where the run failed.
run_app() {
    local name=$1 dir=$2 federation=$3 overrides
    shift 3
    overrides=$(python -c 'import shlex, sys; print(shlex.join(sys.argv[1:]))' "$@" "run.dir=\"$dir\"")
    mkdir -p "$state/log" && cd "$state" # not in the project's folder: workers would import it instead of the bundle
    log="$state/log/flwr_$$.log" # this run's own, as another may go on beside it
    toml "overrides=$overrides" >"${log%.log}.toml"
    say "flwr run with $overrides"
    start "flwr_$$" flwr run "$root" "$name" --stream ${federation:+--federation-config "$federation"} \
        --run-config "${log%.log}.toml"
    running=$name
    fedmm watch "$dir" --pid "${pids[-1]}" || {
        tail -n 30 "$log"
        say "the run failed; the whole log is $log"
        return 1
    }
    running=""
}

running="" # the connection of a run that nobody has seen finish
stop_run() { # the server goes on with it otherwise, as `flwr run` only starts and shows it
    local id=""
    [ -n "$running" ] || return 0
    for _ in $(seq 50); do # it may be on its way
        id=$(sed -n 's/.*started run \([0-9]*\).*/\1/p' "$log" | head -n 1)
        [ -z "$id" ] && kill -0 "${pids[-1]}" 2>/dev/null && sleep 0.2 || break
    done
    [ -z "$id" ] || flwr stop "$id" "$running" >>"$log" 2>&1 || true # it may have ended by itself
    running=""
}
