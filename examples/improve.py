"""Two small sums for improve.sh: how many SFT steps cost what DPO cost, and the table of all seeds.

python examples/improve.py equal-tokens runs/improve/seed-1/round-1   -> SFT steps of 16 rows
python examples/improve.py table runs/improve 1 7 8 9   (one round, seeds 7 8 9) -> the table, and results.json
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
MODELS = ("base", "sft", "sft_early", "dpo")
OTHERS = MODELS[:3]  # what DPO is compared with


def tokens(folder, name):
    """Tokens that a finished run took forward and backward."""
    return json.loads((folder / name / "log.jsonl").read_text().splitlines()[-1])["num_tokens"]


def equal_tokens(folder):
    """SFT steps whose forward-backward tokens are those of the finished DPO run beside it."""
    lengths = np.diff(Packed(folder / "packed").bounds, axis=1)  # (pairs, 3) prompt, chosen, rejected
    return round(tokens(folder, "dpo") / (ROWS * (lengths[:, 0] + np.maximum(lengths[:, 1], PAD_TO)).mean()))


class Seed:
    """One seed's models on the same held-out problems, as evaluate.py has measured them.

    After several rounds DPO is the last round's model, of all rounds' tokens; SFT is always the first round's.
    """

    def __init__(self, work, rounds, seed):
        folder, self.number = work / f"seed-{seed}", int(seed)
        self.first = folder / "round-1"
        self.rounds = [folder / f"round-{number}" for number in range(1, rounds + 1)]
        self.evaluated = folder / f"evaluate-{rounds}"
        self.results = json.loads((self.evaluated / "results.json").read_text())
        self.names = {model["path"]: name for name, model in self.results["models"].items()}
        self.lines = {line["model"]: line for line in self.results["table"]}
        self.paths = {
            "base": "examples/tiny",
            "sft": self.first / "sft" / "final",
            "sft_early": self.first / "sft-early" / "final",
            "dpo": self.rounds[-1] / "dpo" / "final",
        }

    def line(self, path):
        """evaluate.py's line about the model at `path`."""
        return self.lines[self.names[str(path)]]

    def row(self):
        """Accuracies, intervals, DPO's paired tests, tokens spent."""
        row = {"seed": self.number, "n": self.line("examples/tiny")["n"]}
        lines = {name: self.line(path) for name, path in self.paths.items()}
        row |= {name: line["accuracy"] for name, line in lines.items()}
        row["dpo_by_round"] = [self.line(folder / "dpo" / "final")["accuracy"] for folder in self.rounds]
        row["ci95"] = {name: line["ci95"] for name, line in lines.items()}
        row |= {f"dpo_against_{name}": lines[name]["first_model_against_it"] for name in OTHERS}
        row["dpo_tokens"] = sum(tokens(folder, "dpo") for folder in self.rounds)
        return row | {"sft_tokens": tokens(self.first, "sft"), "sft_early_tokens": tokens(self.first, "sft-early")}

    def verdicts(self):
        """Yields (steps of the problem, model, whether it is solved) of every response."""
        problems = tasks.generate(self.results["arguments"]["limit"], "test", self.number)
        for name, path in self.paths.items():
            for line in (self.evaluated / f"{self.names[str(path)]}-arithmetic.jsonl").read_text().splitlines():
                response = json.loads(line)
                yield len(problems[int(response["id"]) - 1].steps), name, response["correct"] is True


def shares_by_steps(seeds):
    """{steps of the problem: {"n", share solved by each model}} of all seeds together."""
    found = {}
    for seed in seeds:
        for steps, name, correct in seed.verdicts():
            found.setdefault(steps, {}).setdefault(name, []).append(correct)
    shares = {}
    for steps, solved in sorted(found.items()):
        shares[steps] = {"n": len(solved["base"])}
        for name, verdicts in solved.items():
            shares[steps][name] = sum(verdicts) / len(verdicts)
    return shares


def table(work, rounds, numbers):
    """Print the table of all seeds, and write it to results.json."""
    seeds = [Seed(work, rounds, number) for number in numbers]
    rows, shares = [seed.row() for seed in seeds], shares_by_steps(seeds)
    path = work / ("results.json" if rounds == 1 else f"results-{rounds}-rounds.json")
    write_json(path, {"seeds": rows, "by_steps": shares})
    print_table(rows, shares, rounds)
    print(f"{path}: the same as JSON; every response: {work}/seed-*/evaluate-{rounds}/*.jsonl")


def print_table(rows, shares, rounds):
    head = "seed    n   base    SFT  early    DPO   DPO - base (p)    DPO - SFT (p)    DPO - early (p)   "
    head += "tokens DPO / SFT / early"
    print(head + ("   DPO by round" if rounds > 1 else ""))
    for row in rows:
        tests = [row[f"dpo_against_{name}"] for name in OTHERS]
        text = f"{row['seed']:4d} {row['n']:4d}" + accuracies(row)
        text += "".join(f"   {test['difference']:+.3f} ({test['p']:.2g})".ljust(19) for test in tests)
        text += f"{row['dpo_tokens']} / {row['sft_tokens']} / {row['sft_early_tokens']}"
        if rounds > 1:
            text += f"   {', '.join(f'{value:.3f}' for value in row['dpo_by_round'])}"
        print(text)
    print("by steps of the problem, all seeds:")
    for steps, each in shares.items():
        print(f"{steps:4d} {each['n']:4d}" + accuracies(each))


def accuracies(row):
    return "".join(f"  {row[name]:.3f}" for name in MODELS)


if __name__ == "__main__":
    if sys.argv[1:2] == ["equal-tokens"] and len(sys.argv) == 3:
        print(equal_tokens(Path(sys.argv[2])))
    elif sys.argv[1:2] == ["table"] and len(sys.argv) > 4:
        table(Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
    else:
        sys.exit(__doc__)
