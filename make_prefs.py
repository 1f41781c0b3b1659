"""Preferences where there are none: sampled and verified, corrupted, or paired from judged responses.

    model or solutions or judgements -> prefs.jsonl (prompt, chosen, rejected, meta: where each row comes from)
    python make_prefs.py --strategy corrupt --task arithmetic --num 400 --out corrupted.jsonl
    python make_prefs.py --strategy sample --model examples/tiny --task arithmetic --num 16 --k 4 --temperature 1 --gen_length 40 --block_length 1 --out sampled.jsonl

sample: k responses a prompt, a verified one against a wrong one; on-policy, so DPO teaches what this model gets wrong.
corrupt: a correct solution against the same with one named reasoning error. label: the better scored against the worse.
"""

import json
import math
import os
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal, Optional

import config
from cli import exits
from cli.parser import arg
from files import InputError, check_out
from reasoning import tasks


@dataclass
class PreferenceArguments:
    strategy: Literal["sample", "corrupt", "label"] = arg(
        "sample",
        "sample a model's responses and verify them; plant an error in correct solutions; pair the responses of a file by their "
        "scores",
        heading="Preferences",
    )
    task: Optional[str] = arg(
        None,
        f"sample, corrupt: problems of tasks.py, {', '.join(tasks.FAMILIES)}, or all; without it those of --in",
        metavar="NAME,...",
    )
    source: Optional[str] = arg(
        None,
        "a .jsonl file of prompts with their answers (sample; a right response ends in #### and the answer), solutions (corrupt) or "
        "scored responses (label); without it --task",
        "--in",
        metavar="FILE",
    )
    out: str = arg("prefs.jsonl", "the file of preferences to write", metavar="FILE")
    num: int = arg(400, "problems of --task, from the training split, drawn by --seed")
    k: int = arg(8, "sample: responses a prompt")
    pairs_per_prompt: int = arg(2, "sample, label: at most so many pairs a prompt")
    length_balanced: bool = arg(
        False, "sample, label: choose pairs so that chosen and rejected are equally long on average"
    )
    min_gap: float = arg(0.0, "label: a pair's scores differ by more than this")


def read_arguments(argv=None):
    """(PreferenceArguments, SampleArguments), checked as far as nothing needs to be loaded for it."""
    args, sampling = config.parse(argv, __doc__, PreferenceArguments, config.SampleArguments)
    check(args, sampling)
    return args, sampling


def check(args, sampling):
    """Refuse what makes no file before any work is done."""
    for name in ("num", "k", "pairs_per_prompt"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} is {getattr(args, name)}, expected at least 1")
    if not args.min_gap >= 0:
        raise InputError(f"--min_gap is {args.min_gap}, expected at least 0")
    if args.source and os.path.realpath(args.source) == os.path.realpath(args.out):
        raise InputError(f"--out {args.out} is the file that --in reads, which it would replace; give another")
    if args.strategy == "label" and (args.task or not args.source):
        raise InputError("--strategy label pairs the responses of a file: give --in judged.jsonl and no --task")
    if args.strategy == "corrupt" and bool(args.task) == bool(args.source):
        raise InputError(
            f"--strategy corrupt plants errors in correct solutions: give --task ({', '.join(tasks.FAMILIES)}, or "
            "all), or --in solutions.jsonl with prompt and response"
        )
    if args.strategy == "sample" and bool(args.task) == bool(args.source):
        raise InputError(
            "--strategy sample needs problems: --task arithmetic, or --in problems.jsonl with prompt and answer"
        )
    if args.task:
        families(args.task)
    check_out(args.out)
    if args.strategy == "sample":
        if not sampling.model_name_or_path:
            raise InputError("--strategy sample needs the model to sample from: add --model DIR")
        if args.k < 2:
            raise InputError(f"--k is {args.k}; a pair needs two responses to a prompt, expected at least 2")
        if sampling.temperature == 0:
            raise InputError(f"--temperature 0 gives {args.k} times the same response; add --temperature 1")


