#!/usr/bin/env bash
# Builds a wheel against one torch release and runs the op tests with it under others.
# Usage: test_abi.sh PYTHON BUILD_VERSION RUN_VERSION...        for example: test_abi.sh python3 2.11.0 2.15.0
set -euo pipefail
python=$1 build=$2
shift 2
root=$(cd "$(dirname "$0")/.." && pwd)
work=$root/build/abi
mkdir -p "$work"

environment() { # version: makes a virtual environment with that torch, once
  local venv=$work/torch-$1
  if [ ! -e "$venv/.ready" ]; then
    echo "Installing torch $1 ..."
    "$python" -m venv "$venv"
    "$venv/bin/pip" install --quiet --upgrade pip
    "$venv/bin/pip" install --quiet "torch==$1" numpy safetensors pytest hypothesis 'setuptools>=77' wheel ninja pybind11
    touch "$venv/.ready"
  fi
}

environment "$build"
echo "Building a wheel against torch $build ..."
rm -rf "$work/wheel" "$work/source"
# Builds from a copy of the tracked files, to keep out objects of other torch releases.
mkdir -p "$work/source" && git -C "$root" ls-files -z | (cd "$root" && xargs -0 cp --parents -t "$work/source")
"$work/torch-$build/bin/pip" wheel --quiet --no-build-isolation --no-deps --wheel-dir "$work/wheel" "$work/source"
ls "$work/wheel"

for version in "$build" "$@"; do
  environment "$version"
  "$work/torch-$version/bin/pip" install --quiet --no-deps --force-reinstall "$work"/wheel/*.whl
  echo "== built against torch $build, running under torch $version"
  # From outside the checkout, so that the installed package is the one tested.
  rm -rf "$work/tests" && cp -r "$root/tests" "$work/tests"
  (cd "$work/tests" && "$work/torch-$version/bin/python" -m lora_ext info &&
    OMP_WAIT_POLICY=passive "$work/torch-$version/bin/python" -m pytest -q -p no:cacheprovider \
      ops/test_reference.py ops/test_values.py ops/test_machinery.py ops/test_bad_arguments.py ops/test_lora_linear.py ops/test_siblings.py \
      ops/test_lora_merge.py ops/test_merge_ops.py)
done
