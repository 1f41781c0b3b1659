#!/usr/bin/env bash
# Sets up like launch.sh, with requirements-eval.txt, then runs the tests:  bash tests/run.sh [pytest's arguments]
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../setup.sh"
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
cd "$here"
installed='from importlib.util import find_spec as f; raise SystemExit(not (f("lm_eval") and f("math_verify")))'
if ! "$python" -c "$installed" && [ "$python" = "$here/.venv/bin/python" ]; then # not into an environment of yours
    echo "setup: installing requirements-eval.txt into $here/.venv"
    "$python" -m pip install --quiet --disable-pip-version-check -r requirements-eval.txt 2> .venv/pip.log ||
        echo "setup: it could not be installed, so the tests of lm_eval and math-verify are skipped; see .venv/pip.log"
fi
exec "$python" -m pytest -q -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder tests "$@"
