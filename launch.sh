#!/usr/bin/env bash
# The whole job: preferences -> packed arrays -> reference scores -> an aligned model. Steps that are up to date are skipped.
#
#   bash launch.sh DS_CONFIG [--num_gpus N] [--on_oom smaller] [flags of data_prep.py, score.py and train_dpo.py]
#   bash launch.sh ds_configs/zero3_offload_4080.json
#   bash launch.sh ds_configs/zero3_offload_4080.json --config_file configs/tiny.yaml --beta 0.2
#   bash launch.sh --check          # a table of this machine: what is missing, and what to do; nothing is installed
#   bash launch.sh --setup          # create the environment, and nothing else
#
# Without flags: the packed/ of the current folder if there is one, otherwise configs/tiny.yaml (a tiny model and its preferences).
# --num_gpus: number of ranks on this machine. Default: all GPUs, or one rank on a CPU.
# --on_oom smaller: where memory runs out in scoring or training, go on from what is saved with half the tokens in a forward
# pass, down to the longest row. Sums then differ in their last digits. Default: stop, with what to change (exit code 3, or 137).
# Ctrl-C or SIGTERM: the current forward pass is finished, everything is saved, and the same command resumes. Twice: stops at once.
# Several hosts with one shared folder: run the same command on each, with NNODES, NODE_RANK (from 0), MASTER_ADDR and
# MASTER_PORT set as for torchrun. Or run it here with HOSTFILE=hosts (DeepSpeed's format, "name slots=N" a line), over ssh.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

printf -v LAUNCH_COMMAND '%q ' bash "$0" "$@"
export LAUNCH_COMMAND
ds_config=${1:-}
case $ds_config in
    "" | -h | --help) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; [ -n "$ds_config" ]; exit ;;
    --check) find_python; exec "${python:-python3}" "$here/check.py" "${@:2}" ;;
    --setup) set_up; echo "setup: ready ($python)"; exit 0 ;;
esac
[ -f "$ds_config" ] || die "$ds_config: no such ds_config; expected one of $(cd "$here" && ls ds_configs/*.json | paste -sd' ')"
set_up "$ds_config"
[ -z "${HOSTFILE:-}" ] || . "$here/hosts.sh" # does not return
shift

options=; [ $# = 0 ] || printf -v options '%q ' "$@"
ranks= on_oom=stop flags=()
while [ $# -gt 0 ]; do
    case $1 in
        --num_gpus) ranks=${2:?--num_gpus needs a number}; shift 2 ;;
        --num_gpus=*) ranks=${1#*=}; shift ;;
        --on_oom) on_oom=${2:-}; shift 2 || shift ;;
        --on_oom=*) on_oom=${1#*=}; shift ;;
        *) flags+=("$1"); shift ;;
    esac
