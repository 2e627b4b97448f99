# Sourced by the other scripts: makes .venv beside the project, installs what is missing into it, sets $python.
# A second call finds that what is required has not changed and installs nothing.

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
    python3 -m venv --clear "$project/.venv"
}

# install STAMP PIP_ARGUMENTS...: run pip once for each state of the requirement files and of pyproject.toml.
install() {
    local stamp="$project/.venv/.installed-$1" state
    shift
    state=$(cat "$project"/requirements*.txt "$project"/pyproject.toml; "$python" --version)
    [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$state" ] && return
    say "installing: pip install $*"
    (cd "$project" && "$python" -m pip install --disable-pip-version-check -q "$@")
    printf '%s\n' "$state" >"$stamp"
}

"$python" -c '' 2>/dev/null || make_venv
install run -r requirements.txt
