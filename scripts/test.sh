#!/usr/bin/env bash
# The whole test suite, lint and types: bash scripts/test.sh [PYTEST OPTION...]
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
set_up dev
cd "$root"
if [ $# -eq 0 ]; then
    say "lint"
    ruff check .
    ruff format --check .
    say "types"
    mypy
fi
say "tests"
python -m pytest "$@"
