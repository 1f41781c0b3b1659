"""Two small sums for improve.sh: how many SFT steps cost what DPO cost, and the table of all seeds.

    python examples/improve.py equal-tokens runs/improve/seed-1/round-1   -> SFT steps of 16 rows
    python examples/improve.py table runs/improve 1 2 3                   -> the table, and runs/improve/results.json
"""
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from packed import Packed, write_json

ROWS, PAD_TO = 16, 40  # improve.sh's SFT: rows a step, tokens that a response is padded to


def equal_tokens(folder):
    """SFT steps whose forward-backward tokens are those of the finished DPO run beside it."""
    spent = json.loads((folder / "dpo" / "log.jsonl").read_text().splitlines()[-1])["num_tokens"]
    lengths = np.diff(Packed(folder / "packed").bounds, axis=1)  # (pairs, 3) prompt, chosen, rejected
    return round(spent / (ROWS * (lengths[:, 0] + np.maximum(lengths[:, 1], PAD_TO)).mean()))


def table(work, seeds):
    """Accuracies of base, SFT and DPO by seed, DPO's paired tests, tokens spent; written to results.json."""
    rows = []
    for seed in seeds:
        models = json.loads((work / f"seed-{seed}" / "evaluate" / "results.json").read_text())["table"]
        dpo, others = models[0], models[1:]  # improve.sh's order: the last DPO, then SFT and start of each round, newest first
        row = {"seed": int(seed), "n": dpo["n"], "base": others[-1]["accuracy"], "dpo": dpo["accuracy"],
               "sft": others[-2]["accuracy"], "ci95": {"base": others[-1]["ci95"], "dpo": dpo["ci95"], "sft": others[-2]["ci95"]},
               "dpo_against_base": others[-1]["first_model_against_it"], "dpo_against_sft": others[-2]["first_model_against_it"]}
        if len(others) > 2:  # the start of every later round is the DPO model of the one before
            row["dpo_by_round"] = [line["accuracy"] for line in others[1:-2:2][::-1]] + [dpo["accuracy"]]
        for name in ("dpo", "sft"):
            log = (work / f"seed-{seed}" / "round-1" / name / "log.jsonl").read_text().splitlines()
            row[f"{name}_tokens"] = json.loads(log[-1])["num_tokens"]
        rows.append(row)
    write_json(work / "results.json", {"seeds": rows})
    print("seed    n   base    SFT    DPO   DPO - base (p)   DPO - SFT (p)   tokens DPO / SFT")
    for row in rows:
        base, sft = row["dpo_against_base"], row["dpo_against_sft"]
        print(f"{row['seed']:4d} {row['n']:4d}  {row['base']:.3f}  {row['sft']:.3f}  {row['dpo']:.3f}   "
              f"{base['difference']:+.3f} ({base['p']:.2g})   {sft['difference']:+.3f} ({sft['p']:.2g})   "
              f"{row['dpo_tokens']} / {row['sft_tokens']}"
              + (f"   by round {', '.join(f'{value:.3f}' for value in row['dpo_by_round'])}" if "dpo_by_round" in row else ""))
    print(f"{work / 'results.json'}: the same as JSON; every response: {work}/seed-*/evaluate/*.jsonl")


if __name__ == "__main__":
    if sys.argv[1] == "equal-tokens":
        print(equal_tokens(Path(sys.argv[2])))
    else:
        table(Path(sys.argv[2]), sys.argv[3:])
