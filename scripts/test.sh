#!/usr/bin/env bash
# Style, types and tests, from nothing. Arguments go to pytest: -m slow for those that take minutes, -m gpu on CUDA.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install dev -r requirements-dev.txt
install package --no-deps -e .
install reference --no-deps --require-hashes -r requirements-reference.txt
cd "$project"
"$python" -m ruff check --quiet .
"$python" -m ruff format --check --quiet .
"$python" -m mypy --no-error-summary
exec "$python" -m pytest "$@"
