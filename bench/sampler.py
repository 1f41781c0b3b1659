"""The sampler's approximations against plain decoding on the same problems: passes, tokens read, tokens/s, accuracy.

    python bench/sampler.py                                                       the embedded model, short answers
    python bench/sampler.py --model runs/longer-answers --task sheets --num 64    200 tokens each (longer_answers.py)

Plain commits one token a pass and reads every row as a whole. cache: what a pass does not read again. rule: which
predictions a pass commits: the most confident one, all above a threshold, by Fast-dLLM's factor (arXiv 2505.22618,
section 3.3), or above a threshold that changes from a block's first token to its last. Rates are by the processor's
time, medians of turns in which every setting is measured once.
"""

import argparse
import functools
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from longer_answers import BLOCK, GEN_LENGTH, grade, sheets

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import files
from cli import exits
from config import SampleArguments
from files import InputError
from reasoning import arguments, commits, prompts, sampler, tasks
from reasoning.comparison import mcnemar

# --- rules that the product does not have: which of a block's predictions (n,) a pass commits ------------


class Factor:
    """The n most confident, n the largest number for which (n + 1)(1 - the least of their confidences) < factor."""

    def __init__(self, factor):
        self.factor = factor

    def __call__(self, confidence, commits, threshold):
        order = confidence.argsort(descending=True, stable=True)
        numbers = torch.arange(len(confidence)) + 2
        count = max(1, int(((1 - confidence[order]) * numbers < self.factor).sum()))
        return torch.zeros(len(confidence), dtype=torch.bool).index_fill(0, order[:count], True)


class Schedule:
    """A threshold that goes from `first`, while all of a block is masked, to `last`, straight with what is masked."""

    def __init__(self, first, last, block_length):
        self.first, self.last, self.block_length = first, last, block_length

    def __call__(self, confidence, commits, threshold):
        masked = len(confidence) / self.block_length
        least = self.last + (self.first - self.last) * masked
        return (confidence >= least) | (torch.arange(len(confidence)) == confidence.argmax())


# --- settings ---------------------------------------------------------------------------------------------


class Setting(NamedTuple):
    flags: dict  # of SampleArguments, beside the task's
    rule: object = None  # in the place of commits.most_confident

    @property
    def cache(self):
        every = f" {self.flags['refresh']}" if "refresh" in self.flags else ""
        return self.flags.get("cache", "none") + every

    @property
    def commits(self):
        if isinstance(self.rule, Factor):
            return f"factor {self.rule.factor}"
        if isinstance(self.rule, Schedule):
            return f"{self.rule.first} to {self.rule.last}"
        return f"threshold {self.flags['threshold']}" if "threshold" in self.flags else "one"


def settings(block_length):
    dual, surest = {"cache": "dual"}, {"threshold": 0.9}  # of a rule, so that --steps does not count
    found = [Setting({"cache": cache}) for cache in ("none", "prefix", "dual")]
    found += [Setting(dual | {"refresh": every}) for every in (4, 16)]
    found += [Setting({"cache": cache, "threshold": 0.9}) for cache in ("none", "prefix")]
    found += [Setting(dual | {"threshold": threshold}) for threshold in (0.95, 0.9, 0.8, 0.7)]
    found.append(Setting(dual | surest | {"refresh": 4}))
    found += [Setting(dual | surest, Factor(factor)) for factor in (0.5, 1.0, 1.5)]
    schedules = ((0.95, 0.7), (0.7, 0.95), (0.95, 0.85))
    return found + [Setting(dual | surest, Schedule(*ends, block_length)) for ends in schedules]


# --- what is asked ----------------------------------------------------------------------------------------


class Asked(NamedTuple):
    prompts: list  # of token ids
    graders: list  # of each: text -> [True, False or None] of its problems
    gen_length: int
    block_length: int


def ask(task, count, tokenizer):
    if task == "sheets":
        made = sheets(count, "test", 0, tokenizer)
        ids = tokenizer([each.prompt for each in made]).input_ids
        return Asked(ids, [functools.partial(grade, each) for each in made], GEN_LENGTH, BLOCK)
    problems = tasks.generate(count, "test", 0, (task,))
    ids = [prompts.prompt_ids(tokenizer, {"prompt": each.prompt}, "problem", "auto") for each in problems]
    return Asked(ids, [functools.partial(grade_one, each) for each in problems], 40, 8)


def grade_one(problem, text):
    return [tasks.verify(problem, text)]


# --- measuring --------------------------------------------------------------------------------------------


