# Sourced by launch.sh and tests/run.sh: the environment, and the check of the machine before the work.
# The active python3 is used if it satisfies requirements.txt. Otherwise .venv is made beside this file.

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

die() { echo "error: $1" >&2; exit 2; }

satisfies() { # PYTHON: whether it has what requirements.txt asks for
    "$1" - "$here/requirements.txt" 2>/dev/null <<'PY'
import sys
from importlib.metadata import version
from packaging.requirements import Requirement
for line in open(sys.argv[1]):
    need = Requirement(line.strip())
    assert need.specifier.contains(version(need.name), prereleases=True)
PY
}

find_python() { # set $python to that of the environment, or to nothing
    python=$here/.venv/bin/python
    [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] || ! satisfies python3 || python=$(command -v python3)
    satisfies "$python" || python=
}

make_environment() {
    command -v python3 >/dev/null || die "python3 is not installed; Python 3.11 or newer is needed"
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || die "$(python3 --version) is too old; Python 3.11 or newer is needed"
    python3 "$here/check.py" --starting ${1+"$1"} >/dev/null || exit 2 # before the download
    python=$here/.venv/bin/python
    echo "setup: creating $here/.venv from requirements.txt (1.5 GB on a CPU, more with CUDA; a few minutes, once)"
    python3 -m venv "$here/.venv" || die "python3 -m venv failed; on Debian and Ubuntu: apt install python3-venv"
    "$python" -m pip install --quiet --disable-pip-version-check -r "$here/requirements.txt" 2> "$here/.venv/pip.log" ||
        die "pip could not install requirements.txt; its last line: $(tail -n 1 "$here/.venv/pip.log")"
}

compile_adam() { # DeepSpeed's CPU Adam, the one extension in use, once for each version of torch and DeepSpeed
    local versions built=$TORCH_EXTENSIONS_DIR/.built
    versions=$("$python" -c 'from importlib.metadata import version as v; print("torch", v("torch"), "deepspeed", v("deepspeed"))')
    [ "$(cat "$built" 2>/dev/null)" != "$versions" ] || return 0
    mkdir -p "$TORCH_EXTENSIONS_DIR"
    echo "setup: compiling DeepSpeed's CPU Adam (one to six minutes, once)"
    ( # one builder at a time
        flock 9
        cd "$here" && "$python" - > "$TORCH_EXTENSIONS_DIR/build.log" 2>&1 <<'PY' || exit 1
from training import engine
from deepspeed.accelerator import get_accelerator
engine.clear_stale_locks()
get_accelerator().create_op_builder("CPUAdamBuilder").load(verbose=True)
PY
        echo "$versions" > "$built.tmp" && mv "$built.tmp" "$built"
    ) 9> "$TORCH_EXTENSIONS_DIR/.builder"
}

compile_async_io() { # [DS_CONFIG]: what swaps optimizer states to an SSD, if the ds_config does
    grep -qs '"nvme"' "${1:-}" && [ ! -e "$TORCH_EXTENSIONS_DIR/async_io/async_io.so" ] || return 0
    echo "setup: compiling DeepSpeed's async_io (one to five minutes, once)"
    (cd "$here" && "$python" -c 'from training import nvme; nvme.load_extension()') > "$TORCH_EXTENSIONS_DIR/async_io.log" 2>&1 ||
        die "DeepSpeed's async_io did not compile; it needs libaio (apt install libaio-dev); see $TORCH_EXTENSIONS_DIR/async_io.log"
}

set_up() { # [DS_CONFIG]: set $python, $gpus that torch can use, $exact (torch is 2.13 or newer); refuse what cannot run
    local answer compile prefix
    find_python
    [ -n "$python" ] || make_environment "$@"
    prefix=$("$python" -c 'import sys; print(sys.prefix)')
    export PATH=$prefix/bin:$PATH # ninja
    # One folder of compiled extensions per environment: another torch would not load them.
    export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$prefix/torch_extensions}
    answer=$("$python" "$here/check.py" --starting "$@") || exit 2
    read -r gpus exact compile <<< "$answer"
    compile_async_io "$@"
    [ "$compile" = 1 ] && ! compile_adam || return 0
    [ $# = 0 ] || die "DeepSpeed's CPU Adam did not compile, and this ds_config offloads the optimizer; see $TORCH_EXTENSIONS_DIR/build.log"
    echo "setup: DeepSpeed's CPU Adam did not compile; a ds_config that offloads the optimizer needs it; see $TORCH_EXTENSIONS_DIR/build.log"
}
