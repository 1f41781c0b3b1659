"""Preferences where there are none: sampled and verified, corrupted, or paired from judged responses.

    model or solutions or judgements -> prefs.jsonl (prompt, chosen, rejected, meta: where each row comes from)
    python make_prefs.py --strategy corrupt --task arithmetic --num 400 --out corrupted.jsonl
    python make_prefs.py --model examples/tiny --task arithmetic --temperature 1 --gen_length 40 --block_length 1

sample: k responses per prompt, a verified one against a wrong one: DPO then teaches what this very model gets wrong.
corrupt: a correct solution against the same with one named reasoning error. label: the higher scored against the lower.
"""

import json
import os
import random
import shlex
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal, NamedTuple, Optional

import config
from cli import exits
from cli.parser import arg
from files import InputError, check_out
from reasoning import arguments, tasks


@dataclass
class PreferenceArguments:
    strategy: Literal["sample", "corrupt", "label"] = arg(
        "sample",
        "sample: sample a model's responses and verify them; corrupt: plant an error in correct solutions; "
        "label: pair the responses of a file by their scores",
        heading="Preferences",
    )
    task: Optional[str] = arg(
        None,
        f"sample, corrupt: generated problems, {', '.join(tasks.FAMILIES)}, or all ({tasks.ALL}); default: those of "
        "--in",
        metavar="NAME,...",
    )
    source: Optional[str] = arg(
        None,
        "a .jsonl file of prompts with their answers (sample), with solutions that end in #### and the answer "
        "(corrupt) or with scored responses (label); default: --task",
        "--in",
        metavar="FILE",
    )
    out: str = arg("prefs.jsonl", "the file of preferences to write", metavar="FILE")
    num: int = arg(400, "problems of --task, from the training split, drawn by --seed")
    k: int = arg(8, "sample: responses per prompt")
    pairs_per_prompt: int = arg(2, "sample, label: maximum number of pairs per prompt")
    length_balanced: bool = arg(
        False, "sample, label: choose pairs so that chosen and rejected are equally long on average"
    )
    min_gap: float = arg(0.0, "label: the scores of a pair differ by more than this")
    columns: Optional[str] = arg(
        None,
        "names of the columns of --in, such as prompt=q,answer=gold, or prompt=q,response=text,score=judge (label)",
        metavar="NAME=COLUMN,...",
    )
    ignore_columns: Optional[str] = arg(None, f"--in: {config.IGNORE_COLUMNS}", metavar="COLUMN,...")
    reasoning: Literal["auto", "drop", "inline"] = arg("auto", f"label: {config.REASONING}")


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
    if not args.source and (args.columns or args.ignore_columns):
        raise InputError("--columns and --ignore_columns name columns of a file: give --in FILE")
    if args.strategy != "label" and args.reasoning != "auto":
        raise InputError("--reasoning is for --strategy label, which reads the messages of responses")
    if args.strategy == "corrupt" and bool(args.task) == bool(args.source):
        raise InputError(
            f"--strategy corrupt plants errors in correct solutions: give --task ({', '.join(tasks.FAMILIES)}, or "
            "all), or --in solutions.jsonl with prompt and response"
        )
    if args.task:
        families(args.task)
    if args.strategy == "sample":
        check_sampling(args, sampling)
    check_out(args.out)


def check_sampling(args, sampling):
    """check() of --strategy sample."""
    if bool(args.task) == bool(args.source):
        raise InputError(
            "--strategy sample needs problems: --task arithmetic, or --in problems.jsonl with prompt and answer"
        )
    if not sampling.model_name_or_path:
        raise InputError("--strategy sample needs the model to sample from: add --model DIR")
    arguments.check_values(sampling)
    if args.k < 2:
        raise InputError(f"--k is {args.k}; a pair needs two responses to a prompt, expected at least 2")
    if sampling.temperature == 0:
        raise InputError(f"--temperature 0 gives the same response {args.k} times; add --temperature 1")


def families(text):
    """ "arithmetic,ordering" or "all" -> ("arithmetic", "ordering")"""
    names = tuple(tasks.EMBEDDED) if text == "all" else tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in tasks.FAMILIES:
            raise InputError(f"--task {text}: no family '{name}'; there are {', '.join(tasks.FAMILIES)}, or all")
    return names


if __name__ == "__main__":
    exits.early(read_arguments)  # answers --help and mistakes before the imports below, which take seconds

