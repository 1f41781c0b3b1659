"""LLaDA's sampler: a response starts as masks, and the most confident predictions are committed, block by block.

    python generate.py --model_name_or_path DIR --prompt "Question: ..."             -> the response on stdout
    python generate.py --model_name_or_path DIR --in prompts.jsonl --out out.jsonl   -> its rows with a "response"
    python generate.py --model_name_or_path DIR --task arithmetic --num 200          -> solved 93 of 200 (46.5%, ...)

Each forward pass predicts c_i = argmax_v exp(z_iv) / (-log u_iv)^temperature, u ~ U(0, 1), at the block's masked
positions i and commits those where softmax(z_i)[c_i] is highest; the others stay masked (low-confidence remasking).
Source: Nie et al., arXiv 2502.09992, and ML-GSAI/LLaDA's generate.py, token for token at temperature 0.
B batch, P prompt tokens, L = P + gen_length, V vocabulary, N masked positions of the current block, over the batch.
"""
import argparse
import hashlib
import json
import math
import sys
import time
from itertools import groupby
from pathlib import Path

import jsonlines
import torch

import config
import tasks
from checkpoint import (DTYPES, encode, end_token_id, load_model, load_tokenizer, mask_token_id, prompt_text,
                        response_tokenizer)
from packed import InputError, replacing


def check_lengths(steps, gen_length, block_length):
    if min(steps, gen_length, block_length) < 1:
        raise InputError(f"--steps {steps} --gen_length {gen_length} --block_length {block_length}: all must be >= 1")
    if gen_length % block_length:
        raise InputError(f"--gen_length {gen_length} is not a multiple of --block_length {block_length}; "
                         f"try --block_length {math.gcd(gen_length, block_length)}")
    blocks = gen_length // block_length
    if steps % blocks:
        raise InputError(f"--steps {steps} is not a multiple of the {blocks} blocks that --gen_length {gen_length} and "
                         f"--block_length {block_length} make; try --steps {-(-steps // blocks) * blocks}")


