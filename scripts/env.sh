# Sourced by the scripts beside it: moves to the project's folder and makes its .venv.
#
#   need run     the package itself
#   need dev     the package with all its extras, and the dependency group `dev`: what it is tested and checked with
#
# Nothing is installed outside .venv, and only when pyproject.toml has changed since.

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

# make_venv DIR PYTHON: a virtual environment whose pip knows dependency groups
make_venv() {
  echo "making $1 with $("$2" --version) ..." >&2
  if ! "$2" -m venv "$1" >&2; then
    rm -rf "$1"
    echo "can't make a virtual environment; on Debian install the package python3-venv" >&2
    return 1
  fi
  "$1/bin/python" -m pip install --quiet --upgrade 'pip>=25.1' >&2
}

need() {
  local what=$1 stamp=.venv/installed-$1
  if [[ -f $stamp ]] && cmp -s pyproject.toml "$stamp"; then
    return
  fi
  [[ -x .venv/bin/python ]] || make_venv .venv "$(find_python)"
  echo "installing zflake and what \`$what\` needs into .venv: a minute or so at first ..." >&2
  case $what in
    run) .venv/bin/python -m pip install --quiet --editable . >&2 ;;
    dev)
      # A .venv that was made before may have an older pip.
      .venv/bin/python -m pip install --quiet --upgrade 'pip>=25.1' >&2
      .venv/bin/python -m pip install --quiet --editable '.[flask,redis,etcd,postgresql]' --group dev >&2
      ;;
  esac
  cp pyproject.toml "$stamp"
}
