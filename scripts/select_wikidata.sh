#!/usr/bin/env bash
# All five Wikidata datasets for one model, in one forward pass: select_wikidata.sh pythia70|pythia160|pythia410
# [FLAGS OF main.py]... DEMO=1, DRY_RUN=1: evaluate.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/evaluate.sh"
[ $# -gt 0 ] || { echo "usage: select_wikidata.sh pythia70|pythia160|pythia410 [FLAGS OF main.py]..." >&2; exit 2; }
evaluate "$1" gender,occupation,politics,athlete,is_alive "${@:2}"