import jsonlines

from files import replacing
from models.folders import model_fingerprint
from preferences import columns
from reasoning import answers, judged, mistakes, problems, sampler, samples
from reasoning.pairing import Pairing


class Made(NamedTuple):
    """What a strategy makes."""

    rows: list  # {"prompt", "chosen", "rejected", "meta"}
    report: list  # lines for the user: what was left out, and why


# --- sample: a model's responses, verified ----------------------------------------------------------------


def sampled(args, sampling):
    """Made of a model's own responses, kept in OUT.samples.jsonl as they come (reasoning/samples.py)."""
    arguments.check(sampling)
    found = problems_of(args, sampling.seed)
    path = Path(f"{args.out}.samples.jsonl")

    def verdict(number, text):
        return answers.grade(found[number].kind, found[number].answer, text)

    def load():
        return sampler.load(sampling)

    asked = {number: {"prompt": each.prompt, "place": each.place} for number, each in enumerate(found)}
    wanted = samples.header(sampling, model_fingerprint(sampling.model_name_or_path))
    responses = samples.complete(path, wanted, asked, sampling, load, k=args.k, note=verdict)
    rows = pair_samples(args, sampling, found, responses.values())
    return Made(rows, describe_samples(path, responses.values()))


def problems_of(args, seed):
    """[problems.Own], generated or read; the place names a row in messages and in meta."""
    if args.source:
        return read_problems(args, problems.NAMES)
    found = tasks.generate(args.num, "train", seed, families(args.task))
    return [
        problems.Own(
            problem.prompt,
            problem.prompt,
            *answers.gold(problem.answer),
            solution=problem.solution,
            place=f"{problem.family} {number}",
        )
        for number, problem in enumerate(found, 1)
    ]


def read_problems(args, names):
    """[problems.Own] of --in; names: {role: names that its column may have}."""
    given = columns.parse_columns(args.columns, problems.ROLES)
    return problems.read(args.source, given, columns.parse_names(args.ignore_columns), names)


def complete(group):
    """The responses that ended by themselves. The others make no pair: how they end is not the model's choice."""
    return [reply for reply in group if reply["ended"] and reply["text"].strip()]


def pair_samples(args, sampling, found, responses):
    """Preference rows of right against wrong responses; one without a readable answer is neither."""
    pairing = Pairing(args.pairs_per_prompt, args.length_balanced, sampling.seed)
    rows = []
    for each, group in zip(found, responses):
        right = [reply["text"] for reply in complete(group) if reply["correct"] is True]
        wrong = [reply["text"] for reply in complete(group) if reply["correct"] is False]
        meta = {
            "strategy": "sample",
            "model": sampling.model_name_or_path,
            "seed": sampling.seed,
            "place": each.place,
            "answer": each.answer,
            "correct": sum(reply["correct"] is True for reply in group),
            "unread": sum(reply["correct"] is None for reply in group),
            "k": len(group),
            "temperature": sampling.temperature,
            "block_length": sampling.block_length,
            "steps": sampling.steps,
        }
        for chosen, rejected in pairing.choose([(a, b) for a in right for b in wrong]):
            rows.append({"prompt": each.prompt, "chosen": chosen, "rejected": rejected, "meta": meta})
    return rows


def is_mixed(group):
    """Whether a prompt's responses are right and wrong ones."""
    return {True, False} <= {reply["correct"] for reply in group}


def describe_samples(path, responses):
    """How many responses are right, and of what use they are."""
    verdicts = [reply["correct"] for group in responses for reply in group]
    ended = [complete(group) for group in responses]
    count = sum(map(len, ended))
    mixed = sum(is_mixed(group) for group in ended)
    lines = [
        f"{path}: {tasks.solved_line(verdicts)}; {count} ended by themselves; {mixed} of {len(ended)} prompts "
        "have both right and wrong responses"
    ]
    unread = sum(reply["correct"] is None for group in ended for reply in group)
    if 2 * unread > count:
        lines.append(
            "warning: most responses have no answer that can be read, so they make no pair; ask for one in the "
            "prompts, such as: End with #### and the answer alone."
        )
    return lines


# --- label: judged responses ------------------------------------------------------------------------------


