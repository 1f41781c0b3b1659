"""Noise and bias of score, margin and gradient of block-causal models: how copies of a response draw their levels.

    python bench/block_estimators.py [--blocks 4 32] [--pairs 12] [--draws 8] [--json FILE]

For each block size a tiny SDAR (examples/new_tiny.py) is trained on the chosen responses of examples/prefs.jsonl, and a
policy is 15 steps of train_dpo.py away; both are kept in --work. At equal copies S of a response:

row         one random level for all blocks of a copy, tokens hidden independently: SDAR's training loss
block       every block of every copy has its own random level (one copy: dTRPO's, arXiv 2603.18806): --estimator elbo
ranks       stratified levels, rotated over the blocks; which tokens are hidden is drawn anew in every copy
stratified  the same, tokens hidden so that their weights even out: --estimator elbo_stratified, the default
own         the same, with separate masks for chosen and rejected

Of score, margin and the gradient of S(w) - S(l), as in estimators.py: variance of a draw, bias (of the gradient the
length), and x, the variance as a share of "block" at as many copies. The truth: blocks of 4 by enumeration of all
subsets, larger ones by three draws of every level with 4 masks each.

m tokens of a block, l of them hidden, n response tokens, S copies.
"""

import argparse
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from estimators import Drawn, Errors, Tally, between, chosen_pairs

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import files
from cli import exits
from models import checkpoint
from models.families import Masking
from preferences import packed as disk
from scoring import noise, recipe, sft_noise
from scoring.states import response_states

WAYS = ("row", "block", "ranks", "stratified", "own")
COPIES = (1, 2, 4, 8)
TRUTH_MASKS, TRUTH_DRAWS = 4, 3
TRAINING = "--use_mixed_precision no --lr_scheduler_type constant --eval_fraction 0 --report_to none".split()
SFT = "--loss_type sft --task sft --learning_rate 3e-3 --per_device_train_batch_size 16".split()
DPO = "--learning_rate 3e-4 --max_steps 15".split()


# --- the models -------------------------------------------------------------------------------------------


def models_of(size, work, steps):
    """(packed, reference, policy) folders of a block size, made once. steps: of SFT."""
    prefs, init = ROOT / "examples" / "prefs.jsonl", work / f"init-{size}"
    sft, data, reference, policy = (work / f"{name}-{size}" for name in ("sft-data", "packed", "reference", "policy"))
    if (policy / "final").exists():
        return data, reference / "final", policy / "final"
    run("examples/new_tiny.py", "--in", prefs, "--out", init, "--family", "sdar")
    fields = json.loads((init / "config.json").read_text())
    files.write_json(init / "config.json", fields | {"block_size": size})
    rows = [json.loads(line) for line in prefs.read_text(encoding="utf-8").splitlines()]
    with files.replacing(work / "sft.jsonl") as file:
        file.writelines(json.dumps({"prompt": row["prompt"], "response": row["chosen"]}) + "\n" for row in rows)
    plain = ["--template", "none"]
    run("data_prep.py", "--task", "sft", "--in", work / "sft.jsonl", "--out", sft, "--model_name_or_path", init, *plain)
    more = ["--gradient_accumulation_steps", 1, "--max_steps", steps]
    run("train_dpo.py", "--data", sft, "--output_dir", reference, *TRAINING, *SFT, *more)
    run("data_prep.py", "--in", prefs, "--out", data, "--model_name_or_path", reference / "final", *plain)
    run("score.py", "--data", data, *TRAINING)
    run("train_dpo.py", "--data", data, "--output_dir", policy, *TRAINING, *DPO)
    return data, reference / "final", policy / "final"


def run(script, *argv):
    command = [sys.executable, ROOT / script, *map(str, argv)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)


# --- the draws --------------------------------------------------------------------------------------------


def row_level(n, S, rng):
    """One level t ~ U(0, 1) a copy, tokens hidden with that probability and weighted by its inverse."""
    t = (1 - sft_noise.EPSILON) * rng.random((S, 1)) + sft_noise.EPSILON
    masked = rng.random((S, n)) < t
    return masked, (masked / t / S).astype(np.float32)


def other_ranks(masked, block, rng):
    """As many hidden tokens in every block of every copy, drawn anew."""
    found = np.zeros_like(masked)
    for number in np.unique(block):
        places = np.flatnonzero(block == number)
        hidden = masked[:, places].sum(1, keepdims=True)
        found[:, places] = rng.random((len(masked), len(places))).argsort(1).argsort(1) < hidden
    return found


def every_subset(block, size):
    """All subsets of every block, the exact score: masks and weights. A token of a subset of l has 1 / (l C(m, l))."""
    subsets = [each for each in itertools.product((False, True), repeat=size) if any(each)]  # of a whole block
    masked, weight = np.zeros((len(subsets), len(block)), bool), np.zeros((len(subsets), len(block)), np.float32)
    for number in np.unique(block):
        places = np.flatnonzero(block == number)
        own = [each for each in itertools.product((False, True), repeat=len(places)) if any(each)]
        counts = np.bincount([sum(each) for each in own])
        for state, subset in enumerate(own):
            masked[state, places] = subset
            weight[state, places] = np.array(subset) / (sum(subset) * counts[sum(subset)])
    return masked, weight


