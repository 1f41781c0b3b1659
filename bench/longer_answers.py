"""A model with longer answers: sheets of some nine problems, all solved in one response of some 200 tokens.

    python bench/longer_answers.py --out runs/longer-answers-start --gen_length 96 --batch_size 32 --steps 1200
    python bench/longer_answers.py --model runs/longer-answers-start --out runs/longer-answers --steps 1000

    Ben: 7 + 5 - 4          Ben: 7 + 5 = 12
    Mia: 3 * 6              12 - 4 = 8
                            #### 8
                            Mia: 3 * 6 = 18
                            #### 18

A sheet is worked line by line, each from left to right; every problem is graded on its own. Training starts from the
embedded model, which knows the numbers, in the states that a sampler meets: the text before a block is known, the block
is partly masked, what follows it is masked or partly so. bench/sampler.py measures on this model.
"""

import argparse
import math
import random
import re
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from models.attention import Rows
from models.checkpoint import load_model
from models.tokenization import load_tokenizer
from reasoning import arithmetic, tasks

GEN_LENGTH, BLOCK = 256, 32
POOL = 64  # batches that are sorted by length, so that most rows of a batch are equally long


class Sheet(NamedTuple):
    prompt: str
    response: str
    answers: dict  # {name: answer}


def exercise(rng, split):
    """("7 + 5 - 4", " 7 + 5 = 12\\n12 - 4 = 8\\n#### 8", "8") of a split: no exercise is in both."""
    while True:
        steps = arithmetic.draw_steps(rng, arithmetic.pick(rng, arithmetic.STEP_COUNTS), "+-*/")
        asked = " ".join([str(steps[0][0]), *(f"{op} {b}" for _, op, b, _ in steps)])
        if tasks.split_of(asked) == split:
            return asked, arithmetic.write_solution(steps), str(steps[-1][3])


def sheets(count, split, seed, tokenizer, gen_length=GEN_LENGTH):
    """`count` Sheets, each of as many exercises as gen_length tokens hold, and an end token."""
    rng, made = random.Random(f"{split} {seed}"), []
    names = sorted(arithmetic.NAMES)
    for _ in range(count):
        rng.shuffle(names)
        drawn = [(name, *exercise(rng, split)) for name in names[: gen_length // 14]]
        solved = [f"{name}:{solution}\n" for name, _, solution, _ in drawn]
        size, fitting = 0, 0
        for ids in tokenizer(solved).input_ids:
            size += len(ids)
            fitting += size < gen_length
        asked = "".join(f"{name}: {question}\n" for name, question, _, _ in drawn[:fitting])
        answers = {name: answer for name, _, _, answer in drawn[:fitting]}
        made.append(Sheet(f"{asked}\n", "".join(solved[:fitting]), answers))
    return made


def grade(sheet, text):
    """[True, False or None] of the sheet's exercises: whether what follows a name in `text` gives its answer."""
    _, *parts = re.split(r"^(\w+):", text, flags=re.MULTILINE)
    found = dict(zip(parts[-2::-2], parts[::-2]))  # the first, where a name stands twice
    return [tasks.verify(answer, found.get(name, "")) for name, answer in sheet.answers.items()]


# --- training ---------------------------------------------------------------------------------------------


def rows_of(made, tokenizer, gen_length):
    """(prompt ids, response ids padded with end tokens to gen_length) of each sheet."""
    prompts = tokenizer([each.prompt for each in made]).input_ids
    responses = tokenizer([each.response for each in made]).input_ids
    return list(zip(prompts, [ids + [tokenizer.eos_token_id] * (gen_length - len(ids)) for ids in responses]))


def state(length, gen_length, rng):
    """Which of the response's places are masked, (gen_length,) bool, and which of those are trained on.

    length: of the response with its first end token. A block is masked at a rate of its own. What follows is masked
    altogether, as in sampling, and not trained on; in every other state it is masked at the same rate.
    """
    start = BLOCK * rng.randrange(-(-length // BLOCK))
    masked = torch.rand(gen_length) < 1 - rng.random()
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
        masked, trained = state(response.tolist().index(eos) + 1, len(response), rng)
        ids += [torch.tensor(prompt), response.masked_fill(masked, mask_id)]
        targets.append(response[trained])
        positions.append(offset + len(prompt) + trained.nonzero()[:, 0])
        offset += len(prompt) + len(response)
    rows = Rows([len(prompt) + len(response) for prompt, response in batch], "cpu")
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
    rows = rows_of(sheets(args.sheets, "train", args.seed, tokenizer, args.gen_length), tokenizer, args.gen_length)
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
    parser.add_argument("--gen_length", type=int, default=GEN_LENGTH)
    parser.add_argument("--sheets", type=int, default=30000)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    train(load_model(args.model, torch.float32), load_tokenizer(args.model, False), args)


if __name__ == "__main__":
    main()
