"""LLaDA's sampler: a response starts as masks, and the most confident predictions are committed, block by block.

    --prompt TEXT -> the response on stdout; --in FILE --out FILE -> its rows with a "response"; --task NAME -> solved 93 of 200 (46.5%, ...)
    python generate.py --model examples/tiny --gen_length 40 --block_length 1 --prompt "Question: What is 7 + 5?"
    python generate.py --model examples/tiny --gen_length 40 --block_length 1 --in examples/prefs.jsonl --out responses.jsonl
    python generate.py --model examples/tiny --gen_length 40 --block_length 1 --task arithmetic --num 20

Each forward pass predicts c_i = argmax_v exp(z_iv) / (-log u_iv)^temperature, u ~ U(0, 1), at the block's masked
positions i and commits those where softmax(z_i)[c_i] is highest; the others stay masked (low-confidence remasking).
With guidance z = u + (cfg_scale + 1)(c - u), c the logits and u those without the prompt.
Source: Nie et al., arXiv 2502.09992, and ML-GSAI/LLaDA's generate.py, token for token, but for these, which that leaves
to chance or to an accident of its code:
  * Noise and random confidence come from a CPU generator per response, not from the device's one.
  * Equal confidences are committed from left to right. (Under confidence_eos_eot_inf every eos has confidence 0.)
  * confidence_eos_eot_inf holds for eos at any temperature; there, at temperature 0 only.
  * A mask id in the prompt or predicted (a trained model predicts none) stays; there, later passes may fill it.
  * A response takes no further passes after a block with an end; its text, which is cut there, is the same.
--threshold is an approximation, in return for fewer passes: a pass commits every prediction at least that confident,
and always the surest, as if they did not depend on each other. Source: Fast-dLLM, arXiv 2505.22618.
B batch, P prompt tokens, L = P + gen_length, V vocabulary, N masked positions of the current block, over the batch.
"""

import sys
import time
from dataclasses import dataclass
from typing import Optional

import config
from cli import exits
from cli.parser import arg
from config import SampleArguments
from files import InputError, check_out
from reasoning import tasks


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
        None, f"solve test problems of tasks.py, verified: {', '.join(tasks.FAMILIES)}, or all", metavar="NAME"
    )
    out: Optional[str] = arg(
        None,
        'a .jsonl file to write: the rows with a "response" added or replaced; needed with --in, else none is written',
        metavar="FILE",
    )
    num: int = arg(200, "problems of --task, drawn by --seed")


def read_arguments(argv=None):
    """(GenerateArguments, SampleArguments), checked as far as nothing needs to be loaded for it."""
    args, sample = config.parse(argv, __doc__, GenerateArguments, SampleArguments)
    given = [
        flag
        for flag, value in (("--prompt", args.prompt), ("--in", args.source), ("--task", args.task))
        if value is not None
    ]
    if len(given) != 1:
        raise InputError(f"{' and '.join(given) or 'nothing'} given; expected one of --prompt, --in and --task")
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
from tqdm import tqdm

from files import replacing
from models.tokenization import load_tokenizer
from reasoning.prompts import prompt_ids, read_rows
from reasoning.sampler import check, load, respond
from reasoning.tasks import solved_line


def main(argv=None):
    args, sample = read_arguments(argv)
    check(sample)
    problems = []
    if args.source is not None:
        rows = read_rows(args.source)
    elif args.task is not None:
        families = tuple(tasks.FAMILIES) if args.task == "all" else (args.task,)
        problems = tasks.generate(args.num, "test", sample.seed, families)
        rows = {
            f"problem {number}": {
                "prompt": problem.prompt,
                "answer": problem.answer,
                "family": problem.family,
                "steps": len(problem.steps),
            }
            for number, problem in enumerate(problems, 1)
        }
    else:
        rows = {"--prompt": {"prompt": args.prompt}}
    tokenizer = load_tokenizer(sample.model_name_or_path, sample.trust_remote_code)
    prompts = [prompt_ids(tokenizer, row, place, sample.template) for place, row in rows.items()]
    rows = list(rows.values())
    model, _ = load(sample)
    started = time.monotonic()
    with tqdm(total=len(rows), unit="response", mininterval=1 if sys.stderr.isatty() else 30) as bar:
        responses = respond(model, tokenizer, prompts, sample, finished=lambda replies: bar.update(len(replies)))
    rate = sum(response.tokens for response in responses) / (time.monotonic() - started)
    print(f"{rate:.0f} tokens/s", file=sys.stderr)
    for row, response in zip(rows, responses):
        row["response"] = response.text
    for row, problem in zip(rows, problems):
        row["correct"] = tasks.verify(problem, row["response"])
    if args.out:
        with replacing(args.out) as file:
            jsonlines.Writer(file).write_all(rows)
    if args.prompt is not None:
        print(rows[0]["response"])
    if problems:
        print_solved(rows, "family" if args.task == "all" else "steps")


def print_solved(rows, by):
    print(solved_line([row["correct"] for row in rows]))
    for value in sorted({row[by] for row in rows}):
        name = f"{value}-step problems" if by == "steps" else value
        print(f"  {name}: {solved_line([row['correct'] for row in rows if row[by] == value])}")


if __name__ == "__main__":
    exits.run(main)
