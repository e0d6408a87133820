#!/usr/bin/env bash
# Both ends of the ranges in pyproject.toml: the fast tests with the lowest version of each dependency, and the highest.
#
#     bash scripts/ranges.sh [lowest|highest]          without an argument both; 3 GB of disk each
#
# torch is the highest one both times: a lower one is a download of gigabytes. So its lower end is not tried here.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
cd "$root"
python=$(command -v python3.11 || command -v python3)

lowest() { # as constraints for pip, which has no such option
    "$python" - <<'PY'
import pathlib, re, tomllib

project = tomllib.loads(pathlib.Path("pyproject.toml").read_text())["project"]
for wanted in (*project["dependencies"], *project["optional-dependencies"]["dev"]):
    name, version = re.match(r"([\w-]+)(?:\[\w+\])?>=([\w.]+)", wanted).groups()
    if name != "torch":
        print(f"{name}=={version}")
PY
}

[ $# -gt 0 ] || set -- lowest highest
for end in "$@"; do
    folder="$state/ranges/$end"
    mkdir -p "$folder"
    case $end in
    lowest) lowest >"$folder/constraints.txt" ;;
    highest) : >"$folder/constraints.txt" ;;
    *) echo "$end: wanted lowest or highest" >&2 && exit 2 ;;
    esac
    say "installing the $end versions into $folder"
    "$python" -m venv "$folder"
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check --upgrade --upgrade-strategy eager \
        -c "$folder/constraints.txt" -e ".[dev]"
    FEDMM_VENV="$folder" bash scripts/test.sh --fast
done
