#!/usr/bin/env bash
# Lint, types and tests on two cores: all tiers but nightly. With pytest's options it runs tests only.
#
#     bash scripts/test.sh [--fast] [PYTEST OPTION...]     --fast: only the unit tier
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
set_up dev
cd "$root"
tiers=(-m "not nightly")
if [ "${1:-}" = --fast ]; then
    tiers=() # pyproject.toml chooses the unit tier
    shift
fi
if [ $# -eq 0 ]; then
    say "lint"
    ruff check .
    ruff format --check .
    say "types"
    mypy
fi
say "tests"
python -m pytest -n 2 --dist worksteal "${tiers[@]}" "$@" # the last -n and the last -m win
