#!/usr/bin/env bash
# Runs tests next to the oldest releases that pyproject.toml takes, with the library that is built in the tree: its binary
# is for torch 2.11 and later, and for the Python that built it. `make test-full` has the newest ones.
# Usage: test_oldest.sh PYTHON [arguments of pytest]
set -euo pipefail
python=$1
shift
cd "$(dirname "$0")/.."
venv=build/oldest

# In $venv: the oldest releases of what pyproject.toml names, for these extras.
install() {
  "$venv/bin/uv" pip install --quiet --python "$venv/bin/python" --resolution lowest-direct -r pyproject.toml "$@"
  "$venv/bin/uv" pip list --quiet --python "$venv/bin/python" |
    grep -E '^(torch|transformers|accelerate|safetensors|peft|trl|datasets|diffusers|bitsandbytes|torchao) '
}

run() {
  OMP_WAIT_POLICY=passive PYTHONPATH=$PWD "$venv/bin/python" -m pytest -n 2 --dist worksteal -p no:cacheprovider "$@"
}

if [ ! -e "$venv/.ready" ] || [ pyproject.toml -nt "$venv/.ready" ]; then
  echo "Installing the oldest releases in $venv; torch alone can be a download of gigabytes ..."
  "$python" -m venv --clear "$venv"
  "$venv/bin/pip" install --quiet uv
  touch "$venv/.ready"
fi
# Not those of the binary and of scripts, which use nothing of what is older here.
[ $# -gt 0 ] || set -- tests --ignore=tests/{benchmarks,building,cpp,fuzz,hostile,simt}
install --extra test
run "$@"
# The tests compare with a later PEFT than users may have.
install --extra peft --upgrade-package peft
run tests/peft
