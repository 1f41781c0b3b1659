"""What reason.py says: the plan beforehand; the table, results.json and the report at the end; the log of its stages.

StageLog(OUT/stages.jsonl)     which stages are done, and how long they took
plan_lines(...)                problems, samples, pairs, hours of each stage, disk, whether it fits
write(...)                     the table, OUT/results.json (the same after any interruption), OUT/report/report.html
"""

import json
import os
import shlex
import sys
import time

import jsonlines
from reason_plan import here

from files import read_json, write_json
from reasoning import comparison
from training import plan_table

# --- the log of the stages --------------------------------------------------------------------------------


class StageLog:
    """A line when a stage begins, and one when it has ended; a killed one has no end."""

    def __init__(self, path):
        self.path, self.lines = path, []
        if path.is_file():
            whole, end, _ = path.read_bytes().rpartition(b"\n")  # without a torn last line
            self.lines = [json.loads(line) for line in whole.decode().splitlines()]
            os.truncate(path, len(whole + end))

    @property
    def done(self):
        return {line["stage"] for line in self.lines if "seconds" in line}

    @property
    def names(self):
        """The stages in their order."""
        return list(dict.fromkeys(line["stage"] for line in self.lines))

    def number(self, name):
        return self.names.index(name) + 1 if name in self.names else len(self.names) + 1

    def began(self, name, hours):
        self.add({"stage": name, "began": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "planned_hours": hours})

    def ended(self, name, seconds):
        self.add({"stage": name, "seconds": round(seconds, 1)})

    def add(self, line):
        self.lines.append(line)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def table(self):
        """[[stage, planned hours, hours, starts]]: hours are those of the attempt that ended."""
        rows = []
        for name in self.names:
            lines = [line for line in self.lines if line["stage"] == name]
            hours = [line["seconds"] / 3600 for line in lines if "seconds" in line]
            starts = [line["planned_hours"] for line in lines if "began" in line]
            planned = f"{starts[0]:.3g}" if starts[0] is not None else ""
            rows.append([name, planned, f"{hours[-1]:.3g}" if hours else "", len(starts)])
        return rows


# --- the plan ---------------------------------------------------------------------------------------------


def plan_lines(args, planner, numbers, out):
    """(lines, whether everything fits): what the loop does, and what it takes."""
    times, hours = planner.times(), planner.hours(numbers)
    samples = numbers.problems * numbers.k
    how = f"{planner.start.preset or 'no preset'}, {planner.start.ds_config}"
    found = [
        f"plan: {planner.start.model} ({how}), {args.task}, {args.method}, rounds: {args.rounds} -> {out}",
        f"a round: {numbers.problems} problems of the training split, {numbers.k} responses each ({samples} samples); "
        f"at most {numbers.most_rows} pairs and {numbers.most_rows} right responses, 1 in 8 prompts held out",
        f"validation: {numbers.validation} problems of the training split that are never sampled; test: {numbers.test} "
        "items",
        comparison.gain_line_of_share(numbers.test),
        f"{'stage':58}{'hours':>8}{'times':>7}{'in all':>8}",
    ]
    words = {
        "validation": f"validation of a model, {numbers.validation} responses",
        "test": f"test of a model, {numbers.test} responses",
        "sample": f"sampling, {samples} responses",
        "dpo": f"DPO, {numbers.most_rows} pairs, with their reference scores",
        "rft-1": f"SFT on {numbers.most_rows} right responses, 1 epoch",
        "rft-3": f"SFT on {numbers.most_rows} right responses, 3 epochs",
    }
    for stage, count in times.items():
        found.append(f"  {words[stage]:56}{hours[stage]:8.2f}{count:7}{count * hours[stage]:8.2f}")
    found.append(f"  {'in all, at most':56}{'':15}{planner.total(numbers):8.2f}")
    found.append(machine_line(planner.machine))
    found.append(f"disk: {planner.disk() / 1e9:.1f} GB, the model with it, checkpoints and merged models at their most")
    judged = {run: (made.fits, made.verdict) for run, made in planner.made.items()}
    sampled = plan_table.judged(planner.sampling(numbers.problems, numbers.k).items, planner.machine)
    for name, (_, verdict) in ({"sampling": sampled} | judged).items():
        found.append(f"{name}: {verdict}")
    if args.dry_run:
        found += ["the same by plan.py:", *commands(planner, numbers)]
    return found, all(fits for fits, _ in (sampled, *judged.values()))


def machine_line(machine):
    card = f"a card of {machine.gpu_gib:.0f} GiB at {machine.tflops:g} TFLOP/s"
    return f"planned for {card}, without the start of each command (a CPU takes longer); nothing was measured"


def commands(planner, numbers):
    """Commands of plan.py that print these hours."""
    shared = ["--model", planner.folder, *planner.model_flags()]
    lines, asked = planner.lines, ["--prompt_tokens", str(planner.lines.prompt)]
    found = []
    for purpose, count, own in (
        ("evaluate", numbers.validation, ["--tasks", "arithmetic"]),
        ("evaluate", numbers.test, ["--tasks", "arithmetic"]),
        ("make_prefs", numbers.problems, ["--task", "arithmetic", "--k", str(numbers.k)]),
    ):
        sampler = planner.sampler_flags(sampled=purpose == "make_prefs")
        longest = ["--longest_prompt", str(lines.longest_prompt)]
        found.append(["--for", purpose, *own, "--problems", str(count), *shared, *sampler, *asked, *longest])
    files = ["--model_name_or_path", planner.folder, "--deepspeed", planner.start.ds_config]
    rows = ["--pairs", str(numbers.most_rows), *asked, "--response_tokens", str(lines.response)]
    for run in planner.made:
        found.append([*planner.start.training(*planner.run_flags(run, numbers)), *files, *rows])
    return ["  python plan.py " + shlex.join([*words, *planner.machine_flags]) for words in found]


