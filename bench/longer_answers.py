"""A model with longer answers: sheets of ten exercises, all worked in one response of 240 tokens.

    python bench/longer_answers.py --out runs/longer-answers

The prompt is a form: each exercise, and as many empty lines as its solution takes tokens. The response works them in
order, each from left to right: " 12 + 7 - 4" is " 12 + 7 = 19\\n19 - 4 = 15\\n#### 15\\n". Every exercise is graded on
its own. Solutions have SLOT tokens, so that an exercise always stands as far before its solution: a model of a million
parameters learns to find it within an hour of one core. Training starts from the embedded model, which knows the
numbers, in the states that a sampler meets: the text before a block is known, the block is partly masked, what follows
it is masked or partly so. bench/sampler.py measures on this model.
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
from models.checkpoint import load_model
from models.tokenization import load_tokenizer
from reasoning import arithmetic, tasks

GEN_LENGTH, BLOCK = 256, 32
SLOT, EXERCISES = 24, 10


class Sheet(NamedTuple):
    prompt: str
    response: str
    answers: list  # of str


def exercise(rng, split, tokenizer):
    """(" 12 + 7 - 4", " 12 + 7 = 19\\n19 - 4 = 15\\n#### 15\\n", "15") of a split: no exercise is in both."""
    while True:
        steps = arithmetic.draw_steps(rng, 2, "+-*/")
        asked = " ".join(["", str(steps[0][0]), *(f"{op} {b}" for _, op, b, _ in steps)])
        solution = arithmetic.write_solution(steps) + "\n"
        if tasks.split_of(asked) == split and len(tokenizer(solution).input_ids) == SLOT:
            return asked, solution, str(steps[-1][3])


def sheets(count, split, seed, tokenizer):
    """`count` Sheets."""
    rng, made = random.Random(f"{split} {seed}"), []
    for _ in range(count):
        asked, solutions, answers = zip(*(exercise(rng, split, tokenizer) for _ in range(EXERCISES)))
        lines = [each + "\n" * (SLOT - len(tokenizer(each).input_ids)) for each in asked]
        made.append(Sheet("".join(lines), "".join(solutions), list(answers)))
    return made


def grade(sheet, text):
    """[True, False or None] of the sheet's exercises: whether the answer at its place in `text` is right."""
    found = re.findall(r"####.*", text)[:EXERCISES]
    found += [""] * (EXERCISES - len(found))
    return [tasks.verify(answer, each) for answer, each in zip(sheet.answers, found)]


# --- training ---------------------------------------------------------------------------------------------


def states(B, rng):
    """What a batch of responses has masked, (B, GEN_LENGTH) bool, and what of it is trained on.

    A block is masked at a rate of its own. What follows is masked altogether, as in sampling, and not trained on; in
    every other state it is masked at the same rate.
    """
    masked = torch.rand(B, GEN_LENGTH) < torch.rand(B, 1)
    trained = masked.clone()
    for row in range(B):
        start = BLOCK * rng.randrange(GEN_LENGTH // BLOCK)
        masked[row, :start] = trained[row, :start] = False
        if rng.random() < 0.5:
            masked[row, start + BLOCK :] = True
            trained[row, start + BLOCK :] = False
    return masked, trained


def loss_of(model, prompts, responses, rng):
    """Mean cross-entropy of the trained places of prompts (B, P) and responses (B, GEN_LENGTH)."""
    masked, trained = states(len(responses), rng)
    x = torch.cat((prompts, responses.masked_fill(masked, model.config.mask_token_id)), 1)
    places = torch.cat((torch.zeros_like(prompts, dtype=torch.bool), trained), 1).flatten().nonzero()[:, 0]
    return F.cross_entropy(model(input_ids=x, positions=places).logits, responses[trained])


def train(model, tokenizer, args):
    rng = random.Random(args.seed)
    torch.manual_seed(args.seed)
    made = sheets(args.sheets, "train", args.seed, tokenizer)
    prompts = torch.tensor(tokenizer([each.prompt for each in made]).input_ids)  # (sheets, P)
    responses = F.pad(
        torch.tensor(tokenizer([each.response for each in made]).input_ids),
        (0, GEN_LENGTH - SLOT * EXERCISES),
        value=tokenizer.eos_token_id,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    started, total = time.time(), 0.0
    for step in range(1, args.steps + 1):
        batch = torch.randint(len(made), (args.batch_size,))
        rate = min(1, step / 100) * 0.5 * (1 + math.cos(math.pi * step / args.steps))
        optimizer.param_groups[0]["lr"] = rate * args.learning_rate
        loss = loss_of(model, prompts[batch], responses[batch], rng)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        total += loss.item()
        if step % 50 == 0:
            print(f"step {step}/{args.steps} | loss {total / 50:.4f} | {time.time() - started:.0f} s", flush=True)
            total = 0.0
        if step % 100 == 0 or step == args.steps:
            model.save_pretrained(args.out)
            tokenizer.save_pretrained(args.out)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(ROOT / "examples" / "tiny"))
    parser.add_argument("--out", required=True, help="folder of the new model")
    parser.add_argument("--sheets", type=int, default=4000)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    train(load_model(args.model, torch.float32), load_tokenizer(args.model, False), args)


if __name__ == "__main__":
    main()