class Case(NamedTuple):
    """What every way is measured on."""

    packed: disk.Packed
    masking: object
    pairs: list
    reference: torch.nn.Module
    policy: torch.nn.Module

    def draw(self, index, way, S, number):
        """[Drawn] of both responses of a pair."""
        prompt, *responses = self.packed[index]
        made = []
        for side, response in enumerate(responses):
            name = ("chosen", "rejected")[side] if way == "own" else "pair"
            rng = noise.generator(0, self.packed.content(index), f"{name} block bench {way}", number)
            masked, weight = self.masks(len(prompt), len(response), way, S, rng)
            made.append(Drawn(weight, response_states(prompt, response, masked, weight, *self.masking)))
        return made

    def masks(self, P, n, way, S, rng):
        """masked (S, n), weight (S, n)."""
        divided, size = recipe.partition(P, n, self.masking.blocks), self.masking.blocks.size
        if way == "row":
            return row_level(n, S, rng)
        if way == "truth" and size <= 4:
            return every_subset(divided["block"], size)
        estimator = "elbo" if way == "block" else "elbo_stratified"
        T, R = (size, TRUTH_MASKS) if way == "truth" else (S, 1)
        masked = noise.state_masks(n, estimator, T, R, rng, **divided)
        if way == "ranks":
            masked = other_ranks(masked, divided["block"], rng)
        return masked, noise.state_weights(masked, estimator, T, R, **divided)

    def measure(self, way, S, draws):
        """Its Tally for each pair."""
        tallies = [Tally() for _ in self.pairs]
        for tally, index in zip(tallies, self.pairs):
            for number in range(draws):
                tally.add(self.policy, self.reference, self.draw(index, way, S, number))
        return [tally.finish() for tally in tallies]


# --- the table --------------------------------------------------------------------------------------------


def rows_of(case, size, args):
    """[row] of every way and number of copies."""
    truths, rows = case.measure("truth", 0, TRUTH_DRAWS), []
    spread, length = between(truths)
    print(f"blocks of {size}; gradient: squared length {length:.0f}, between pairs {spread:.0f}", flush=True)
    for S in args.copies:
        found = {}
        for way in args.ways:
            tallies = case.measure(way, S, args.draws)
            found[way] = Errors(*np.mean([tally.against(truth) for tally, truth in zip(tallies, truths)], 0))
        for way, errors in found.items():
            row = {"block": size, "copies": S, "way": way, **{k: float(v) for k, v in errors._asdict().items()}}
            for name in ("score", "margin", "gradient"):
                row[f"{name}_ratio"] = row[f"{name}_variance"] / getattr(found["block"], f"{name}_variance")
            rows.append(row)
            show(row)
    return rows


def show(row):
    parts = [f"{row['block']:>5}{row['copies']:>7} {row['way']:<11}"]
    for name, bias in (("score", "score_bias"), ("margin", "margin_bias2"), ("gradient", "gradient_bias2")):
        off = row[bias] if name == "score" else max(0.0, row[bias]) ** 0.5
        parts.append(f"{row[f'{name}_variance']:10.4g}{off:9.3f}{row[f'{name}_ratio']:6.2f}")
    print(" |".join(parts), flush=True)


def read_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 32])
    parser.add_argument("--copies", type=int, nargs="+", default=list(COPIES))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--draws", type=int, default=8, help="of each way for each pair")
    parser.add_argument("--lengths", type=int, nargs=2, default=[18, 100], help="least and most tokens of a response")
    parser.add_argument("--steps", type=int, default=400, help="of SFT")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "block-estimators")
    parser.add_argument("--json", help="write the table there")
    return parser.parse_args(argv)


def main(argv=None):
    args, table = read_arguments(argv), []
    args.work.mkdir(parents=True, exist_ok=True)
    for size in args.blocks:
        data, *folders = models_of(size, args.work, args.steps)
        packed = disk.Packed(data)
        reference, policy = (checkpoint.load_model(str(folder), torch.float32).eval() for folder in folders)
        masking = Masking(packed.meta["mask_token_id"], reference.blocks)
        case = Case(packed, masking, chosen_pairs(packed, args.lengths, args.pairs), reference, policy)
        if size == args.blocks[0]:
            print(f"{'block':>5}{'copies':>7} {'way':<11} | score: variance, bias, x | margin | gradient")
        table += rows_of(case, size, args)
    if args.json:
        files.write_json(args.json, {"pairs": args.pairs, "draws": args.draws, "rows": table})


if __name__ == "__main__":
    exits.run(main)
