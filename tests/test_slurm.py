"""Tests of examples/slurm.sbatch, with stand-ins for Slurm: srun starts each node's task here.

bash tests/run.sh tests/test_slurm.py
"""

import re
import signal
import subprocess

import pytest
from small import ROOT, copy_of_the_repository, shell_environment

# Each task gets its node's number; a signal is passed on to the tasks alone, as Slurm's cgroup plugin does.
SRUN = """#!/usr/bin/env bash
echo "srun $*" >> "$CALLS"
while [ "$1" != bash ]; do shift; done
tasks=()
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do
    SLURM_NODEID=$node SLURM_PROCID=$node "$@" &
    tasks+=($!)
done
trap 'kill -TERM "${tasks[@]}"' TERM
code=0
for task in "${tasks[@]}"; do
    while kill -0 "$task" 2>/dev/null; do wait "$task" && code=0 || code=$?; done
done
exit $code
"""
SCONTROL = """#!/usr/bin/env bash
[ "$*" = "show hostnames nodes[1-2]" ] || exit 1
printf '127.0.0.1\\nnode2\\n'
"""


@pytest.fixture
def cluster(tmp_path):
    copy_of_the_repository(tmp_path)
    (tmp_path / "bin").mkdir()
    for name, script in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / "bin" / name).write_text(script)
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def submit(cluster, nodes, *flags):
    """Start the script as Slurm would on the first node of a job."""
    env = shell_environment(
        SLURM_JOB_NUM_NODES=str(nodes),
        SLURM_JOB_NODELIST="nodes[1-2]",
        SLURM_JOB_ID="4711",
        SLURM_CPUS_PER_TASK="2",
        SLURM_SUBMIT_DIR=str(cluster),
        CALLS=str(cluster / "calls"),
    )
    env["PATH"] = f"{cluster / 'bin'}:{env['PATH']}"
    run = ["ds_configs/zero0.json", "--num_gpus", "1", "--in", "rows.jsonl", "--out", "packed", "--output_dir", "run"]
    run += ["--model_name_or_path", "examples/tiny", "--use_mixed_precision", "no", "--eval_fraction", "0.2"]
    run += ["--diffusion_steps", "2", "--trajectories", "1", "--gradient_accumulation_steps", "2"]
    rows = (ROOT / "examples" / "prefs.jsonl").read_text().splitlines(keepends=True)[:16]
    (cluster / "rows.jsonl").write_text("".join(rows))
    command = ["bash", "examples/slurm.sbatch", *run, *flags]
    return subprocess.Popen(
        command, cwd=cluster, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1
    )


def test_two_nodes(cluster):
    """One task for each node, and one run of both."""
    said, _ = submit(cluster, 2, "--max_steps", "2").communicate(timeout=300)
    assert "2 steps of 4 pairs" in said and said.count("3/3 training") == 2, said
    assert (cluster / "run" / "final" / "model.safetensors").is_file()
    assert (cluster / "calls").read_text().startswith("srun --kill-on-bad-exit=1 --cpus-per-task=2 bash -c")


def test_the_time_is_up(cluster):
    """SIGTERM to the batch script: the run saves and stops with exit code 0, and the same job resumes it."""
    job = submit(cluster, 1, "--num_train_epochs", "400")
    lines = []
    for line in job.stdout:
        lines.append(line)
        if line.startswith("step 2/"):
            job.send_signal(signal.SIGTERM)
    assert job.wait(60) == 0, "".join(lines)
    [step] = [int(path.name.removeprefix("step-")) for path in (cluster / "run" / "checkpoints").glob("step-*")]
    job = submit(cluster, 1, "--num_train_epochs", "400")
    for line in job.stdout:
        if found := re.match(r"step (\d+)/", line):
            job.send_signal(signal.SIGTERM)
            break
    job.communicate(timeout=60)
    assert int(found[1]) > step


def test_directives():
    """Slurm reads them above the first command; the signal comes before the end, and to the batch script alone."""
    head, _, _ = (ROOT / "examples" / "slurm.sbatch").read_text().partition("\nset -euo pipefail")
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", head, re.M))
    assert options["ntasks-per-node"] == "1" and options["signal"] == "B:TERM@600"
