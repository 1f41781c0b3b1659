"""Two small sums for improve.sh: how many SFT steps cost what DPO cost, and the table of all seeds.

python examples/improve.py equal-tokens runs/improve/seed-1/round-1   -> SFT steps of 16 rows
python examples/improve.py table runs/improve 1 7 8 9   (one round, seeds 7 8 9) -> the table, and runs/improve/results.json
"""

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from files import write_json
from preferences.packed import Packed
from reasoning import tasks

ROWS, PAD_TO = 16, 40  # improve.sh's SFT: rows a step, tokens that a response is padded to


def tokens(folder, name):
    """Tokens that a finished run took forward and backward."""
    return json.loads((folder / name / "log.jsonl").read_text().splitlines()[-1])["num_tokens"]


def equal_tokens(folder):
    """SFT steps whose forward-backward tokens are those of the finished DPO run beside it."""
    lengths = np.diff(Packed(folder / "packed").bounds, axis=1)  # (pairs, 3) prompt, chosen, rejected
    return round(tokens(folder, "dpo") / (ROWS * (lengths[:, 0] + np.maximum(lengths[:, 1], PAD_TO)).mean()))


def table(work, rounds, seeds):
    """Accuracies of base, SFT, SFT stopped early and DPO by seed, DPO's paired tests, tokens spent; written to results.json.

    After several rounds DPO is the last round's model, of all rounds' tokens; SFT is the first round's, as ever.
    """
    rows, by_steps = [], {}
    for seed in seeds:
        folder, first = work / f"seed-{seed}", work / f"seed-{seed}" / "round-1"
        evaluated = folder / f"evaluate-{rounds}"
        results = json.loads((evaluated / "results.json").read_text())
        names = {model["path"]: name for name, model in results["models"].items()}
        lines = {line["model"]: line for line in results["table"]}
        paths = {
            "base": "examples/tiny",
            "sft": first / "sft" / "final",
            "sft_early": first / "sft-early" / "final",
            "dpo": folder / f"round-{rounds}" / "dpo" / "final",
        }
        line = {name: lines[names[str(path)]] for name, path in paths.items()}
        by_round = [folder / f"round-{number}" / "dpo" for number in range(1, rounds + 1)]
        rows.append(
            {
                "seed": int(seed),
                "n": line["base"]["n"],
                **{name: each["accuracy"] for name, each in line.items()},
                "dpo_by_round": [lines[names[str(path / "final")]]["accuracy"] for path in by_round],
                "ci95": {name: each["ci95"] for name, each in line.items()},
                **{
                    f"dpo_against_{name}": line[name]["first_model_against_it"] for name in ("base", "sft", "sft_early")
                },
                "dpo_tokens": sum(tokens(path.parent, "dpo") for path in by_round),
                **{f"{name}_tokens": tokens(first, name.replace("_", "-")) for name in ("sft", "sft_early")},
            }
        )
        problems = tasks.generate(results["arguments"]["limit"], "test", int(seed))
        for name, path in paths.items():
            for row in (evaluated / f"{names[str(path)]}-arithmetic.jsonl").read_text().splitlines():
                row = json.loads(row)
                by_steps.setdefault(len(problems[int(row["id"]) - 1].steps), {}).setdefault(name, []).append(
                    row["correct"]
                )
    path = work / ("results.json" if rounds == 1 else f"results-{rounds}-rounds.json")
    shares = {
        steps: {"n": len(each["base"]), **{name: sum(right) / len(right) for name, right in each.items()}}
        for steps, each in sorted(by_steps.items())
    }
    write_json(path, {"seeds": rows, "by_steps": shares})
    print_table(rows, shares, rounds)
    print(f"{path}: the same as JSON; every response: {work}/seed-*/evaluate-{rounds}/*.jsonl")


def print_table(rows, shares, rounds):
    print(
        "seed    n   base    SFT  early    DPO   DPO - base (p)    DPO - SFT (p)    DPO - early (p)   tokens DPO / SFT / early"
        + ("   DPO by round" if rounds > 1 else "")
    )
    for row in rows:
        tests = [row[f"dpo_against_{name}"] for name in ("base", "sft", "sft_early")]
        print(
            f"{row['seed']:4d} {row['n']:4d}"
            + "".join(f"  {row[name]:.3f}" for name in ("base", "sft", "sft_early", "dpo"))
            + "".join(f"   {test['difference']:+.3f} ({test['p']:.2g})".ljust(19) for test in tests)
            + f"{row['dpo_tokens']} / {row['sft_tokens']} / {row['sft_early_tokens']}"
            + (f"   {', '.join(f'{value:.3f}' for value in row['dpo_by_round'])}" if rounds > 1 else "")
        )
    print("by steps of the problem, all seeds:")
    for steps, each in shares.items():
        print(
            f"{steps:4d} {each['n']:4d}"
            + "".join(f"  {each[name]:.3f}" for name in ("base", "sft", "sft_early", "dpo"))
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["equal-tokens"] and len(sys.argv) == 3:
        print(equal_tokens(Path(sys.argv[2])))
    elif sys.argv[1:2] == ["table"] and len(sys.argv) > 4:
        table(Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
    else:
        sys.exit(__doc__)
