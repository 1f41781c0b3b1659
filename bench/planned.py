"""plan.py's memory against the peak of a real run: DeepSpeed's ZeRO with offload, its CPU Adam, two steps of DPO, on this CPU.

    python bench/planned.py [--layers 16] [--width 1024] [--steps 2]

A LLaDA of 300M random parameters is made, two of the example's pairs are scored and trained on, once per row. Without a card all of
plan.py's items are host memory; measured is the peak resident memory of the training process above what it held before the model
was loaded (python, torch, DeepSpeed), so plan.py's items for libraries are left out of the comparison.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

KINDS = [("zero3_offload_4080", []), ("zero3_offload_bf16_states", []), ("zero2_offload_4080", []),
         ("zero3_offload_4080", ["--lora_r", "16"]), ("zero3_offload_4080", ["--use_mixed_precision", "no"])]
LIBRARIES = ("CUDA, libraries", "Python, libraries")


def make_model(folder, layers, width, rows):
    """A LLaDA of random bfloat16 weights with the embedded model's tokenizer."""
    import shutil
    import torch
    from llada import LLaDAConfig, LLaDAModelLM
    torch.manual_seed(0)
    small = json.loads((ROOT / "examples" / "tiny" / "config.json").read_text())
    model = LLaDAModelLM(LLaDAConfig(
        d_model=width, n_layers=layers, n_heads=width // 64, mlp_hidden_size=4 * width, vocab_size=rows,
        **{key: small[key] for key in ("mask_token_id", "eos_token_id", "pad_token_id", "bos_token_id")})).bfloat16()
    model.save_pretrained(folder)
    for path in (ROOT / "examples" / "tiny").glob("token*"):
        shutil.copy(path, folder)
    return sum(parameter.numel() for parameter in model.parameters())


def child(argv):
    """train_dpo.py in this process; prints the bytes held before the model is loaded, and the peak."""
    import checkpoint
    import engine
    import train_dpo
    original, before = checkpoint.load_model, []

    def load_model(*args, **kwargs):
        before.append(engine.memory_now(engine.torch.device("cpu"))[0])
        return original(*args, **kwargs)
    checkpoint.load_model = load_model
    train_dpo.main(argv)
    print("measured", before[0], int(engine.memory_peaks(engine.torch.device("cpu"))[1] * 2**30), flush=True)


def planned(model, flags):
    """plan.py's bytes by item for these flags, all of them host memory."""
    import config
    import plan
    *groups, machine = config.parse(["--model_name_or_path", str(model), *flags], "", *config.GROUPS, plan.PlanArguments)
    machine.gpu_gib, machine.host_gib = 0, plan.host_gib()
    made = plan.plan(plan.read_config(model), *groups, plan.read_ds(groups[1].deepspeed), machine)
    return {name: size for items in (made.gpu, made.host) for name, size in items.items() if name not in LIBRARIES}


def main():
    if sys.argv[1:2] == ["--child"]:
        return child(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=16384, help="of the vocabulary")
    parser.add_argument("--steps", type=int, default=2)
    args = parser.parse_args()
    env = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"), "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        count = make_model(folder / "model", args.layers, args.width, args.rows)
        rows = (ROOT / "examples" / "prefs.jsonl").read_text().splitlines(keepends=True)[:2]
        (folder / "prefs.jsonl").write_text("".join(rows))
        data = ["--data", str(folder / "packed"), "--model_name_or_path", str(folder / "model")]
        subprocess.run([sys.executable, ROOT / "data_prep.py", "--in", folder / "prefs.jsonl", *data], check=True, env=env, stdout=subprocess.PIPE)
        print(f"{count:,} parameters, {args.steps} steps, peak above the libraries, GiB\n{'ds_config':44s}{'planned':>9s}{'measured':>10s}{'ratio':>8s}")
        for number, (name, more) in enumerate(KINDS):
            flags = data + more + ["--deepspeed", str(ROOT / "ds_configs" / f"{name}.json"), "--states_per_forward", "2", "--max_length", "128"]
            subprocess.run([sys.executable, ROOT / "score.py", *flags], check=True, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            done = subprocess.run([sys.executable, __file__, "--child", *flags, "--max_steps", str(args.steps), "--gradient_accumulation_steps", "1",
                                   "--eval_fraction", "0", "--output_dir", str(folder / f"run{number}")],
                                  env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            if done.returncode:
                sys.exit(done.stdout + done.stderr)
            [said] = [words.split() for words in done.stdout.splitlines() if words.startswith("measured")]
            real, want = int(said[2]) - int(said[1]), sum(planned(folder / "model", flags).values())
            print(f"{' '.join([name, *more]):44s}{want / 2**30:9.2f}{real / 2**30:10.2f}{want / real:8.2f}", flush=True)


if __name__ == "__main__":
    main()