def labelled(args, sampling):
    """Made of the better against the worse scored responses of --in."""
    pairing = Pairing(args.pairs_per_prompt, args.length_balanced, sampling.seed)
    given = columns.parse_columns(args.columns, (*judged.NAMES, *columns.PARTS))
    found = judged.read(args.source, given, columns.parse_names(args.ignore_columns), args.reasoning)
    rows, without = [], 0  # prompts without a pair
    for prompt, scores in found.groups.items():
        pairs = [(a, b) for a in scores for b in scores if scores[a] - scores[b] > args.min_gap]
        without += 0 if pairs else 1
        for chosen, rejected in pairing.choose(pairs):
            meta = {
                "strategy": "label",
                "source": args.source,
                "seed": sampling.seed,
                "scores": [scores[chosen], scores[rejected]],
            }
            rows.append({"prompt": json.loads(prompt), "chosen": chosen, "rejected": rejected, "meta": meta})
    report = (
        f"{args.source}: {found.responses} scored responses to {len(found.groups)} prompts, {without} of them "
        f"without a pair; {found.left_out} responses left out (cut off, null, empty or without a score)"
    )
    return Made(rows, [*found.lines, report])


# --- corrupt: planted errors ------------------------------------------------------------------------------


def corrupted(args, sampling):
    """Made of correct solutions, of --task or --in, against the same with one named error (reasoning/mistakes.py)."""
    seed = sampling.seed
    meta = {"strategy": "corrupt", "seed": seed}
    if args.task:
        rows = list(tasks.preference_rows(args.num, "train", seed, families(args.task)))
        return Made([row | {"meta": meta | row["meta"]} for row in rows], [])
    rng = random.Random(f"corrupt {seed}")
    solutions = read_problems(args, problems.WORKED)
    rows = []
    for each in solutions:
        if "####" not in each.solution:
            raise InputError(
                f'{each.place}: expected a correct "response" (or "solution", "answer") that ends in "#### 8", its '
                "answer"
            )
        possible = tasks.leading_astray(mistakes.errors(each.text, each.solution), each.answer)
        if possible:
            rejected, kind = tasks.choose(possible, rng)
            about = meta | {"place": each.place, "error": kind, "answer": each.answer}
            chosen = mistakes.plain(each.solution)
            rows.append({"prompt": each.prompt, "chosen": chosen, "rejected": rejected, "meta": about})
    left_out = len(solutions) - len(rows)
    report = f"{args.source}: {left_out} of {len(solutions)} solutions left out: none of their equations can be changed"
    return Made(rows, [report] if left_out else [])


# --- command line -----------------------------------------------------------------------------------------

STRATEGIES = {"sample": sampled, "label": labelled, "corrupt": corrupted}
REMEDIES = {  # for a file without a pair
    "sample": "raise --k or --temperature, or give problems that the model solves sometimes",
    "label": "give several responses to a prompt, with different scores, or lower --min_gap",
    "corrupt": "give solutions with equations such as 7 + 5 = 12",
}
SHARED = {"model_name_or_path", "trust_remote_code", "mask_token_id", "end_token_id", "shift_logits", "block_size"}
SHARED |= {"template"}


def describe(args, rows):
    """What the file holds: numbers, lengths, kinds of errors."""
    chosen = median(len(row["chosen"]) for row in rows)
    rejected = median(len(row["rejected"]) for row in rows)
    longer = sum(len(row["chosen"]) > len(row["rejected"]) for row in rows) / len(rows)
    count = len({json.dumps(row["prompt"]) for row in rows})
    kinds = Counter(row["meta"]["error"] for row in rows if "error" in row["meta"])
    return [
        f"{args.out}: {len(rows)} pairs of {count} prompts; median characters {chosen:.0f} chosen, {rejected:.0f} "
        f"rejected; chosen is the longer in {100 * longer:.0f}%",
        *(f"  {count:6d}  {kind}" for kind, count in kinds.most_common()),
    ]


def main(argv=None):
    args, sampling = read_arguments(argv)
    made = STRATEGIES[args.strategy](args, sampling)
    for line in made.report:
        print(line, flush=True)
    if not made.rows:
        raise InputError(f"{args.out}: no prompt has both a better and a worse response; {REMEDIES[args.strategy]}")
    with replacing(args.out) as file:
        jsonlines.Writer(file).write_all(made.rows)
    print("\n".join(describe(args, made.rows)))
    print(f"next: python data_prep.py --in {shlex.quote(args.out)} {config.flags(SHARED, sampling)}".rstrip())


if __name__ == "__main__":
    exits.run(main)
