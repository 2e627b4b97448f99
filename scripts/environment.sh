# Sourced by the other scripts: makes .venv beside the project, installs into it what is missing, sets $python.
# Argument: `run` for what a run needs, `dev` for the tests too. A second call finds that nothing is missing.

project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python="$project/.venv/bin/python"

say() { printf '%s\n' "$*" >&2; }

make_venv() {
    command -v python3 >/dev/null || { say "error: python3 (3.11 or newer) is needed"; exit 2; }
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { say "error: Python 3.11 or newer is needed, found $(python3 --version)"; exit 2; }
    # Debian's bare python3 has no venv module; as root it is one package away.
    if ! python3 -c 'import venv, ensurepip' 2>/dev/null; then
        [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || { say "error: python3-venv is missing: sudo apt-get install python3-venv"; exit 2; }
        say "installing python3-venv"
        { apt-get update -qq && apt-get install -y -qq python3-venv; } >/dev/null || { say "error: python3-venv could not be installed"; exit 2; }
    fi
    # The newest pip: Python 3.11's takes twice as long for all this.
    python3 -m venv --clear --upgrade-deps "$project/.venv" >/dev/null
}

# install STAMP PIP_ARGUMENTS...: run pip once for each state of the requirement files and of pyproject.toml.
install() {
    local stamp="$project/.venv/.installed-$1" state
    shift
    state=$(cat "$project"/requirements*.txt "$project"/pyproject.toml; "$python" --version)
    [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$state" ] && return
    say "installing: pip install $*"
    (cd "$project" && "$python" -m pip install --disable-pip-version-check -q --no-compile "$@")
    installed=yes
    printf '%s\n' "$state" >"$stamp"
}

# A small run makes Python compile what a run imports, and Numba its loops: all 20,000 files that pip installs would take
# a minute.
compile() {
    local results="$project/.venv/small_run"
    say "compiling: main.py on 120 rows"
    "$python" "$project/main.py" --datasets gender --shuffle_select_n 120 --layers 3 --repeats 2 --quiet --output_directory "$results"
    rm -r "$results"
}

installed=
unset PYTHONDONTWRITEBYTECODE  # what is compiled stays in .venv
"$python" -c '' 2>/dev/null || make_venv
if [ "$1" = dev ]; then
    install dev -r requirements.txt -r requirements-dev.txt
    install package --no-deps --no-build-isolation -e .
    install reference --no-deps --require-hashes -r requirements-reference.txt
else
    install run -r requirements.txt
fi
[ -z "$installed" ] || compile
