"""Planned memory against measured: a run of train_dpo.py under DeepSpeed's CPU Adam, two steps, on the CPU.

    python bench/planned.py [--ds zero3_offload_4080 zero2_offload_4080] [--length 128] [--json FILE]
    python bench/planned.py --ds zero3_offload_4080 --lora_r 16      # train_dpo.py's flags are passed on

The model is a random LLaDA of 336M parameters (its vocabulary small), 6.7 GB at 20 bytes each. Measured is the peak of
resident memory above what the process held with everything imported: at the last step, and at the end, when the weights
are gathered and saved. On a CPU card and host are one memory: plan.py's items are added up. This file is not called
plan.py, which would hide that module.
"""

import argparse
import importlib
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import small

import config
import files
import plan
from models import architecture
from models.llada import LLaDAConfig, LLaDAModelLM
from training import deepspeed_config, footprint, memory

# What is freed goes back at once: else the resident set shows the allocator's habits.
MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def make(folder, args):
    """The model and four pairs of the full length."""
    torch.manual_seed(0)
    model_config = LLaDAConfig(
        d_model=args.width,
        n_layers=args.layers,
        n_heads=8,
        mlp_hidden_size=4 * args.width,
        vocab_size=small.VOCAB,
        max_sequence_length=4096,
        mask_token_id=small.MASK,
        bos_token_id=1,
        eos_token_id=small.EOS,
        pad_token_id=small.EOS,
    )
    LLaDAModelLM(model_config).to(torch.bfloat16).save_pretrained(folder / "model")
    for path in (ROOT / "examples" / "tiny").glob("token*"):
        (folder / "model" / path.name).write_bytes(path.read_bytes())
    prompt = args.length // 4
    pairs = small.make_pairs([(prompt, args.length - prompt, args.length - prompt)] * 4)
    small.pack(folder / "packed", pairs, folder / "model")


def worker(argv):
    """Train; print the GiB held before and the peak."""
    import train_dpo

    if "--load_in_4bit" in argv:
        importlib.import_module("bitsandbytes")  # it comes in late
    held, private, peak = memory.memory_now(torch.device("cpu"))[0], anonymous(), [0]

    def watch():
        while True:
            peak[0] = max(peak[0], anonymous())
            time.sleep(0.005)

    threading.Thread(target=watch, daemon=True).start()
    train_dpo.main(argv)
    print(
        "measured",
        held / 2**30,
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        (peak[0] - private) / 2**30,
    )


def anonymous():
    """Bytes resident but for pages of files, which the kernel may take back: those of a model that is being read."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 2**10
    return 0


def run(script, argv):
    """What a script of ours, or this one's worker, prints."""
    env = os.environ | small.ENV | MALLOC
    done = subprocess.run([sys.executable, script, *argv], env=env, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{script} failed:\n{done.stdout[-2000:]}{done.stderr[-3000:]}")
    return done.stdout


def run_flags(name, folder, args):
    """The flags of score.py and train_dpo.py."""
    flags = small.flags(
        data=folder / "packed",
        model_name_or_path=folder / "model",
        diffusion_steps=2,
        trajectories=1,
        tokens_per_forward=args.length,
        max_length=args.length,
        output_dir=folder / name,
        max_steps=2,
        eval_fraction=0.25,
        gradient_accumulation_steps=1,
        deepspeed=f"ds_configs/{name}.json",
    )
    return flags + args.more


def planned(argv, folder):
    """The Plan of these flags; card and host are one memory."""
    groups = config.parse(argv, "", *config.GROUPS)
    _, model_args, noise_args, _ = groups
    noise_args.estimator = "spread"
    model_config = architecture.load_config(str(folder / "model"))
    ds = deepspeed_config.read_ds_config(model_args.deepspeed)
    return plan.plan(model_config, *groups, ds, footprint.Machine(1e3, 1e3, one_memory=True))


def measure(name, folder, args):
    """One row: GiB planned and measured, while training and at the end."""
    argv = run_flags(name, folder, args)
    run(ROOT / "score.py", argv)
    said = run(__file__, ["--worker", *argv]).split()
    held, peak, private = (float(word) for word in said[said.index("measured") + 1 :][:3])
    training = max(row["host_peak_gib"] for row in small.log(folder / name))
    made = planned(argv, folder)
    print(plan.table(made))
    total = sum(item.size for item in made.items) / 2**30
    saving = sum(item.size for item in made.items if "saved" in item.name) / 2**30
    passing = sum(item.size for item in made.items if item.name.startswith(footprint.PASSING)) / 2**30
    return {
        "ds_config": name,
        "parameters": made.parameters,
        "planned": total - saving,
        "measured": training - held,
        "ratio": (total - saving) / (training - held),
        "planned_end": total - passing,
        "measured_end": peak - held,
        "ratio_end": (total - passing) / (peak - held),
        "anonymous": private,
        "ratio_anonymous": total / private,
    }


def summary(row):
    """A row of the table in one line."""
    return (
        "{ds_config}: training {planned:.2f} GiB planned, {measured:.2f} measured, ratio {ratio:.3f}; "
        "with the end {planned_end:.2f}, {measured_end:.2f}, {ratio_end:.3f}; "
        "without pages of files {anonymous:.2f}, {ratio_anonymous:.3f}"
    ).format(**row)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--worker"]:
        return worker(argv[1:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--ds", nargs="+", default=["zero3_offload_4080", "zero3_offload_bf16_states", "zero2_offload_4080"]
    )
    parser.add_argument("--length", type=int, default=128, help="tokens of prompt and response")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--json", help="write the table there")
    args, args.more = parser.parse_known_args(argv)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), args)
        for name in args.ds:
            rows.append(measure(name, Path(folder), args))
            print(summary(rows[-1]), flush=True)
    if args.json:
        files.write_json(args.json, {"table": rows, "length": args.length})
    return 0


if __name__ == "__main__":
    sys.exit(main())