def row_generator(seed, row):
    """CPU randomness of one response; hashed, so that row 1 of seed 0 is not row 0 of seed 1."""
    digest = hashlib.sha256(f"generate|{seed}|{row}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))  # the CPU generator reads 32 bits


def choose(logits, owner, draws, temperature):
    """The predicted id (N,) of each row of logits (N, V): the argmax, at a temperature that of exp(z) / (-log u)^T.

    owner (N,), ascending: the batch row of each position; draws: B generators, one per batch row.
    """
    if temperature == 0:
        return logits.argmax(-1)
    chosen = []
    for row, draw in enumerate(draws):  # row by row: float64 over V is large, and no row's noise hangs on another's
        z = logits[owner == row].double()
        u = torch.rand(z.shape, dtype=torch.float64, generator=draw).to(z.device)  # on the CPU: the same on any device
        chosen.append((z.exp() / (-u.log()) ** temperature).argmax(-1))
    return torch.cat(chosen)


@torch.no_grad()
def generate(model, prompts, mask_id, *, steps, gen_length, block_length, temperature=0.0, seed=0, rows=None):
    """Sample a response to each of prompts (B, P) int64, all of one length; returns ids (B, gen_length) int64.

    steps: forward passes over the whole response, shared equally by its gen_length / block_length blocks.
    rows: B numbers that key the noise with `seed` (default 0..B-1), so that a response does not depend on its batch.
    A predicted mask_id stays a mask, as in the original; a trained model does not predict it.
    """
    check_lengths(steps, gen_length, block_length)
    (B, P), device = prompts.shape, next(model.parameters()).device
    draws = [row_generator(seed, row) for row in (range(B) if rows is None else rows)]
    x = torch.full((B, P + gen_length), mask_id, dtype=torch.long, device=device)  # (B, L)
    x[:, :P] = prompts
    block_steps = steps * block_length // gen_length
    for start in range(P, P + gen_length, block_length):
        block = x[:, start:start + block_length]  # (B, block_length), a view: commits are written into x
        for step in range(block_steps):
            commits = block_length // block_steps + (step < block_length % block_steps)
            if commits == 0:
                break  # more steps than tokens: the remaining passes would change nothing
            # 1. Predict the block's masked positions, and only those.
            masked = block == mask_id  # (B, block_length)
            owner, offset = masked.nonzero(as_tuple=True)  # (N,), (N,) in row order
            logits = model(input_ids=x, positions=owner * x.shape[1] + start + offset).logits  # (N, V)
            chosen = choose(logits, owner, draws, temperature)  # (N,)
            # 2. Confidence is the noiseless probability, in the logits' dtype as the original takes it.
            confidence = torch.full(masked.shape, -torch.inf, dtype=logits.dtype, device=device)  # (B, block_length)
            confidence[masked] = logits.softmax(-1).gather(-1, chosen[:, None])[:, 0]
            # 3. Commit the most confident; a stable sort, so that ties fall the same way on any device.
            best = confidence.argsort(dim=-1, descending=True, stable=True)[:, :commits]  # (B, commits)
            block.scatter_(1, best, block.masked_scatter(masked, chosen).gather(1, best))
    return x[:, P:].to(prompts.device)


def respond(model, tokenizer, prompts, *, steps, gen_length, block_length, temperature=0.0, seed=0, batch_size=8,
            progress=lambda done: None):
    """Response texts, in order, to `prompts`, lists of ids; batches hold prompts of one length, so nothing is padded.

    tokenizer: checkpoint.response_tokenizer's. A text ends before the first eos or end-of-turn; special tokens are left
    out. progress: called with the number of finished prompts after each batch.
    """
    mask_id = mask_token_id(model.config, tokenizer)
    ends = {tokenizer.eos_token_id, end_token_id(tokenizer, "auto")}
    texts, done = [None] * len(prompts), 0
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # longest first: lack of memory shows at once
    for _, group in groupby(order, key=lambda i: len(prompts[i])):
        group = list(group)
        for rows in (group[first:first + batch_size] for first in range(0, len(group), batch_size)):
            ids = torch.tensor([prompts[i] for i in rows], dtype=torch.long)  # (B, P)
            sampled = generate(model, ids, mask_id, steps=steps, gen_length=gen_length, block_length=block_length,
                               temperature=temperature, seed=seed, rows=rows)
            for i, response in zip(rows, sampled.tolist()):
                end = next((k for k, token in enumerate(response) if token in ends), len(response))
                texts[i] = tokenizer.decode(response[:end], skip_special_tokens=True,
                                            clean_up_tokenization_spaces=False)
            done += len(rows)
            progress(done)
    return texts


def read_rows(path):
    """{"FILE:LINE": row} of a .jsonl file."""
    rows = {}
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--in {path}: cannot be read as UTF-8 text ({error})") from None
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                rows[f"{path}:{number}"] = row = json.loads(line)
                json.dumps(row, ensure_ascii=False).encode()  # JSON can escape half a character, which is no text
        except ValueError as error:
            raise InputError(f"{path}:{number}: not JSON of UTF-8 text ({error}); expected one row a line") from None
    if not rows:
        raise InputError(f"--in {path}: holds no row")
    return rows


def prompt_ids(tokenizer, row, place, template):
    """The ids of row["prompt"], by the rule of data_prep; an error names the row's place."""
    prompt = row.get("prompt") if isinstance(row, dict) else None
    messages = prompt if isinstance(prompt, list) and prompt else [{"role": "user", "content": prompt}]
    if not all(isinstance(each, dict) and isinstance(each.get("role"), str) and isinstance(each.get("content"), str)
               for each in messages):
        raise InputError(f'{place}: expected a "prompt", a string or a list of {{"role", "content"}} messages')
    try:
        return encode(tokenizer, prompt_text(tokenizer, prompt, template))
    except InputError as error:
        raise InputError(f"{place}: {error}") from None


def solved_line(correct, z=1.959964):
    """[True, False, ...] -> "solved 93 of 200 (46.5%, 95% interval 39.7-53.4)"; Wilson's interval."""
    k, n = sum(correct), len(correct)
    middle, half = k + z * z / 2, z * math.sqrt(k * (n - k) / n + z * z / 4)
    low, high = (100 * (middle + side) / (n + z * z) for side in (-half, half))
    return f"solved {k} of {n} ({100 * k / n:.1f}%, 95% interval {abs(low):.1f}-{high:.1f})"


def refuse(message):
    raise InputError(f"{message}; see python generate.py --help")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = refuse  # one line, not the usage
    parser.add_argument("--model_name_or_path", required=True, help="model folder or hub name")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", help="one prompt; its response is printed")
    source.add_argument("--in", dest="source", help='.jsonl file; its "prompt" is a string or a list of messages')
    source.add_argument("--task", choices=("arithmetic",), help="solve test problems of tasks.py, verified")
    parser.add_argument("--out", type=Path, help='.jsonl file: the rows with a "response" added or replaced')
    parser.add_argument("--num", type=int, default=200, help="problems of --task")
    parser.add_argument("--steps", type=int, help="forward passes per response; default: gen_length")
    parser.add_argument("--gen_length", type=int, default=64, help="tokens of a response")
    parser.add_argument("--block_length", type=int, help="tokens filled before the next block; default: gen_length")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the most likely token")
    parser.add_argument("--seed", type=int, default=0, help="of the noise, and of the problems of --task")
    parser.add_argument("--batch_size", type=int, default=8, help="most prompts of one length per forward pass")
    parser.add_argument("--template", choices=("auto", "chat", "none"), default="auto", help="auto: chat if it has one")
    parser.add_argument("--use_mixed_precision", choices=tuple(DTYPES), default="bf16", help="no: float32")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    args = parser.parse_args(argv)
    args.steps = args.gen_length if args.steps is None else args.steps
    args.block_length = args.gen_length if args.block_length is None else args.block_length
    check_lengths(args.steps, args.gen_length, args.block_length)
    if min(args.num, args.batch_size) < 1:
        raise InputError(f"--num is {args.num} and --batch_size {args.batch_size}; expected at least 1")
    if not 0 <= args.temperature < math.inf:
        raise InputError(f"--temperature is {args.temperature}; expected 0 or more, for example --temperature 0.7")
    if args.source and not args.out:
        raise InputError("--in needs a file for the responses: add --out out.jsonl")
    if args.out and (args.out.is_dir() or not args.out.parent.is_dir()):
        raise InputError(f"--out is {args.out}; expected a file in an existing folder")
    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available() + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if args.device not in ["auto"] + devices:
        raise InputError(f"--device is {args.device!r}; this machine has {', '.join(devices)}")
    args.device = ("cuda" if "cuda" in devices else "cpu") if args.device == "auto" else args.device
    return args


def main(argv=None):
    args = parse_args(argv)
    tokenizer = load_tokenizer(args.model_name_or_path)
    if args.source:
        rows = read_rows(args.source)
    elif args.task:
        rows = {f"problem {number}": {"prompt": problem.prompt, "answer": problem.answer, "steps": len(problem.steps)}
                for number, problem in enumerate(tasks.generate(args.num, "test", args.seed), 1)}
    else:
        rows = {"--prompt": {"prompt": args.prompt}}
    prompts = [prompt_ids(tokenizer, row, place, args.template) for place, row in rows.items()]
    rows = list(rows.values())

    def progress(done):
        rate = done * args.gen_length / (time.monotonic() - started)
        print(f"\r{done}/{len(rows)} responses, {rate:.0f} tokens/s", end="\n" if done == len(rows) else "",
              file=sys.stderr, flush=True)

    try:
        model = load_model(args.model_name_or_path, DTYPES[args.use_mixed_precision]).eval().to(args.device)
        started = time.monotonic()
        texts = respond(model, response_tokenizer(args.model_name_or_path, tokenizer), prompts, steps=args.steps,
                        gen_length=args.gen_length, block_length=args.block_length, temperature=args.temperature,
                        seed=args.seed, batch_size=args.batch_size, progress=progress)
    except torch.OutOfMemoryError:
        raise InputError(f"{args.device} ran out of memory; lower --batch_size or add --device cpu") from None
    for row, text in zip(rows, texts):
        row["response"] = text
        if args.task:
            row["correct"] = tasks.verify(row["answer"], text)
    if args.out:
        with replacing(args.out) as file:
            jsonlines.Writer(file).write_all(rows)
    if args.prompt is not None:
        print(rows[0]["response"])
    if args.task:
        print(solved_line([row["correct"] for row in rows]))
        for count in sorted({row["steps"] for row in rows}):
            print(f"  {count}-step problems: {solved_line([row['correct'] for row in rows if row['steps'] == count])}")


if __name__ == "__main__":
    config.run(main)
