#!/usr/bin/env bash
# The whole job: preferences -> packed arrays -> reference scores -> an aligned model. What is on disk and valid is reused.
#
#   bash launch.sh DS_CONFIG [--num_gpus N] [flags of data_prep.py, score.py and train_dpo.py]
#   bash launch.sh ds_configs/zero3_offload_4080.json
#   bash launch.sh ds_configs/zero3_offload_4080.json --config_file configs/tiny.yaml --beta 0.2
#   bash launch.sh --setup          # the environment only
#
# Without flags: the packed/ of this folder if there is one, else configs/tiny.yaml, the embedded model and preferences.
# --num_gpus: ranks on this machine; without it all GPUs, or one rank on a CPU.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

ds_config=${1:-}
[ "$ds_config" != --setup ] || { echo "setup: ready ($python)"; exit 0; }
case $ds_config in "" | -h | --help) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; [ -n "$ds_config" ]; exit ;; esac
[ -f "$ds_config" ] || die "$ds_config: no such ds_config; expected one of $(cd "$here" && ls ds_configs/*.json | paste -sd' ')"
shift

ranks= flags=()
while [ $# -gt 0 ]; do
    case $1 in
        --num_gpus) ranks=${2:?--num_gpus needs a number}; shift 2 ;;
        --num_gpus=*) ranks=${1#*=}; shift ;;
        *) flags+=("$1"); shift ;;
    esac
done
if [ ${#flags[@]} = 0 ] && [ ! -f packed/meta.json ]; then
    cd "$here" # the embedded model and preferences are named from there
    echo "launch: no flags and no packed/ here: configs/tiny.yaml, the embedded model and preferences"
    flags=(--config_file configs/tiny.yaml)
fi

read -r gpus exact < <("$python" -c 'import torch; print(torch.cuda.device_count(), int(torch.__version__ >= "2.13"))')
ranks=${ranks:-$((gpus > 0 ? gpus : 1))}
[[ $ranks =~ ^[1-9][0-9]*$ ]] || die "--num_gpus is '$ranks', expected a number from 1"
[ "$gpus" = 0 ] || [ "$ranks" -le "$gpus" ] || die "--num_gpus $ranks: this machine has $gpus"
[ "$gpus" != 0 ] || export DS_ACCELERATOR=cpu OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(((($(nproc) + ranks - 1) / ranks)))}
# Page-locked memory as large as asked, and given back: else torch rounds it up to powers of two, tens of GiB at 8B.
[ "$gpus" = 0 ] || [ "$exact" = 0 ] || [ -n "${PYTORCH_ALLOC_CONF:-}${PYTORCH_CUDA_ALLOC_CONF:-}" ] ||
    export PYTORCH_ALLOC_CONF=pinned_max_cached_size_mb:1
export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}

run() { # a script of ours under DeepSpeed's launcher, on $ranks ranks
    local port
    port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    "$python" -m deepspeed.launcher.runner --log_level critical --num_gpus "$ranks" --master_port "$port" \
        "$here/$1" --deepspeed "$ds_config" "${flags[@]}"
}
echo "launch: $ranks $([ "$gpus" = 0 ] && echo "CPU rank(s), $OMP_NUM_THREADS thread(s) each" || echo GPU\(s\)), $ds_config"
echo "1/3 packed arrays" && "$python" "$here/data_prep.py" --reuse "${flags[@]}"
echo "2/3 reference scores" && run score.py
echo "3/3 training" && run train_dpo.py
