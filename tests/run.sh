#!/usr/bin/env bash
# Lints the code and runs the tests, after the setup that launch.sh does too.
#
#   bash tests/run.sh                            # the short tier, under ten minutes on two cores
#   bash tests/run.sh --all                      # the long tier too: tests marked `long`
#   bash tests/run.sh tests/scoring -k masks     # arguments are pytest's
#
# Installs requirements-dev.txt, -eval.txt, -4bit.txt and -wandb.txt into .venv, never into an environment of yours.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../setup.sh"
set_up "$here/ds_configs/zero3_offload_4080.json"
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
cd "$here"

missing() { # MODULE...: those that are not installed
    "$python" -c 'import sys; from importlib.util import find_spec
print(*(name for name in sys.argv[1:] if not find_spec(name)))' "$@"
}
install() { # NAME MODULE...: requirements-NAME.txt, where one of its modules is missing
    [ -n "$(missing "${@:2}")" ] && [ "$python" = "$here/.venv/bin/python" ] || return 0
    echo "setup: installing requirements-$1.txt into $here/.venv"
    "$python" -m pip install --quiet --disable-pip-version-check -r "requirements-$1.txt" 2> .venv/pip.log ||
        echo "setup: requirements-$1.txt could not be installed; see $here/.venv/pip.log"
}
install dev pytest xdist hypothesis ruff
install eval lm_eval math_verify
install 4bit bitsandbytes
install wandb wandb
lacking=$(missing pytest xdist hypothesis ruff)
[ -z "$lacking" ] || die "$python has no $lacking; run: pip install -r requirements-dev.txt"
lacking=$(missing lm_eval math_verify bitsandbytes wandb)
[ -z "$lacking" ] || echo "setup: tests of optional packages that are not installed are skipped: $lacking"

"$python" -m ruff check .
"$python" -m ruff format --check .
exec "$python" -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder -r s "$@"
