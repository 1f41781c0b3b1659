"""A model with longer answers: sheets of several arithmetic problems, all solved in one response of some 200 tokens.

    python bench/longer_answers.py --out runs/longer-answers [--steps 3000] [--seed 1]

The response repeats each question before its solution, so that every problem is graded on its own. Training starts from
the embedded model, in the states that a sampler meets: the text before a block is known, the block is partly masked,
what follows it is masked or partly so. bench/sampler.py measures on this model.
"""

import argparse
import math
import random
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from files import InputError
from models.attention import Rows
from models.checkpoint import load_model
from models.tokenization import load_tokenizer
from reasoning import tasks

GEN_LENGTH, BLOCK = 256, 32
LONGEST = 500  # tokens of a row
POOL = 64  # batches that are sorted by length, so that most rows of a batch are equally long


class Sheet(NamedTuple):
    prompt: str
    response: str
    problems: list  # in the order of the response


def solved(problem):
    """The question and its solution, as in the response."""
    return problem.prompt + problem.solution + "\n"


def sheets(count, split, seed, tokenizer):
    """`count` Sheets of a split's problems whose responses fit into GEN_LENGTH, of three to five problems each."""
    made, taken, size = [], [], 0
    problems = tasks.generate(5 * count + 5, split, seed)
    lengths = [len(ids) for ids in tokenizer([solved(each) for each in problems]).input_ids]
    for problem, length in zip(problems, lengths):
        if size + length >= GEN_LENGTH:  # at least one end token follows
            made.append(sheet(taken))
            taken, size = [], 0
        taken, size = [*taken, problem], size + length
        if len(made) == count:
            return made
    raise InputError(f"{len(problems)} problems make {len(made)} sheets only, expected {count}")


def sheet(problems):
    questions = "\n".join(problem.prompt.removesuffix("\nAnswer:") for problem in problems)
    return Sheet(f"{questions}\n\n", "".join(map(solved, problems)), problems)


def grade(sheet, text):
    """[True, False or None] of the sheet's problems: whether the part of `text` at its place gives the answer."""
    parts = [part.partition("\nAnswer:")[2] for part in text.split("Question:")[1:]]
    parts += [""] * (len(sheet.problems) - len(parts))
    return [tasks.verify(problem, part) for problem, part in zip(sheet.problems, parts)]


# --- training ---------------------------------------------------------------------------------------------


def rows_of(made, tokenizer):
    """(prompt ids, response ids padded with end tokens to GEN_LENGTH) of each sheet that is no longer than LONGEST."""
    prompts = tokenizer([each.prompt for each in made]).input_ids
    responses = tokenizer([each.response for each in made]).input_ids
    padded = [ids + [tokenizer.eos_token_id] * (GEN_LENGTH - len(ids)) for ids in responses]
    return [pair for pair in zip(prompts, padded) if len(pair[0]) + GEN_LENGTH <= LONGEST]


def state(length, rng):
    """Which of the response's places are masked, (GEN_LENGTH,) bool, and which of those are trained on.

    length: of the response with its first end token. A block is masked at a rate of its own. What follows is masked
    altogether, as in sampling, and not trained on; in every other state it is masked at the same rate.
    """
    start = BLOCK * rng.randrange(-(-length // BLOCK))
    masked = torch.rand(GEN_LENGTH) < 1 - rng.random()
    masked[:start] = False
    trained = masked.clone()
    if rng.random() < 0.5:
        masked[start + BLOCK :] = True
        trained[start + BLOCK :] = False
    return masked, trained


def loss_of(model, batch, mask_id, eos, rng):
    """Mean cross-entropy of the trained places of a batch of rows_of()."""
    ids, targets, positions, offset = [], [], [], 0
    for prompt, response in batch:
        response = torch.tensor(response)
        masked, trained = state(response.tolist().index(eos) + 1, rng)
        ids += [torch.tensor(prompt), response.masked_fill(masked, mask_id)]
        targets.append(response[trained])
        positions.append(offset + len(prompt) + trained.nonzero()[:, 0])
        offset += len(prompt) + GEN_LENGTH
    rows = Rows([len(prompt) + GEN_LENGTH for prompt, _ in batch], "cpu")
    logits = model(input_ids=torch.cat(ids)[None], positions=torch.cat(positions), rows=rows).logits
    return F.cross_entropy(logits, torch.cat(targets))


def batches(rows, size, rng):
    """Lists of `size` rows, forever; most rows of a list are equally long."""
    while True:
        rng.shuffle(rows)
        for first in range(0, len(rows), POOL * size):
            pool = sorted(rows[first : first + POOL * size], key=row_length)
            lists = [pool[i : i + size] for i in range(0, len(pool) - size + 1, size)]
            rng.shuffle(lists)
            yield from lists


def row_length(row):
    return len(row[0])


def train(model, tokenizer, args):
    rng = random.Random(args.seed)
    torch.manual_seed(args.seed)
    rows = rows_of(sheets(args.sheets, "train", args.seed, tokenizer), tokenizer)
    print(f"{len(rows)} rows", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    started, total = time.time(), 0.0
    for step, batch in zip(range(1, args.steps + 1), batches(rows, args.batch_size, rng)):
        rate = min(1, step / 100) * 0.5 * (1 + math.cos(math.pi * step / args.steps))
        optimizer.param_groups[0]["lr"] = rate * args.learning_rate
        loss = loss_of(model, batch, model.config.mask_token_id, tokenizer.eos_token_id, rng)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        total += loss.item()
        if step % 50 == 0:
            print(f"step {step}/{args.steps} | loss {total / 50:.4f} | {time.time() - started:.0f} s", flush=True)
            total = 0.0
        if step % 500 == 0 or step == args.steps:
            model.save_pretrained(args.out)
            tokenizer.save_pretrained(args.out)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(ROOT / "examples" / "tiny"))
    parser.add_argument("--out", required=True, help="folder of the new model")
    parser.add_argument("--sheets", type=int, default=30000)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    train(load_model(args.model, torch.float32), load_tokenizer(args.model, False), args)


if __name__ == "__main__":
    main()
