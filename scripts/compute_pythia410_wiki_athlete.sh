#!/usr/bin/env bash
# Pythia-410M and EleutherAI's SAEs on the outputs of its MLPs, dataset athlete.
# Flags of main.py may follow; DEMO=1 and DRY_RUN=1: evaluate.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/evaluate.sh"
evaluate pythia410 athlete "$@"