def families(text):
    """ "arithmetic,ordering" or "all" -> ("arithmetic", "ordering")"""
    names = tuple(tasks.FAMILIES) if text == "all" else tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in tasks.FAMILIES:
            raise InputError(f"--task {text}: no family '{name}'; there are {', '.join(tasks.FAMILIES)}, or all")
    return names


if __name__ == "__main__":
    exits.early(read_arguments)  # answers --help and mistakes before the imports below, which take seconds

import jsonlines

from files import replacing
from models.folders import model_fingerprint
from reasoning import mistakes, prompts, sampler, samples

# names of a judged line's prompt, response(s) and score(s)
NAMES = (
    ("prompt", "question", "instruction"),
    ("response", "responses", "completion", "completions", "output", "generation", "generations"),
    ("score", "scores", "rating", "ratings", "reward", "rewards", "overall_score", "label", "correct"),
)


# --- problems and responses -------------------------------------------------------------------------------


def problems(args, seed):
    """[{"prompt", "answer", "place"}], generated or read; the place names a row in messages and in meta."""
    if args.source:
        rows = prompts.read_rows(args.source)
        for place, row in rows.items():
            if isinstance(row, dict) and "prompt" not in row and "question" in row:
                row["prompt"] = row["question"]  # GSM8K's name
            if not isinstance(row, dict) or not row.get("prompt") or not isinstance(row.get("answer"), (str, int)):
                raise InputError(
                    f'{place}: expected a "prompt" (or "question") and an "answer", a string such as "8" or a text '
                    'that ends in "#### 8"'
                )
            answer = str(row["answer"])
            if tasks.extract_answer(f"#### {answer.rpartition('####')[2]}") is None:
                raise InputError(
                    f"{place}: the answer {answer[-40:]!r} is nothing that can be verified; expected one "
                    'number or word, such as "8" or a text that ends in "#### 8"'
                )
        return [
            {"prompt": row.get("prompt"), "answer": str(row["answer"]).rpartition("####")[2].strip(), "place": place}
            for place, row in rows.items()
        ]
    found = tasks.generate(args.num, "train", seed, families(args.task))
    return [
        {"prompt": problem.prompt, "answer": problem.answer, "place": f"{problem.family} {number}"}
        for number, problem in enumerate(found, 1)
    ]


def sample(args, sampling, rows, path):
    """k responses to each of `rows`, verified: [[{"text", "ended", "correct", ...}]]; kept in `path` as they come (samples.py)."""
    wanted = samples.header(sampling, model_fingerprint(sampling.model_name_or_path), args.k)
    made = samples.complete(
        path,
        wanted,
        dict(enumerate(rows)),
        sampling,
        lambda: sampler.load(sampling),
        note=lambda number, text: {"correct": tasks.verify(rows[number]["answer"], text)},
    )
    return list(made.values())


# --- pairs ------------------------------------------------------------------------------------------------


class Pairing:
    """Chooses pairs of a better and a worse response; with `balanced`, so that the lengths cancel over the whole file."""

    def __init__(self, most, balanced, seed):
        self.most, self.balanced, self.rng, self.surplus = most, balanced, random.Random(f"pairs {seed}"), 0

    def choose(self, candidates):
        """At most `most` of candidates [(chosen, rejected)], texts, no text twice unless there is no other."""
        chosen = []
        self.rng.shuffle(candidates)
        candidates = list(dict.fromkeys(candidates))  # what the model says often comes early
        while candidates and len(chosen) < self.most:
            used = Counter(text for pair in chosen for text in pair)
            cost = lambda pair: abs(self.surplus + len(pair[0]) - len(pair[1])) if self.balanced else 0  # noqa: E731
            pair = min(candidates, key=lambda pair: (used[pair[0]] + used[pair[1]], cost(pair)))
            candidates.remove(pair)
            chosen.append(pair)
            self.surplus += len(pair[0]) - len(pair[1])  # characters that the chosen have more so far
        return chosen


