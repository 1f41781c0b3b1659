#!/usr/bin/env bash
# Does DPO, or RFT, make a model solve more that has no planted flaw? Three bases of a million parameters learn 4x4 Sudoku
# from solved grids; reason.sh then trains each on its own verified responses. See bench/proof.py and docs/tuning.md.
#
#   bash bench/proof.sh            # two hours on two cores; ends in runs/proof/results.json
#
# Environment: SEEDS="1 2 3", WORK=runs/proof, JOBS (seeds at a time; default: one a core), ROUNDS=2. The same command
# resumes; other ROUNDS need another WORK.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../setup.sh"
cd "$here"
. examples/seeds.sh
[ -n "${CUDA_VISIBLE_DEVICES+x}" ] || export CUDA_VISIBLE_DEVICES= # models this small are no work for a GPU
set_up ds_configs/zero0.json
[ "$gpus" != 0 ] || export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
export python WORK=${WORK:-runs/proof} ROUNDS=${ROUNDS:-2} OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

fresh_model() { "$python" examples/new_tiny.py --in "$WORK/gold.jsonl" --vocab_size 266 --out "$1" --seed "$2"; }
one_seed() {
    local work=$WORK/base-$1
    # 1. A base: LLaDA's SFT on solved grids and their end token, from random weights
    [ -f "$work/init/model.safetensors" ] || fresh_model "$work/init" "$1"
    "$python" train_dpo.py --loss_type sft --task sft --data "$WORK/packed" --model_name_or_path "$work/init" \
        --output_dir "$work" --deepspeed ds_configs/zero0.json --max_steps 1500 --learning_rate 2e-3 \
        --seed "$1" --noise_seed "$1" --use_mixed_precision no --gradient_checkpointing false --sft_pad_to 17 \
        --per_device_train_batch_size 128 --gradient_accumulation_steps 1 --weight_decay 0.01 --adam_beta2 0.99 \
        --eval_fraction 0.01 --eval_steps 250 --save_steps 1000 --logging_steps 50
    # 2. The loop: 17 tokens in 4 passes
    bash examples/reason.sh bench/proof.yaml --model "$work/final" --task "$WORK/problems.jsonl" \
        --test_file "$WORK/test.jsonl" --rounds "$ROUNDS" --problems 4000 --validation 2000 --test 2000 \
        --gen_length 17 --block_length 17 --steps 4 --cache none --rft_learning_rate 3e-4 \
        --seed "$1" --out "$WORK/seed-$1"
}
export -f fresh_model
mkdir -p "$WORK"
[ -f "$WORK/test.jsonl" ] || "$python" bench/proof.py problems --out "$WORK"
[ -d "$WORK/tokenizer" ] || fresh_model "$WORK/tokenizer" 0
"$python" data_prep.py --reuse --task sft --in "$WORK/gold.jsonl" --out "$WORK/packed" \
    --model_name_or_path "$WORK/tokenizer"
echo "proof: seeds ${SEEDS:=1 2 3}, logs in $WORK/seed-*.log"
run_seeds $SEEDS
"$python" bench/proof.py table --out "$WORK"
