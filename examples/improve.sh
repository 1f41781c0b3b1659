#!/usr/bin/env bash
# Does DPO make the model reason better? Sample, verify, pair, score, train by DPO. For comparison train by SFT on the
# chosen responses, once with as many forward-backward tokens and once stopped early. Then measure the accuracy of each on
# held-out problems, for three seeds:
#
#   bash examples/improve.sh              # the embedded model and task, no download; ends in runs/improve/results.json
#   bash examples/improve.sh --rounds 2   # again from the DPO model, which is then the reference; results-2-rounds.json
#
# Environment: SEEDS="1 2 3", PROBLEMS=250 to sample, HELD_OUT=300, WORK=runs/improve, JOBS (seeds at a time;
# default: one a core). Each seed draws its own problems, noise, order and held-out problems. Run the same command to
# resume: finished training and samples are kept. Other PROBLEMS need another WORK.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../setup.sh"
cd "$here"
rounds=1
case $#${1:-} in 0) ;; 2--rounds) rounds=$2 ;; *) die "examples/improve.sh $*: expected nothing, or --rounds 2" ;; esac
[[ $rounds =~ ^[1-9]$ ]] || die "--rounds is '$rounds', expected a number from 1 to 9"
[ -n "${CUDA_VISIBLE_DEVICES+x}" ] || export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu} # a model this small is no work for a GPU
set_up ds_configs/zero0.json
export python rounds WORK=${WORK:-runs/improve} PROBLEMS=${PROBLEMS:-250} HELD_OUT=${HELD_OUT:-300}
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false # a seed a core

one_seed() {
    local seed=$1 from=examples/tiny folder steps compare=()
    local sampler="--use_mixed_precision no --device cpu --gen_length 40 --batch_size 64"
    local shared="--use_mixed_precision no --gradient_checkpointing false --tokens_per_forward 4096 --logging_steps 20
        --noise_seed $seed --seed $seed --max_length 256 --deepspeed ds_configs/zero0.json"
    for round in $(seq "$rounds"); do
        folder=$WORK/seed-$seed/round-$round
        mkdir -p "$folder"
        # 1. Sample and verify; pair right and wrong answers of this very model. Token by token: at temperature 1 this finds
        # both for twice as many prompts as blocks of 8, where the most confident tokens come first and decide the rest.
        "$python" make_prefs.py --strategy sample --model "$from" --task arithmetic --num "$PROBLEMS" --k 8 \
            --temperature 1 --pairs_per_prompt 4 --seed "$seed$round" $sampler --block_length 1 --out "$folder/prefs.jsonl"
        # 2. Tokens, noise, reference scores.
        "$python" data_prep.py --reuse --in "$folder/prefs.jsonl" --out "$folder/packed" --model_name_or_path "$from" $shared
        "$python" score.py --data "$folder/packed" $shared
        # 3. DPO; and, from the same start, SFT on the chosen: with as many forward-backward tokens (some 12 epochs), and
        # with 25 steps, the best of 25, 50, 100, 170 and as many on the problems of seed 9.
        "$python" train_dpo.py --data "$folder/packed" --output_dir "$folder/dpo" $shared \
            --learning_rate 1e-4 --num_train_epochs 1 --gradient_accumulation_steps 16 --eval_fraction 0.1
        for name in sft sft-early; do
            if [ $name = sft ]; then steps=$("$python" examples/improve.py equal-tokens "$folder"); else steps=25; fi
            "$python" train_dpo.py --data "$folder/packed" --output_dir "$folder/$name" $shared --loss_type sft --sft_pad_to 40 \
                --learning_rate 3e-4 --per_device_train_batch_size 16 --gradient_accumulation_steps 1 --eval_fraction 0.1 \
                --max_steps "$steps"
        done
        compare=("$folder/sft/final" "$folder/sft-early/final" "$from" "${compare[@]}")
        from=$folder/dpo/final
    done
    # 4. All models on the same held-out problems; responses end by themselves.
    "$python" evaluate.py --model "$from" --compare "${compare[@]}" --tasks arithmetic --limit "$HELD_OUT" --seed "$seed" \
        $sampler --block_length 8 --output_dir "$WORK/seed-$seed/evaluate-$rounds"
}
run_seed() { # with its log; not followed by "||", where bash would continue after a failure
    set -eu
    exec 3>&2 > "$WORK/seed-$1.log" 2>&1
    trap '[ $? = 0 ] || echo "error: seed $1 stopped: $(tail -n 1 "$WORK/seed-$1.log")" >&3' EXIT
    one_seed "$1"
}
export -f one_seed run_seed
mkdir -p "$WORK"
echo "improve: seeds ${SEEDS:=1 2 3}, $rounds round(s), logs in $WORK/seed-*.log"
printf '%s\n' $SEEDS | xargs -P "${JOBS:-$(getconf _NPROCESSORS_ONLN)}" -I{} bash -c 'run_seed "$1"' improve {}
"$python" examples/improve.py table "$WORK" "$rounds" $SEEDS