done
[[ $on_oom =~ ^(stop|smaller)$ ]] || die "--on_oom is '$on_oom', expected stop or smaller"
if [ ${#flags[@]} = 0 ] && [ -f packed/meta.json ]; then
    echo "launch: no flags: packed/ of this folder, with the default settings of a run"
elif [ ${#flags[@]} = 0 ]; then
    if [ "$PWD" != "$here" ]; then # the embedded model and preferences are named from there
        ds_config=$(realpath "$ds_config")
        printf -v LAUNCH_COMMAND 'cd %q && bash launch.sh %q %s' "$here" "$ds_config" "$options"
        cd "$here"
    fi
    LAUNCH_COMMAND+="--config_file configs/tiny.yaml " # so that a flag may be added to it
    echo "launch: no flags and no packed/ here: configs/tiny.yaml, the embedded model and preferences"
    flags=(--config_file configs/tiny.yaml)
fi

ranks=${ranks:-$((gpus > 0 ? gpus : 1))}
[[ $ranks =~ ^[1-9][0-9]*$ ]] || die "--num_gpus is '$ranks', expected a number from 1"
[ "$gpus" = 0 ] || [ "$ranks" -le "$gpus" ] || die "--num_gpus $ranks: this machine has $gpus"
[ "$gpus" != 0 ] || export DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(((($(nproc) + ranks - 1) / ranks)))}
# Allocate page-locked memory exactly and free it: by default torch rounds up to powers of two, tens of GiB at 8B. On the card,
# passes of many lengths need segments that grow; WSL2, which has no /dev/nvidia0, refuses them (pytorch/pytorch#192330).
allocation=
[ "$exact" = 0 ] || allocation=pinned_max_cached_size_mb:1
! compgen -G "/dev/nvidia[0-9]*" >/dev/null || allocation=expandable_segments:True${allocation:+,$allocation}
[ "$gpus" = 0 ] || [ -n "${PYTORCH_ALLOC_CONF:-}${PYTORCH_CUDA_ALLOC_CONF:-}" ] || export PYTORCH_ALLOC_CONF=$allocation
export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}

hosts=${NNODES:-1} host=${NODE_RANK:-0}
[[ $hosts =~ ^[1-9][0-9]*$ && $host =~ ^[0-9]+$ ]] && [ "$host" -lt "$hosts" ] ||
    die "NNODES is '$hosts' and NODE_RANK is '$host', expected the number of hosts, and this host's number from 0"
[ "$hosts" = 1 ] || [ $on_oom = stop ] || die "--on_oom smaller works on one host: others do not know why it failed"
[ "$hosts" = 1 ] || [ -n "${MASTER_ADDR:-}" ] || die "NNODES is $hosts and MASTER_ADDR is not set, expected the address of host 0"
export MASTER_ADDR=${MASTER_ADDR:-127.0.0.1} WORLD_SIZE=$((hosts * ranks)) LOCAL_WORLD_SIZE=$ranks PYTHONUNBUFFERED=1

stopped=0 pids=()
stop() { # pass a signal on to the ranks, which have sessions of their own: the first one saves, the second one ends
    stopped=1
    [ ${#pids[@]} = 0 ] || kill -TERM "${pids[@]}" 2>/dev/null || true
}
trap stop INT TERM HUP

end_now() { # PID...: give them two seconds to say what is wrong, then kill them
    local turn
    for turn in {1..20}; do
        kill -0 "$@" 2>/dev/null || return 0
        sleep 0.1
    done
    kill -KILL "$@" 2>/dev/null || true
}

oom=3 killed=137 # exit codes: of cli/out_of_memory.py, and of a process that the kernel has killed

finish() { # wait for all of pids; when one fails, end the others, which would wait for it forever. Sets code
    local status pid left ending=0
    code=0
    while [ ${#pids[@]} -gt 0 ]; do
        wait -n "${pids[@]}" 2>/dev/null || true # or a signal
        left=()
        for pid in "${pids[@]}"; do
            if kill -0 "$pid" 2>/dev/null; then left+=("$pid"); continue; fi
            status=0 && wait "$pid" || status=$?
            # of several, the one that ran out of memory counts: others fail because it has gone, or are ended here
            if [ "$code" = 0 ] || [ "$status" = $oom ] || { [ "$status" = $killed ] && [ $ending = 0 ]; }; then
                [ "$status" = 0 ] || [ "$code" = $oom ] || code=$status
            fi
        done
        pids=("${left[@]}")
        [ "$code" = 0 ] || [ ${#pids[@]} = 0 ] || { ending=1 && end_now "${pids[@]}"; }
    done
    if [ "$stopped" = 1 ]; then
        [ "$code" = 0 ] || echo "stopped at once; what was saved before is safe; to resume, run: $LAUNCH_COMMAND"
        exit 0
    fi
    [ "$code" != $killed ] ||
        echo "error: killed (SIGKILL): most likely the host ran out of memory. Finished work is safe." \
            "Close other programs or use what python plan.py proposes, then run: $LAUNCH_COMMAND" >&2
}

ranks_of() { # SCRIPT NUMBER [FLAG...]: run a script on this host's ranks; NUMBER is added to the port, one for each script
    local port rank half= word before kept given=("${flags[@]}")
    while true; do
        if [ "$hosts" = 1 ]; then
            port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
        else
            port=$((${MASTER_PORT:-29500} + $2))
        fi
        : >"$LAUNCH_PASS"
        for ((rank = 0; rank < ranks; rank++)); do
            MASTER_PORT=$port RANK=$((host * ranks + rank)) LOCAL_RANK=$rank setsid "$python" "$here/$1" \
                --deepspeed "$ds_config" "${@:3}" "${given[@]}" &
            pids+=($!)
        done
        [ $stopped = 0 ] || stop # a signal came before they were there
        finish
        [ "$code" != 0 ] || return 0
        [ $on_oom = smaller ] && [[ $code = $oom || $code = $killed ]] && read -r half <"$LAUNCH_PASS" || exit "$code"
        kept=() before=
        for word in "${given[@]}"; do # without the number that was given, as a flag is given once
            [[ $word =~ ^--tokens.per.forward || $before =~ ^--tokens.per.forward$ ]] || kept+=("$word")
            before=$word
        done
        given=("${kept[@]}" --tokens_per_forward "$half")
        echo "launch: out of memory; $1 goes on from what is saved with at most $half tokens in a forward pass (half as many;" \
            "sums differ in their last digits)"
    done
}
LAUNCH_PASS=$(mktemp) # where a job writes half the tokens of its forward pass (cli/out_of_memory.py)
export LAUNCH_PASS
trap 'rm -f "$LAUNCH_PASS"' EXIT
echo "launch: $ranks $([ "$gpus" = 0 ] && echo "CPU rank(s), $OMP_NUM_THREADS thread(s) each" || echo GPU\(s\)), $ds_config"
echo "1/3 packed arrays"
setsid "$python" "$here/data_prep.py" --reuse "${flags[@]}" &
pids=($!)
finish
[ "$code" = 0 ] || exit "$code"
echo "2/3 reference scores"
ranks_of calibrate.py 0 --reuse # for --diffusion_steps auto alone
ranks_of score.py 1
echo "3/3 training" && ranks_of train_dpo.py 2