def sampled_rows(args, sampling, rows, responses):
    """Preference rows: verified against wrong. A response that did not end is neither: its end is not the model's own."""
    pairing = Pairing(args.pairs_per_prompt, args.length_balanced, sampling.seed)
    for row, group in zip(rows, responses):
        fit = [(reply["text"], reply["correct"]) for reply in group if reply["ended"] and reply["text"].strip()]
        right, wrong = ([text for text, correct in fit if correct is side] for side in (True, False))
        for chosen, rejected in pairing.choose([(a, b) for a in right for b in wrong]):
            yield {
                "prompt": row["prompt"],
                "chosen": chosen,
                "rejected": rejected,
                "meta": {
                    "strategy": "sample",
                    "model": sampling.model_name_or_path,
                    "seed": sampling.seed,
                    "place": row["place"],
                    "answer": row["answer"],
                    "correct": sum(reply["correct"] for reply in group),
                    "k": len(group),
                    "temperature": sampling.temperature,
                    "block_length": sampling.block_length,
                    "steps": sampling.steps,
                },
            }


def judged(path):
    """({prompt as JSON: [(score, response)]}, responses left out: cut off, or without a score) of a .jsonl file.

    A line has a prompt with one response and its score, or with lists of both, or with a list of such objects (NAMES).
    """
    groups, left_out = {}, 0
    for place, row in prompts.read_rows(path).items():
        row = row if isinstance(row, dict) else {}
        prompt, texts, scores = (next((row[name] for name in names if name in row), ...) for names in NAMES)
        if (
            isinstance(texts, list) and texts and all(isinstance(text, dict) for text in texts)
        ):  # UltraFeedback's completions
            texts, scores = zip(
                *[[next((each[name] for name in names if name in each), None) for names in NAMES[1:]] for each in texts]
            )
        if not isinstance(texts, (list, tuple)):
            texts, scores = [texts], [scores]
        if not (
            prompt
            and isinstance(scores, (list, tuple))
            and len(texts) == len(scores)
            and ... not in (prompt, *scores)
            and all(isinstance(text, str) for text in texts)
        ):
            raise InputError(
                f'{place}: expected a "prompt" with a "response" and a number "score", or with lists "responses" and "scores" '
                f"of one length, found {', '.join(row) or 'no object'}"
            )
        for text, score in zip(texts, scores):
            if (
                row.get("ended") is False or score is None or not text.strip()
            ):  # evaluate.py's: its end is not the model's own
                left_out += 1
                continue
            groups.setdefault(json.dumps(prompt), []).append((number(score, place), text))
    return groups, left_out


def number(score, place):
    """A finite number or truth value, also as a judge writes it: "9", "8.5"."""
    try:
        value = float(score) if isinstance(score, (bool, int, float, str)) else math.nan
    except (ValueError, OverflowError):
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"{place}: expected a score that is a finite number, found {json.dumps(score)[:80]}")
    return value


def labelled_rows(args, seed):
    pairing = Pairing(args.pairs_per_prompt, args.length_balanced, seed)
    groups, left_out = judged(args.source)
    without = 0  # prompts with nothing better and worse
    for prompt, group in groups.items():
        score = {}
        for value, text in group:  # a text judged twice: its mean
            score.setdefault(text, []).append(value)
        score = {text: sum(values) / len(values) for text, values in score.items()}
        pairs = [(a, b) for a in score for b in score if score[a] - score[b] > args.min_gap]
        without += not pairs
        for chosen, rejected in pairing.choose(pairs):
            yield {
                "prompt": json.loads(prompt),
                "chosen": chosen,
                "rejected": rejected,
                "meta": {
                    "strategy": "label",
                    "source": args.source,
                    "seed": seed,
                    "scores": [score[chosen], score[rejected]],
                },
            }
    print(
        f"{args.source}: {sum(map(len, groups.values()))} scored responses to {len(groups)} prompts, {without} of which have no better "
        f"and worse one; {left_out} responses left out, cut off, empty or without a score"
    )


