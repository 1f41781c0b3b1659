# Sourced by improve.sh and bench/proof.sh.

run_seed() { # SEED: one_seed with its log; not followed by "||", where bash would continue after a failure
    set -eu
    exec 3>&1 4>&2 > "$WORK/seed-$1.log" 2>&1
    trap '[ $? = 0 ] || echo "error: seed $1 stopped: $(tail -n 1 "$WORK/seed-$1.log")" >&4' EXIT
    one_seed "$1"
    echo "seed $1: done" >&3
}

run_seeds() { # SEED ...: the caller's one_seed for each, JOBS at a time (default: one a core)
    export -f one_seed run_seed
    printf '%s\n' "$@" | xargs -P "${JOBS:-$(getconf _NPROCESSORS_ONLN)}" -I{} bash -c 'run_seed "$1"' seeds {}
}
