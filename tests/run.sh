#!/usr/bin/env bash
# Sets up like launch.sh, then runs the tests:  bash tests/run.sh [pytest's arguments]
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../setup.sh"
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
cd "$here"
exec "$python" -m pytest -q tests "$@"
