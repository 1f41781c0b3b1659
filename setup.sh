# Sourced by launch.sh and tests/run.sh. Finds the environment, or makes it the first time.
# Sets $python, and compiles DeepSpeed's extensions into $TORCH_EXTENSIONS_DIR.
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

if [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && satisfies python3; then
    python=$(command -v python3)
else
    python=$here/.venv/bin/python
    if ! satisfies "$python"; then
        command -v python3 >/dev/null || die "python3 is not installed; Python 3.11 or newer is needed"
        python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || die "$(python3 --version) is too old; Python 3.11 or newer is needed"
        echo "setup: creating $here/.venv from requirements.txt (1.5 GB on a CPU, more with CUDA; a few minutes, once)"
        python3 -m venv "$here/.venv" || die "python3 -m venv failed; on Debian and Ubuntu: apt install python3-venv"
        "$python" -m pip install --quiet --disable-pip-version-check -r "$here/requirements.txt" 2> "$here/.venv/pip.log" ||
            die "pip could not install requirements.txt; its last line: $(tail -n 1 "$here/.venv/pip.log")"
    fi
fi

# One folder of compiled extensions per environment: another torch would not load them.
{ read -r prefix && read -r versions; } < <("$python" -c 'import sys; from importlib.metadata import version as v
print(sys.prefix); print("torch", v("torch"), "deepspeed", v("deepspeed"))')
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$prefix/torch_extensions}
export PATH=$prefix/bin:$PATH # ninja
built=$TORCH_EXTENSIONS_DIR/.built
if [ "$(cat "$built" 2>/dev/null)" != "$versions" ]; then
    command -v "${CXX:-c++}" >/dev/null || die "no C++ compiler, which DeepSpeed's CPU Adam needs; on Debian and Ubuntu: apt install g++"
    mkdir -p "$TORCH_EXTENSIONS_DIR"
    echo "setup: compiling DeepSpeed's extensions (one to six minutes, once)"
    ( # one builder at a time
        flock 9
        cd "$here" && "$python" - > "$TORCH_EXTENSIONS_DIR/build.log" 2>&1 <<'PY' || exit 1
from training import engine
from deepspeed.accelerator import get_accelerator
engine.clear_stale_locks()
names = ["CPUAdamBuilder"] + (["ShareMemCommBuilder"] if get_accelerator().device_name() == "cpu" else [])
for name in names:
    get_accelerator().create_op_builder(name).load(verbose=True)
PY
        echo "$versions" > "$built.tmp" && mv "$built.tmp" "$built"
    ) 9> "$TORCH_EXTENSIONS_DIR/.builder" || die "DeepSpeed's extensions did not compile; they need a C++ compiler and Python.h (apt install g++ python3-dev); see $TORCH_EXTENSIONS_DIR/build.log"
fi
