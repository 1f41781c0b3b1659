#!/usr/bin/env bash
# Sets up like launch.sh, with requirements-eval.txt, -4bit.txt and -wandb.txt, then runs the tests:  bash tests/run.sh [pytest's arguments]
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../setup.sh"
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
cd "$here"
missing() { ! "$python" -c 'import sys; from importlib.util import find_spec as f; sys.exit(not all(map(f, sys.argv[1:])))' "$@"; }
extra() { # requirements-NAME.txt, if one of its modules is missing; never into an environment of yours
    if missing "${@:2}" && [ "$python" = "$here/.venv/bin/python" ]; then
        echo "setup: installing requirements-$1.txt into $here/.venv"
        "$python" -m pip install --quiet --disable-pip-version-check -r "requirements-$1.txt" 2> .venv/pip.log ||
            echo "setup: it could not be installed, so the tests of $(IFS=,; echo "${*:2}") are skipped; see .venv/pip.log"
    fi
}
extra eval lm_eval math_verify
extra 4bit bitsandbytes
extra wandb wandb
exec "$python" -m pytest -q -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder tests "$@"
