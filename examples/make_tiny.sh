#!/usr/bin/env bash
# Makes examples/tiny and examples/prefs.jsonl anew, from nothing but this repository:  bash examples/make_tiny.sh
# A tokenizer, 60,000 generated problems, masked-diffusion SFT from random weights (about 40 minutes on one core).
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../setup.sh"
cd "$here"
work=${WORK:-runs/make-tiny}
mkdir -p "$work"
"$python" tasks.py --out "$work/sft.jsonl" --num 60000 --split train --seed 1
[ -d "$work/init" ] || "$python" examples/new_tiny.py --in "$work/sft.jsonl" --out "$work/init"
"$python" data_prep.py --reuse --in "$work/sft.jsonl" --out "$work/packed" --model_name_or_path "$work/init"
# Responses are padded to 40 tokens with end tokens that count in the loss, so that the model ends by itself.
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} "$python" train_dpo.py --loss_type sft --deepspeed ds_configs/zero0.json \
    --data "$work/packed" --model_name_or_path "$work/init" --output_dir "$work/run" \
    --use_mixed_precision no --gradient_checkpointing false --sft_pad_to 40 \
    --per_device_train_batch_size 32 --gradient_accumulation_steps 1 --max_steps 8000 \
    --learning_rate 2e-3 --weight_decay 0.01 --adam_beta2 0.99 --eval_fraction 0.002 --eval_steps 500 \
    --save_steps 500 --logging_steps 50
mkdir -p examples/tiny
cp "$work"/run/final/{config.json,model.safetensors} "$work"/init/{tokenizer.model,tokenizer_config.json} examples/tiny/
"$python" tasks.py --out examples/prefs.jsonl --num 400 --split train --seed 7
"$python" generate.py --model_name_or_path examples/tiny --task arithmetic --num 300 --gen_length 40 --use_mixed_precision no
