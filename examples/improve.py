"""Two small sums for improve.sh: how many SFT steps cost what DPO cost, and the table of all seeds.

    python examples/improve.py equal-tokens runs/improve/seed-1/round-1   -> SFT steps of 16 rows
    python examples/improve.py table runs/improve 1 7 8 9   (one round, seeds 7 8 9) -> the table, and runs/improve/results.json
"""
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from packed import Packed, write_json

ROWS, PAD_TO = 16, 40  # improve.sh's SFT: rows a step, tokens that a response is padded to


def tokens(folder, name):
    """Tokens that a finished run took forward and backward."""
    return json.loads((folder / name / "log.jsonl").read_text().splitlines()[-1])["num_tokens"]


def equal_tokens(folder):
    """SFT steps whose forward-backward tokens are those of the finished DPO run beside it."""
    lengths = np.diff(Packed(folder / "packed").bounds, axis=1)  # (pairs, 3) prompt, chosen, rejected
    return round(tokens(folder, "dpo") / (ROWS * (lengths[:, 0] + np.maximum(lengths[:, 1], PAD_TO)).mean()))


def table(work, rounds, seeds):
    """Accuracies of base, SFT and DPO by seed, DPO's paired tests, tokens spent; written to results.json.

    After several rounds DPO is the last round's model, of all rounds' tokens; SFT is the first round's, as ever.
    """
    rows = []
    for seed in seeds:
        folder = work / f"seed-{seed}"
        results = json.loads((folder / f"evaluate-{rounds}" / "results.json").read_text())
        lines = {results["models"][line["model"]]["path"]: line for line in results["table"]}
        dpo = [lines[str(folder / f"round-{number}" / "dpo" / "final")] for number in range(1, rounds + 1)]
        sft, base = lines[str(folder / "round-1" / "sft" / "final")], lines["examples/tiny"]
        rows.append({"seed": int(seed), "n": base["n"], "base": base["accuracy"], "sft": sft["accuracy"],
                     "dpo": dpo[-1]["accuracy"], "dpo_by_round": [line["accuracy"] for line in dpo],
                     "ci95": {"base": base["ci95"], "sft": sft["ci95"], "dpo": dpo[-1]["ci95"]},
                     "dpo_against_base": base["first_model_against_it"], "dpo_against_sft": sft["first_model_against_it"],
                     "dpo_tokens": sum(tokens(folder / f"round-{number}", "dpo") for number in range(1, rounds + 1)),
                     "sft_tokens": tokens(folder / "round-1", "sft")})
    path = work / ("results.json" if rounds == 1 else f"results-{rounds}-rounds.json")
    write_json(path, {"seeds": rows})
    print("seed    n   base    SFT    DPO   DPO - base (p)   DPO - SFT (p)   tokens DPO / SFT"
          + ("   DPO by round" if rounds > 1 else ""))
    for row in rows:
        base, sft = row["dpo_against_base"], row["dpo_against_sft"]
        print(f"{row['seed']:4d} {row['n']:4d}  {row['base']:.3f}  {row['sft']:.3f}  {row['dpo']:.3f}   "
              f"{base['difference']:+.3f} ({base['p']:.2g})   {sft['difference']:+.3f} ({sft['p']:.2g})   "
              f"{row['dpo_tokens']} / {row['sft_tokens']}"
              + (f"   {', '.join(f'{value:.3f}' for value in row['dpo_by_round'])}" if rounds > 1 else ""))
    print(f"{path}: the same as JSON; every response: {work}/seed-*/evaluate-{rounds}/*.jsonl")


if __name__ == "__main__":
    if sys.argv[1:2] == ["equal-tokens"] and len(sys.argv) == 3:
        print(equal_tokens(Path(sys.argv[2])))
    elif sys.argv[1:2] == ["table"] and len(sys.argv) > 4:
        table(Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
    else:
        sys.exit(__doc__)
