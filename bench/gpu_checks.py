"""The two comparisons of bench/gpu.py, each in a process of its own: what a card computes, and what a CPU does.

    python bench/gpu_checks.py parity --device cuda     logits and log-probabilities of every checkpoint that is here
    python bench/gpu_checks.py steps --device cuda      losses and gradient norms of two steps of every kind of training

Prints a line of JSON for each comparison as it is made. `parity` computes on the CPU too. `steps` runs data_prep.py,
score.py and train_dpo.py on the embedded model; bench/gpu.py runs it on both devices and compares the lines.

B batch, L length, N tokens of rows end to end.
"""

import argparse
import contextlib
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import files
from models import attention, cache, checkpoint

TINY = ROOT / "examples" / "tiny"
GOLDEN = [root / "shared" / "data" for root in (ROOT, ROOT.parent)]  # checkpoints that the project does not ship
LENGTHS = (24, 7, 33)  # rows of a forward pass
SLOTS, WINDOWS = (0, 1, 3), ((8, 16), (0, 7), (30, 33))  # where their keys are kept; what the next pass reads of each
BATCH = (2, 24)


def say(**values):
    print(json.dumps(values), flush=True)


# --- parity -----------------------------------------------------------------------------------------------


def checkpoints():
    """Folders of models: the embedded one, and small ones in their original layouts where they are."""
    places = [TINY]
    for folder in GOLDEN:
        places += [folder / "llada_golden", *sorted(folder.glob("golden/*"))]
    return [place for place in places if (place / "config.json").is_file()]


@torch.no_grad()
def outputs(model, device):
    """{what: float32 tensor on the CPU}: logits, log-probabilities of targets, and the same of rows end to end.

    Of windows: logits of a part of each row, whose other keys and values were kept by the pass before.
    """
    rng, vocabulary = np.random.default_rng(0), model.get_output_embeddings().weight.shape[0]
    batch = torch.from_numpy(rng.integers(0, vocabulary, BATCH)).to(device)  # (B, L)
    positions = torch.arange(batch.numel(), device=device)
    found = {
        "logits": model(input_ids=batch).logits,
        "log-probabilities": model(input_ids=batch, positions=positions, targets=batch.flatten()),
    }
    if getattr(model, "joins_rows", False):
        rows = torch.from_numpy(rng.integers(0, vocabulary, (1, sum(LENGTHS)))).to(device)  # (1, N)
        places, ends = torch.arange(rows.numel(), device=device), attention.Rows(LENGTHS, device)
        found["rows end to end"] = model(input_ids=rows, positions=places, targets=rows.flatten(), rows=ends)
        store, starts = cache.Store(max(SLOTS) + 1, max(LENGTHS)), np.cumsum((0, *LENGTHS))
        whole = [cache.Window(slot, 0, length, length) for slot, length in zip(SLOTS, LENGTHS)]
        model(input_ids=rows, positions=places, rows=cache.Windows(store, whole, device))
        parts = [each._replace(first=first, stop=stop) for each, (first, stop) in zip(whole, WINDOWS)]
        ids = torch.cat([rows[:, start + each.first : start + each.stop] for start, each in zip(starts, parts)], 1)
        seen = torch.arange(ids.numel(), device=device)
        found["windows"] = model(input_ids=ids, positions=seen, rows=cache.Windows(store, parts, device)).logits
    return {what: value.float().cpu() for what, value in found.items()}


def compare(folder, device):
    """Say how far the device's outputs are from the CPU's, in float32 and bfloat16.

    In float32 they may differ by 2e-5 of the largest, twenty times float32's own error. In bfloat16 those of the device
    may be twice as far from float32 as the CPU's are.
    """
    name = folder.name if folder == TINY else f"{folder.parent.name}/{folder.name}"
    try:
        models = {kind: checkpoint.load_model(str(folder), dtype) for kind, dtype in checkpoint.DTYPES.items()}
    except files.InputError as error:
        return say(checkpoint=name, skipped=str(error))
    exact = outputs(models["no"], "cpu")
    rounded = outputs(models["bf16"], "cpu")
    try:
        there = {kind: outputs(model.to(device), device) for kind, model in models.items()}
    except RuntimeError as error:  # the other checkpoints are still to be compared
        return say(checkpoint=name, failed=str(error).splitlines()[0], ok=False)
    for what, want in exact.items():
        bounds = {"no": 2e-5 * float(want.abs().max()), "bf16": 2 * distance(rounded[what], want)}
        for kind, bound in bounds.items():
            apart = distance(there[kind][what], want)
            precision = str(checkpoint.DTYPES[kind]).removeprefix("torch.")
            say(checkpoint=name, what=what, precision=precision, apart=apart, bound=bound, ok=apart <= bound)


