"""Sample responses with LLaDA's sampler (reasoning/sampler.py says what it computes).

    --prompt TEXT -> the response, on stdout; --in FILE --out FILE -> its rows, each with a "response";
    --task NAME -> solved 93 of 200 (46.5%, ...)
    python generate.py --model examples/tiny --gen_length 40 --block_length 1 --prompt "Question: What is 7 + 5?"
    python generate.py --model examples/tiny --gen_length 40 --block_length 1 --in examples/prefs.jsonl --out out.jsonl
    python generate.py --model examples/tiny --gen_length 40 --block_length 1 --task arithmetic --num 20

To resume a long job where it was stopped, and for benchmarks such as GSM8K, use evaluate.py.
"""

import contextlib
import shlex
import sys
import time
from dataclasses import dataclass
from typing import Optional

import config
from cli import exits
from cli.parser import arg
from files import InputError, check_out
from reasoning import arguments, benchmarks, tasks


@dataclass
class GenerateArguments:
    prompt: Optional[str] = arg(
        None,
        "one prompt; its response is printed",
        metavar="TEXT",
        heading="What is answered: one of --prompt, --in, --task",
    )
    source: Optional[str] = arg(
        None, 'a .jsonl file; the "prompt" of its lines is a string or a list of messages', "--in", metavar="FILE"
    )
    task: Optional[str] = arg(
        None,
        f"solve held-out problems and verify the answers: {', '.join(tasks.FAMILIES)}, or all ({tasks.ALL})",
        metavar="NAME",
    )
    out: Optional[str] = arg(
        None,
        'a .jsonl file to write: the rows with a "response" added or replaced; required with --in, optional otherwise',
        metavar="FILE",
    )
    num: int = arg(200, "problems of --task, drawn by --seed")


def read_arguments(argv=None):
    """(GenerateArguments, SampleArguments), checked as far as nothing needs to be loaded for it."""
    args, sample = config.parse(argv, __doc__, GenerateArguments, config.SampleArguments)
    arguments.check_values(sample)
    what = {"--prompt": args.prompt, "--in": args.source, "--task": args.task}
    given = [flag for flag, value in what.items() if value is not None]
    if len(given) != 1:
        raise InputError(f"{' and '.join(given) or 'nothing'} given; expected one of --prompt, --in and --task")
    if args.task in benchmarks.BENCHMARKS and args.task not in tasks.FAMILIES:
        raise InputError(
            f"--task is {args.task!r}, a benchmark; run: python evaluate.py --tasks {args.task} --model "
            f"{shlex.quote(sample.model_name_or_path or 'MODEL')}"
        )
    if args.task is not None and args.task not in (*tasks.FAMILIES, "all"):
        raise InputError(f"--task is {args.task!r}; expected {', '.join(tasks.FAMILIES)} or all")
    if args.num < 1:
        raise InputError(f"--num is {args.num}; expected at least 1")
    if args.source is not None and not args.out:
        raise InputError("--in needs a file for the responses: add --out out.jsonl")
    if args.out:
        check_out(args.out)
    if args.prompt is not None and any("\ud800" <= c <= "\udfff" for c in args.prompt):
        raise InputError("--prompt holds bytes that are not UTF-8 text")
    return args, sample


if __name__ == "__main__":
    exits.early(read_arguments)  # answers --help and mistakes before the imports below, which take seconds

import jsonlines

from files import replacing
from models import tokenization
from reasoning import pace, prompts, sampler, samples


def main(argv=None):
    args, sample = read_arguments(argv)
    arguments.check(sample)
    # 1. Read or draw the prompts.
    problems = []
    if args.source is not None:
        rows = prompts.read_rows(args.source)
    elif args.task is not None:
        families = tuple(tasks.EMBEDDED) if args.task == "all" else (args.task,)
        problems = tasks.generate(args.num, "test", sample.seed, families)
        rows = {f"problem {number}": row_of(problem) for number, problem in enumerate(problems, 1)}
    else:
        rows = {"--prompt": {"prompt": args.prompt}}
    tokenizer = tokenization.load_tokenizer(sample.model_name_or_path, sample.trust_remote_code)
    asked = [prompts.prompt_ids(tokenizer, row, place, sample.template) for place, row in rows.items()]
    rows = list(rows.values())
    # 2. Sample the responses.
    model, _ = sampler.load(sample)
    noun = "problems" if problems else "prompts"
    for row, response in zip(rows, timed_responses(model, tokenizer, asked, sample, noun)):
        row["response"] = response.text
    # 3. Verify, write and print them.
    for row, problem in zip(rows, problems):
        row["correct"] = tasks.verify(problem, row["response"])
    if args.out:
        with replacing(args.out) as file:
            jsonlines.Writer(file).write_all(rows)
    if args.prompt is not None:
        print(rows[0]["response"])
    if problems:
        print_solved(rows, "family" if args.task == "all" else "steps")


def row_of(problem):
    """What is written of an embedded problem, beside its response."""
    return {"prompt": problem.prompt, "answer": problem.answer, "family": problem.family, "steps": len(problem.steps)}


def timed_responses(model, tokenizer, asked, sample, noun):
    """sampler.respond() with a progress bar, then the speed, on stderr. noun: what the prompts are called."""
    started = time.monotonic()
    with contextlib.closing(pace.Bar(samples.longest_passes(model, asked, sample), len(asked), noun=noun)) as bar:
        responses = sampler.respond(model, tokenizer, asked, sample, pace=bar)
    rate = sum(response.tokens for response in responses) / (time.monotonic() - started)
    print(f"{rate:.0f} tokens/s", file=sys.stderr)
    return responses


def print_solved(rows, by):
    """How many problems are solved, in all and by "family" or "steps"."""
    print(tasks.solved_line([row["correct"] for row in rows]))
    for value in sorted({row[by] for row in rows}):
        name = f"{value}-step problems" if by == "steps" else value
        print(f"  {name}: {tasks.solved_line([row['correct'] for row in rows if row[by] == value])}")


if __name__ == "__main__":
    exits.run(main)
