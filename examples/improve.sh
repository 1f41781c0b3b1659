#!/usr/bin/env bash
# Does training on its own verified responses make the embedded model reason better? The loop of reason.sh for three
# seeds, each with its own problems, noise, order and test items, and one table of all of them:
#
#   bash examples/improve.sh              # no download; ends in runs/improve/results.json
#   bash examples/improve.sh --rounds 2   # a second round from what each method chose, in runs/improve-2
#
# Environment: SEEDS="1 2 3"; PROBLEMS to sample, VALIDATION and HELD_OUT (test items), default: those of reason.sh;
# WORK (folder), JOBS (seeds at a time; default: one a core). Run the same command to resume; other numbers need
# another WORK.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../setup.sh"
cd "$here"
. examples/seeds.sh
rounds=1
case $#${1:-} in 0) ;; 2--rounds) rounds=$2 ;; *) die "examples/improve.sh $*: expected nothing, or --rounds 2" ;; esac
[[ $rounds =~ ^[1-9]$ ]] || die "--rounds is '$rounds', expected a number from 1 to 9"
[ -n "${CUDA_VISIBLE_DEVICES+x}" ] || export CUDA_VISIBLE_DEVICES= # a model this small is no work for a GPU
set_up ds_configs/zero0.json
[ "$rounds" = 1 ] || WORK=${WORK:-runs/improve-$rounds}
export WORK=${WORK:-runs/improve} OMP_NUM_THREADS=1 # a seed a core
export numbers="--rounds $rounds ${PROBLEMS:+--problems $PROBLEMS} ${VALIDATION:+--validation $VALIDATION}"
numbers+=${HELD_OUT:+ --test $HELD_OUT}

one_seed() {
    bash examples/reason.sh examples/tiny --task arithmetic --seed "$1" --out "$WORK/seed-$1" $numbers
}
mkdir -p "$WORK"
read -ra seeds <<< "${SEEDS:-1 2 3}"
echo "improve: seeds ${seeds[*]}, $rounds round(s), logs in $WORK/seed-*.log"
run_seeds "${seeds[@]}"
"$python" examples/improve.py "${seeds[@]/#/$WORK/seed-}" --out "$WORK/results.json"