def distance(one, other):
    return float((one - other).abs().max())


# --- steps ------------------------------------------------------------------------------------------------

COMMON = {
    "eval_fraction": 0.2,
    "learning_rate": 1e-3,
    "warmup_ratio": 0,
    "gradient_accumulation_steps": 2,
    "max_steps": 2,
    "tokens_per_forward": 400,
}
LORA = {"lora_r": 4, "lora_alpha": 8}
QLORA = LORA | {"load_in_4bit": "true"}
SFT = {"loss_type": "sft", "sft_pad_to": 40, "per_device_train_batch_size": 2}
CASES = {  # name: (ds_config, precision, flags)
    "full, zero0": ("zero0", "no", {}),
    "full, zero2 offload": ("zero2_offload_4080", "no", {}),
    "full, zero3 offload": ("zero3_offload_4080", "no", {}),
    "full, zero3 offload, bf16": ("zero3_offload_4080", "bf16", {}),
    "LoRA, zero0": ("zero0", "no", LORA),
    "LoRA, zero2 offload": ("zero2_offload_4080", "no", LORA),
    "LoRA, zero3 offload": ("zero3_offload_4080", "no", LORA),
    "LoRA, zero3 offload, bf16": ("zero3_offload_4080", "bf16", LORA),
    "QLoRA, zero0": ("zero0", "bf16", QLORA),
    "SFT, zero0": ("zero0", "no", SFT),
    "SFT, zero3 offload": ("zero3_offload_4080", "no", SFT),
}
QUICK = ("full, zero3 offload", "LoRA, zero0", "SFT, zero0")


def flags(values):
    return [str(word) for name, value in values.items() for word in (f"--{name}", value)]


def pack(folder):
    """The first pairs of examples/prefs.jsonl, as preferences and as SFT rows."""
    import data_prep

    lines = (ROOT / "examples" / "prefs.jsonl").read_text(encoding="utf-8").splitlines(True)
    (folder / "prefs.jsonl").write_text("".join(lines[:16]), encoding="utf-8")
    common = ["--in", str(folder / "prefs.jsonl"), "--model_name_or_path", str(TINY)]
    data_prep.main([*common, "--out", str(folder / "pairs")])
    data_prep.main([*common, "--task", "sft", "--columns", "response=chosen", "--out", str(folder / "rows")])


def run(folder, name):
    """Two steps of a case: {"loss": [2], "grad_norm": [2]}."""
    import score
    import train_dpo

    ds_config, precision, more = CASES[name]
    values = {
        "model_name_or_path": TINY,
        "data": folder / ("rows" if more is SFT else "pairs"),
        "use_mixed_precision": precision,
        "deepspeed": ROOT / "ds_configs" / f"{ds_config}.json",
        "output_dir": folder / name.replace(", ", "-").replace(" ", "-"),
    }
    argv = flags(COMMON | values | more)
    score.main(argv)
    train_dpo.main(argv)
    lines = [json.loads(line) for line in (values["output_dir"] / "log.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "grad_norm" in line]
    return {column: [line[column] for line in lines] for column in ("loss", "grad_norm")}


def steps(names):
    """Say what each case's steps gave. One process group serves all: DeepSpeed does not start twice in a process."""
    import torch.distributed as dist

    destroy, dist.destroy_process_group = dist.destroy_process_group, say_nothing
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with contextlib.redirect_stdout(sys.stderr):
            pack(folder)
        for case in names:
            try:
                with contextlib.redirect_stdout(sys.stderr):
                    found = run(folder, case)
            except Exception as error:  # of any kind: the other cases are still to be compared
                found = {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
            say(case=case, **found)
    if dist.is_initialized():
        destroy()


def say_nothing():
    """In place of the end of the process group."""


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("parity", "steps"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="fewer of them")
    args = parser.parse_args(argv)
    if args.what == "steps":
        steps(QUICK if args.quick else CASES)
    else:
        for folder in checkpoints()[: 2 if args.quick else None]:
            compare(folder, torch.device(args.device))


if __name__ == "__main__":
    main()
