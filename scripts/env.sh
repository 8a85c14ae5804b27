# Sourced by the scripts beside it: moves to the project's folder and makes its .venv.
#
#   need run     the package itself
#   need dev     the package, and what it is tested and checked with
#
# Nothing is installed outside .venv.  It is made anew only where pyproject.toml has changed.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

find_python() {
  local python
  for python in python3.11 python3.12 python3.13 python3.14 python3; do
    if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$python"
      return
    fi
  done
  echo "zflake needs Python 3.11 or newer, and none is on PATH" >&2
  return 1
}

need() {
  local what=$1 stamp=.venv/installed-$1 python
  if [[ -f $stamp ]] && cmp -s pyproject.toml "$stamp"; then
    return
  fi
  if [[ ! -x .venv/bin/python ]]; then
    python=$(find_python)
    echo "making .venv with $("$python" --version) ..." >&2
    if ! "$python" -m venv .venv >&2; then
      rm -rf .venv
      echo "can't make a virtual environment; on Debian install the package python3-venv" >&2
      return 1
    fi
  fi
  case $what in
    run) .venv/bin/python -m pip install --quiet --editable . >&2 ;;
    dev) .venv/bin/python -m pip install --quiet --editable '.[dev]' >&2 ;;
  esac
  cp pyproject.toml "$stamp"
}