def corrupted_rows(args, seed):
    """A correct solution against the same with one named error: of --task, or of --in's own, by mistakes.py."""
    meta = {"strategy": "corrupt", "seed": seed}
    if args.task:
        for row in tasks.preference_rows(args.num, "train", seed, families(args.task)):
            yield {**row, "meta": meta | row["meta"]}
        return
    rng, rows = random.Random(f"corrupt {seed}"), prompts.read_rows(args.source)
    left_out = 0
    for place, row in rows.items():
        prompt, solution, answer = worked(row, place)
        possible = tasks.leading_astray(mistakes.errors(prompt, solution), answer)
        if not possible:
            left_out += 1
            continue
        rejected, kind = tasks.choose(possible, rng)
        yield {
            "prompt": prompt,
            "chosen": mistakes.plain(solution),
            "rejected": rejected,
            "meta": meta | {"place": place, "error": kind, "answer": answer},
        }
    if left_out:
        print(
            f"{args.source}: {left_out} of {len(rows)} solutions left out: no equation whose consequences can be followed"
        )


def worked(row, place):
    """(prompt, solution, answer) of a row with a worked solution that ends in "#### answer", as GSM8K's do."""
    row = row if isinstance(row, dict) else {}
    prompt = next((row[name] for name in ("prompt", "question") if name in row), None)
    solution = next((row[name] for name in ("response", "solution", "answer") if name in row), None)
    if not isinstance(prompt, str) or not isinstance(solution, str) or tasks.extract_answer(solution) is None:
        raise InputError(
            f'{place}: expected a "prompt" (or "question") and a correct "response" (or "solution", "answer") '
            'that ends in "#### 8", its answer'
        )
    return prompt, solution, tasks.extract_answer(solution)


# --- command line -----------------------------------------------------------------------------------------


def summary(args, rows):
    lengths = [median(len(row[side]) for row in rows) for side in ("chosen", "rejected")]
    longer = sum(len(row["chosen"]) > len(row["rejected"]) for row in rows) / len(rows)
    lines = [
        f"{args.out}: {len(rows)} pairs of {len({json.dumps(row['prompt']) for row in rows})} prompts; median characters "
        f"{lengths[0]:.0f} chosen, {lengths[1]:.0f} rejected; chosen is the longer in {100 * longer:.0f}%"
    ]
    kinds = Counter(row["meta"]["error"] for row in rows if "error" in row["meta"])
    return lines + [f"  {count:6d}  {kind}" for kind, count in kinds.most_common()]


def main(argv=None):
    args, sampling = read_arguments(argv)
    if args.strategy == "sample":
        sampler.check(sampling)
        problem_rows, path = problems(args, sampling.seed), Path(f"{args.out}.samples.jsonl")
        responses = sample(args, sampling, problem_rows, path)
        flat = [reply["correct"] for group in responses for reply in group]
        ended = [[reply for reply in group if reply["ended"] and reply["text"].strip()] for group in responses]
        mixed = sum(len({reply["correct"] for reply in group}) == 2 for group in ended)
        count = sum(map(len, ended))
        print(f"{path}: {tasks.solved_line(flat)}; {count} ended; {mixed} of {len(responses)} prompts have both")
        if 2 * sum(tasks.extract_answer(reply["text"]) is not None for group in ended for reply in group) < count:
            print(
                'warning: most responses do not end in "#### answer", which is all that is verified; ask for it in the prompts'
            )
        rows = list(sampled_rows(args, sampling, problem_rows, responses))
    else:
        rows = list(
            labelled_rows(args, sampling.seed) if args.strategy == "label" else corrupted_rows(args, sampling.seed)
        )
    if not rows:
        raise InputError(
            f"{args.out}: no prompt has both a better and a worse response; "
            + {
                "sample": "raise --k or --temperature, or take problems nearer to what the model can do",
                "label": "lower --min_gap, or judge more responses a prompt",
                "corrupt": "give solutions with equations such as 7 + 5 = 12",
            }[args.strategy]
        )
    with replacing(args.out) as file:
        jsonlines.Writer(file).write_all(rows)
    print("\n".join(summary(args, rows)))
    print(
        f"next: python data_prep.py --in {args.out}"
        + (f" --model_name_or_path {sampling.model_name_or_path}" if args.strategy == "sample" else "")
    )


if __name__ == "__main__":
    exits.run(main)
