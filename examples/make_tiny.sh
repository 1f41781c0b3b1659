#!/usr/bin/env bash
# Makes examples/tiny and examples/prefs.jsonl anew, from nothing but this repository:  bash examples/make_tiny.sh
# A tokenizer, 60,000 generated problems, masked-diffusion SFT from random weights (about an hour on one core).
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../setup.sh"
cd "$here"
work=${WORK:-runs/make-tiny}
mkdir -p "$work"
"$python" make_prefs.py --strategy corrupt --task arithmetic --num 60000 --seed 1 --out "$work/sft.jsonl"
[ -d "$work/init" ] || "$python" examples/new_tiny.py --in "$work/sft.jsonl" --out "$work/init"
"$python" data_prep.py --reuse --in "$work/sft.jsonl" --out "$work/packed" --model_name_or_path "$work/init"
# Responses are padded to 40 tokens with end tokens that count in the loss, so that the model ends by itself.
sft() { # model, output folder, steps, learning rate, seed
    OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} "$python" train_dpo.py --loss_type sft --deepspeed ds_configs/zero0.json \
        --data "$work/packed" --model_name_or_path "$1" --output_dir "$2" --max_steps "$3" --learning_rate "$4" \
        --seed "$5" --noise_seed "$5" --use_mixed_precision no --gradient_checkpointing false --sft_pad_to 40 \
        --per_device_train_batch_size 32 --gradient_accumulation_steps 1 --weight_decay 0.01 --adam_beta2 0.99 \
        --eval_fraction 0.002 --eval_steps 500 --save_steps 500 --logging_steps 50
}
sft "$work/init" "$work/first" 8000 2e-3 42
sft "$work/first/final" "$work/second" 2500 8e-4 43
mkdir -p examples/tiny
cp "$work"/second/final/{config.json,model.safetensors} "$work"/init/{tokenizer.model,tokenizer_config.json} examples/tiny/
"$python" make_prefs.py --strategy corrupt --task arithmetic --num 400 --seed 7 --out examples/prefs.jsonl
"$python" generate.py --model_name_or_path examples/tiny --task arithmetic --num 300 --gen_length 40 --use_mixed_precision no
