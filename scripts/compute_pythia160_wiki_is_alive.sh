#!/usr/bin/env bash
# Pythia-160M and EleutherAI's SAEs on its residual stream, dataset is_alive.
# Flags of main.py may follow; DEMO=1 and DRY_RUN=1: evaluate.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/evaluate.sh"
evaluate pythia160 is_alive "$@"