class Passes:
    """Counts what sampler.respond() says of its passes."""

    def begin(self, lengths, batch_size):
        self.count, self.tokens, self.of_responses = 0, 0, 0

    def passed(self, seconds, tokens, rows):
        self.count, self.tokens = self.count + 1, self.tokens + tokens

    def ended(self, passes, tokens):
        self.of_responses += passes


class Run(NamedTuple):
    """One setting's answers to all prompts."""

    seconds: float  # of the processor
    passes: float  # per response
    read: float  # tokens per response
    full: float  # responses per pass
    responses: list

    @property
    def rate(self):
        """Tokens per second, of the texts up to their ends."""
        return sum(response.tokens for response in self.responses) / self.seconds


def measure(model, tokenizer, sample, setting, asked):
    sample = replace(
        sample, gen_length=asked.gen_length, block_length=min(asked.block_length, asked.gen_length), **setting.flags
    )
    arguments.check(sample)
    passes, rule = Passes(), commits.most_confident
    commits.most_confident = setting.rule or rule
    began = time.process_time()
    responses = sampler.respond(model, tokenizer, asked.prompts, sample, pace=passes)
    seconds, commits.most_confident = time.process_time() - began, rule
    each = len(responses)
    return Run(seconds, passes.of_responses / each, passes.tokens / each, passes.of_responses / passes.count, responses)


def verdicts(asked, run):
    """[True, False or None] of all problems."""
    return [each for grader, response in zip(asked.graders, run.responses) for each in grader(response.text)]


def row(setting, turns, plain, asked):
    """A row of the table: a setting's Runs, one a turn, beside plain's."""
    run, rate = turns[0], statistics.median(turn.rate for turn in turns)
    right, plain_right = (verdicts(asked, each) for each in (run, plain[0]))
    pairs = list(zip(plain_right, right))
    lost = sum(before is True and after is not True for before, after in pairs)
    won = sum(before is not True and after is True for before, after in pairs)
    low, high = tasks.wilson(right.count(True) / len(right), len(right))
    return {
        "cache": setting.cache,
        "commits": setting.commits,
        "passes": run.passes,
        "read": run.read,
        "full": run.full,
        "rate": rate,
        "ratio": statistics.median(turn.rate / base.rate for turn, base in zip(turns, plain)),
        "solved": right.count(True),
        "of": len(right),
        "low": low,
        "high": high,
        "differ": sum(a.text != b.text for a, b in zip(run.responses, plain[0].responses)),
        "lost": lost,
        "won": won,
        "p": mcnemar(lost, won),
    }


def show(found):
    interval = f"{100 * found['low']:.1f}-{100 * found['high']:.1f}"
    share = f"{100 * found['solved'] / found['of']:.1f}% ({interval})"
    print(
        f"{found['cache']:<10}{found['commits']:<15}{found['passes']:7.1f}{found['read']:9.0f}{found['rate']:10.0f}"
        f"{found['ratio']:7.2f}  {share:<20}{found['differ']:7}{found['lost']:6}{found['won']:5}{found['p']:7.2f}",
        flush=True,
    )


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(ROOT / "examples" / "tiny"))
    parser.add_argument("--task", default="arithmetic", help="an embedded task, or sheets")
    parser.add_argument("--num", type=int, default=200, help="prompts")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", help="write the table there")
    args = parser.parse_args(argv)
    names = [*tasks.FAMILIES, "sheets"]
    if args.task not in names or args.num < 1 or args.turns < 1:
        raise InputError(f"--task is one of {', '.join(names)}; --num and --turns are at least 1")
    torch.set_num_threads(1)
    sample = SampleArguments(
        model_name_or_path=args.model, use_mixed_precision="no", device=args.device, batch_size=args.batch_size
    )
    model, tokenizer = sampler.load(sample)
    asked = ask(args.task, args.num, tokenizer)
    measured = settings(asked.block_length)
    print(
        f"{args.num} prompts of {args.task}, gen_length {asked.gen_length}, blocks of {asked.block_length}, "
        f"{args.batch_size} rows a pass, {args.device}, one thread, {args.turns} turn(s)\n"
        f"{'cache':<10}{'commits':<15}{'passes':>7}{'read':>9}{'tokens/s':>10}{'ratio':>7}  {'solved':<20}{'differ':>7}"
        f"{'lost':>6}{'won':>5}{'p':>7}",
        flush=True,
    )
    runs, table = [[] for _ in measured], []
    for turn in range(args.turns):
        for setting, taken in zip(measured, runs):
            taken.append(measure(model, tokenizer, sample, setting, asked))
            if turn == args.turns - 1:
                table.append(row(setting, taken, runs[0], asked))
                show(table[-1])
    if args.json:
        files.write_json(args.json, {"table": table, "torch": torch.__version__})


if __name__ == "__main__":
    exits.run(main)
