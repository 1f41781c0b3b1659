#!/usr/bin/env bash
# Does training on a model's own verified responses make it reason better? The whole loop, in one command that resumes:
# measure on held-out problems, sample, verify, pair, score, train by DPO and by SFT on the right responses (RFT), choose
# a checkpoint by a validation slice, measure base and chosen models on the same test items, report.
#
#   bash examples/reason.sh examples/tiny --task arithmetic        # the embedded model: minutes on a CPU
#   bash examples/reason.sh llada_8b_qlora_4080 --dry_run          # a preset of configs/: what a night of 10 hours holds
#   bash examples/reason.sh llada_8b_qlora_4080 --hours 10         # run it; the same command resumes
#   bash examples/reason.sh --help
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../setup.sh"
printf -v LAUNCH_COMMAND '%q ' bash "$0" "$@"
export LAUNCH_COMMAND TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}
set_up "$here/ds_configs/zero0.json"
[ "$gpus" != 0 ] || export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
exec "$python" "$here/examples/reason.py" "$@"
