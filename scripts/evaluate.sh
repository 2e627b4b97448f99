# Sourced by compute_*.sh and select_wikidata.sh: evaluate MODEL DATASETS [FLAGS OF main.py]...
#
#   MODEL      pythia70, pythia160 or pythia410, with the SAEs that EleutherAI published for it
#   DEMO=1     the bundled model and SAEs in their place, few rows, no network: ends in seconds
#   DRY_RUN=1  print the command and do nothing
#
# Results go to results/MODEL (of the demo, results/demo_DATASETS), what is printed also to logs/SCRIPT.log, and the exit
# code is main.py's. Later flags win, so any of those set here can be given again. Relative paths are the caller's.

project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." >/dev/null && pwd)
python="$project/.venv/bin/python"

evaluate() {
    local model=$1 datasets=$2 named flags
    shift 2
    case $model in
        pythia70) named=(pythia-70m sae-pythia-70m-32k resid_post) ;;
        pythia160) named=(pythia-160m sae-pythia-160m-32k resid_post) ;;
        pythia410) named=(pythia-410m sae-pythia-410m-65k mlp_out) ;;
        *) printf 'error: no model %s: pythia70, pythia160 or pythia410\n' "$model" >&2; return 2 ;;
    esac
    flags=(--model_name "EleutherAI/${named[0]}" --sae_name "EleutherAI/${named[1]}" --hookpoint "${named[2]}")
    flags+=(--output_directory "$project/results/$model")
    if [ "${DEMO:-0}" = 1 ]; then
        export HF_HUB_OFFLINE=1
        flags=(--layers 2,5 --shuffle_select_n 200 --repeats 2)
        flags+=(--output_directory "$project/results/demo_${datasets//,/_}")
    fi
    set -- "$python" "$project/main.py" "${flags[@]}" --datasets "$datasets" "$@"
    if [ "${DRY_RUN:-0}" = 1 ]; then
        printf '%q ' "$@"
        printf '\n'
        return
    fi
    source "$project/scripts/environment.sh" run
    logged "$project/logs/$(basename "$0" .sh).log" "$@"
}

# logged FILE COMMAND...: run it; what it prints is shown and added to the file; its exit code is returned.
logged() {
    local log=$1 status=0
    shift
    mkdir -p "$(dirname "$log")"
    printf '\n%s  %s\n' "$(date -u +%FT%TZ)" "$*" >>"$log"
    "$@" 2>&1 | tee -a -i "$log" || status=${PIPESTATUS[0]}
    return "$status"
}