# --- what was measured ------------------------------------------------------------------------------------


def lines_by_model(folder):
    """{model: its line of evaluate.py's table}."""
    results = read_json(folder / "results.json", "reason.sh again")
    lines = {line["model"]: line for line in results["table"]}
    return {model["path"]: lines[label] for label, model in results["models"].items()}


def shares(accuracies):
    return ", ".join(f"{model} {value:.3f}" for model, value in accuracies.items())


def by_validation(rounds):
    """The model that each method chose, the one that solves most of the validation problems first."""
    last = [each[-1] for each in rounds.values()]
    return [each["chosen"] for each in sorted(last, key=accuracy_of_chosen, reverse=True)]


def accuracy_of_chosen(each):
    return each["candidates"][each["chosen"]]


def answers_of(folder, line):
    """The answers that a line of evaluate.py's table counts: comparison.grouped()."""
    with jsonlines.open(folder / line["file"]) as file:
        return comparison.grouped(list(file))


# --- the end ----------------------------------------------------------------------------------------------


def write(out, loop, rounds, lines):
    """results.json, the report and the table. rounds: of Loop.run(); lines: lines_by_model() of the test."""
    start = loop.start.model
    found = {"start": {"model": start, **measured(lines[start])}, "methods": {}}
    for method, each in rounds.items():
        chosen = each[-1]["chosen"]
        both = [answers_of(out / "test", lines[model]) for model in (chosen, start)]
        test = measured(lines[chosen]) | {"against_start": comparison.against(*both)}
        found["methods"][method] = {"model": chosen, **test, "rounds": each}
    statistics = {str(folder.relative_to(out)): each for folder, each in loop.statistics.items()}
    results = {"task": loop.args.task, "numbers": loop.numbers._asdict(), **found, "pairs": statistics}
    write_json(out / "results.json", results)
    runs = [out / f"round-{number}" for number in range(1, loop.args.rounds + 1)]
    runs = [path.parent for run in runs for path in sorted(run.glob("**/final")) if path.is_dir()]
    write_json(out / "tables.json", {"tables": tables(results, loop.stages.log)})
    command = [sys.executable, here("report.py"), *runs[:6], "--evaluation", out / "test"]
    command += ["--tables", out / "tables.json", "--out", out / "report"]
    loop.stages.do("report", None, out / "report" / "report.html", *command)
    print_table(results)
    print(f"{out}/results.json: the same as JSON; {out}/report/report.html: the report, with hours and answers")


def measured(line):
    return {name: line.get(name) for name in ("n", "accuracy", "ci95")}


def result_rows(results):
    """[[model, chosen, validation, test, 95% interval, against the start]]"""
    start = results["start"]
    validation = next(iter(results["methods"].values()))["rounds"][0]["candidates"][start["model"]]
    rows = [["start", start["model"], f"{validation:.3f}", *test_cells(start), "", ""]]
    for method, found in results["methods"].items():
        test = found["against_start"]
        share = accuracy_of_chosen(found["rounds"][-1])
        changed = f"{test['won']} won, {test['lost']} lost"
        rows.append([method, found["model"], f"{share:.3f}", *test_cells(found), changed, f"{test['p']:.2g}"])
    return rows


HEAD = ["", "chosen", "validation", "test", "95% interval", "against the start", "p"]


def test_cells(found):
    low, high = found["ci95"]
    return f"{found['accuracy']:.3f}", f"{abs(low):.3f}-{high:.3f}"


def print_table(results):
    print(
        f"{results['task']}: {results['numbers']['validation']} validation problems, {results['start']['n']} test items"
    )
    print_columns([HEAD, *result_rows(results)])
    for method, found in results["methods"].items():
        if found["model"] == results["start"]["model"]:
            print(f"{method}: no checkpoint solved more of the validation problems than the start, which stays")


def print_columns(rows):
    """Print rows of texts, of one length, in columns."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def tables(results, log):
    """What the report shows beside report.py's own: [{"title", "note", "head", "rows"}]."""
    rounds = []
    for method, found in results["methods"].items():
        for number, each in enumerate(found["rounds"], 1):
            for model, share in each["candidates"].items():
                rounds.append([number, method, model, f"{share:.3f}", "chosen" if model == each["chosen"] else ""])
    names = list(next(iter(results["pairs"].values())))
    pairs = [[name, *(each[name] for each in results["pairs"].values())] for name in names]
    return [
        {
            "title": "Does it reason better?",
            "note": f"{results['task']}: each method's model, chosen on the validation problems; McNemar's exact test "
            "of its answers to the test items against the start's.",
            "head": HEAD,
            "rows": result_rows(results),
        },
        {
            "title": "Checkpoints",
            "note": f"Share solved of {results['numbers']['validation']} validation problems, which are of the "
            "training split and were never sampled.",
            "head": ["round", "method", "model", "validation", ""],
            "rows": rounds,
        },
        {"title": "Samples and pairs", "note": "", "head": ["", *results["pairs"]], "rows": pairs},
        {
            "title": "Hours of each stage",
            "note": "Planned for a card, before the start; measured: of the attempt that ended.",
            "head": ["stage", "planned", "measured", "starts"],
            "rows": log.table(),
        },
    ]
