#!/usr/bin/env bash
# Makes examples/tiny and examples/prefs.jsonl again, from this repository alone:  bash examples/make_tiny.sh
# A tokenizer, 340,000 generated problems, masked-diffusion SFT from random weights (some three hours on one core).
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../setup.sh"
cd "$here"
set_up ds_configs/zero0.json
work=${WORK:-runs/make-tiny}
mkdir -p "$work"
rows() { # NAME: packs $work/NAME.jsonl with the tokenizer of the first rows
    [ -d "$work/init" ] || "$python" examples/new_tiny.py --in "$work/$1.jsonl" --out "$work/init"
    "$python" data_prep.py --reuse --in "$work/$1.jsonl" --out "$work/$1" --model_name_or_path "$work/init"
}
"$python" make_prefs.py --strategy corrupt --task arithmetic --num 60000 --seed 1 --out "$work/some.jsonl"
rows some
"$python" make_prefs.py --strategy corrupt --task arithmetic --num 250000 --seed 2 --out "$work/more.jsonl"
rows more
"$python" examples/hasty.py 29000 "$work/hasty.jsonl" # gives the model its flaw: it ends too soon
rows hasty
# Responses are padded to 40 tokens with end tokens that count in the loss, so that the model learns to end.
sft() { # rows, model, output folder, steps, learning rate, seed
    OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} "$python" train_dpo.py --loss_type sft --deepspeed ds_configs/zero0.json \
        --data "$work/$1" --model_name_or_path "$2" --output_dir "$3" --max_steps "$4" --learning_rate "$5" \
        --seed "$6" --noise_seed "$6" --use_mixed_precision no --gradient_checkpointing false --sft_pad_to 40 \
        --per_device_train_batch_size 32 --gradient_accumulation_steps 1 --weight_decay 0.01 --adam_beta2 0.99 \
        --eval_fraction 0.002 --eval_steps 1000 --save_steps 1000 --logging_steps 50
}
sft some "$work/init" "$work/first" 8000 2e-3 42
sft some "$work/first/final" "$work/second" 2500 8e-4 43
sft more "$work/second/final" "$work/third" 10000 2e-3 44
sft hasty "$work/third/final" "$work/fourth" 900 1e-3 5
mkdir -p examples/tiny
cp "$work"/fourth/final/{config.json,model.safetensors} "$work"/init/{tokenizer.model,tokenizer_config.json} examples/tiny/
"$python" make_prefs.py --strategy corrupt --task arithmetic --num 400 --seed 7 --out examples/prefs.jsonl
"$python" generate.py --model_name_or_path examples/tiny --task arithmetic --num 300 --gen_length 40 --block_length 8 \
    --use_mixed_precision no
