#!/usr/bin/env bash
# Checks lora_ext on a GPU with one command, in under 8 minutes, without a network: builds for the card, runs the tests,
# looks for races and stray accesses, measures. Uses the machine's python and torch.
# Usage: scripts/gpu_check.sh [PYTHON] [options]    for example: scripts/gpu_check.sh python3.12 --only build,ops
# docs/building.md has the options; with --dry it needs no GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
python=python3
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then
  python=$1
  shift
fi
exec "$python" scripts/gpu_check.py "$@"
