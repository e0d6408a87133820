#!/usr/bin/env bash
# The tests that are too long for each change: bash scripts/nightly.sh [PYTEST OPTION...]
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
set_up dev
cd "$root"
python -m pytest -n 2 --dist worksteal -m nightly "$@"
