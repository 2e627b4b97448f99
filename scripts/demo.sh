#!/usr/bin/env bash
# The main job on the bundled model, SAEs and tasks, from nothing: environment, run, tables, report. Arguments go to main.py.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" run
cd "$project"
case " $* " in *" -h "* | *" --help "* | *" --version "*) exec "$python" main.py "$@" ;; esac
"$python" main.py --output_directory results "$@"
printf '\nWhere the time and the memory went:\n'
"$python" report.py results --resources
printf '\nEverything in one page, plots included:\n'
"$python" report.py results -o results/report.html
