"""How noisy and how biased the score's estimators are on your pairs and your model, and which one to use.

    packed/ + model (+ policy) -> packed/calibration-<key>.json, .png; read by --diffusion_steps auto
    python data_prep.py --in examples/prefs.jsonl
    python calibrate.py --data packed --use_mixed_precision no --pairs 2 --draws 2

Every design (estimator, T, R) is drawn several times for some pairs, and scored by the reference and by a policy under
the same noise: --policy, or the reference with each weight moved a little. The truth is the score in steps of one
token, by elbo_stratified with up to 64 levels (of each block, where the model is block-causal). Of the designs with a
small bias, it recommends the one with the least noise at equal cost: variance of the margin times forward passes.
scoring/calibration.py defines a small bias.

n response tokens, T denoising steps, R trajectories, S states, D draws.
"""

import time
from dataclasses import dataclass
from typing import NamedTuple, Optional

import config
from cli import exits
from cli.parser import arg, names
from preferences import packed as disk
from scoring import recipe
from scoring.calibration import key, measure, place, recommend

UNUSED = {"end_token_id", "gradient_checkpointing", "lora_r", "lora_alpha", "lora_targets"}
UNUSED |= {"diffusion_steps", "trajectories", "estimator", "order", "block_length", "noise_sets"}
UNUSED |= names(config.DataArguments, config.TrainArguments) - {"data"}


@dataclass
class CalibrateArguments:
    policy: Optional[str] = arg(
        None,
        "trained model to measure margins with; without it weights are moved a little",
        metavar="MODEL",
        heading="Calibration",
    )
    pairs: int = arg(8, "pairs to measure on")
    draws: int = arg(6, "draws of each estimator for each pair")
    reuse: bool = arg(
        False, "measure only if --diffusion_steps is auto and --data holds no calibration of this model yet"
    )


def read_arguments(argv=None):
    """One instance of each of config.GROUPS and CalibrateArguments, checked as far as this needs nothing from disk."""
    groups = config.parse(argv, __doc__, *config.GROUPS, CalibrateArguments, hide=UNUSED)
    config.check_scoring(groups[1], groups[2])
    return groups


def nothing_to_measure(groups):
    """Why --reuse leaves nothing to measure ("" if --diffusion_steps is not auto); None if there is something."""
    data_args, model_args, noise_args, train_args, args = groups
    if not args.reuse:
        return None
    if noise_args.diffusion_steps != "auto" or train_args.loss_type == "sft":
        return ""
    packed = disk.Packed(data_args.data)
    recipe.check(packed, model_args, noise_args)
    path = place(packed, model_args)
    return f"{path}: up to date" if path.exists() else None


def early():
    """Read the arguments; end the process where nothing is to be measured."""
    exits.end_if(nothing_to_measure(read_arguments()))


if __name__ == "__main__":
    exits.early(early)  # answers --help and mistakes before the imports below, which take seconds

import numpy as np
import torch
import torch.distributed as dist

import files
import score
from cli.progress import progress
from files import InputError
from models import checkpoint, families
from scoring import noise
from scoring.states import response_states
from training import deepspeed_config, engine, streaming


class Design(NamedTuple):
    estimator: str
    diffusion_steps: int
    trajectories: int


SPREAD = ((2, 3), (2, 7), (3, 3), (4, 2), (4, 4), (4, 5), (6, 3), (8, 2))
DESIGNS = [Design("spread", T, R) for T, R in SPREAD]
DESIGNS += [Design("radau", T, R) for T, R in ((2, 3), (2, 7), (3, 3))]
DESIGNS += [Design("elbo", N, 1) for N in (4, 8, 16)]
DESIGNS += [Design("elbo_stratified", N, 1) for N in (4, 8, 16)]
DESIGNS += [Design("stepwise", 4, 5), Design("stepwise", 20, 1)]
BLOCK_DESIGNS = [Design("elbo_stratified", N, 1) for N in (2, 3, 4, 6, 8, 16)]  # of block-causal models
BLOCK_DESIGNS += [Design("elbo", N, 1) for N in (4, 8, 16)]
LEVELS, MASKS, TRUTH_DRAWS = 64, 4, 2  # of the truth
MOVED = 0.02  # how far a weight is moved without a policy, in standard deviations of its tensor


# --- what is scored ---------------------------------------------------------------------------------------


def designs_of(masking):
    """The designs to measure, for a model of this Masking."""
    return BLOCK_DESIGNS if masking.blocks else DESIGNS


def truth_design(n, blocks):
    """The design that stands for the truth, for a response of n tokens."""
    return Design("elbo_stratified", min(n, blocks.size if blocks else n, LEVELS), MASKS)


def draws_of(packed, index, side, design, draws, noise_seed, blocks=None):
    """Yields (masked (S, n), weight (S, n)) of one response, `draws` times."""
    n, name = len(packed[index][1 + side]), noise.side_of(design.estimator, side, blocks is not None)
    divided = recipe.partition(len(packed[index][0]), n, blocks)
    for draw in range(draws):
        stream = f"{name} calibration {tuple(design)}"
        rng = noise.generator(noise_seed, packed.content(index), stream, draw)
        masked = noise.state_masks(n, *design, rng, **divided)
        yield masked, noise.state_weights(masked, *design, **divided)


@torch.no_grad()
def move(model, seed=0):
    """Add noise of MOVED standard deviations to every weight, in place; under ZeRO-3 to the gathered weight."""
    rng = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if not torch.is_floating_point(parameter):  # in 4 bits
            continue
        with checkpoint.writing(parameter) as is_mine:
            if is_mine:
                step = torch.randn(parameter.shape, generator=rng).to(parameter.device)
                step *= MOVED * parameter.float().std(correction=0)
                parameter.add_(step.to(parameter.dtype))


class Scorer(NamedTuple):
    """What both models are scored with."""

    packed: disk.Packed
    pairs: np.ndarray
    draws: int
    masking: families.Masking
    tokens_per_forward: int
    noise_seed: int
    ranks: engine.Ranks


class Scored(NamedTuple):
    """The scores of one design, and what one of them costs."""

    scores: np.ndarray  # (pairs, D, 2), of chosen and rejected
    seconds: float
    passes: float  # forward passes of one state


@torch.no_grad()
def score_designs(model, scorer, description):
    """[Scored] of every design and, last, of the truth."""
    found = []
    designs = designs_of(scorer.masking)
    total = len(scorer.pairs) * (len(designs) + 1)
    with progress(total, "design", description, disable=not scorer.ranks.first) as bar:
        for design in designs:
            found.append(score_design(model, scorer, design, scorer.draws, bar))
        found.append(score_design(model, scorer, None, TRUTH_DRAWS, bar))
    return found


def score_design(model, scorer, design, draws, bar):
    """The Scored of one design; None: of the truth."""
    scores = torch.zeros(len(scorer.pairs), draws, 2, dtype=torch.float64)
    passes, began = 0, time.time()
    for p, index in enumerate(scorer.pairs):
        prompt, *responses = scorer.packed[index]
        drawn, noise_of = [], (scorer.noise_seed, scorer.masking.blocks)
        for side, response in enumerate(responses):
            mine = design or truth_design(len(response), scorer.masking.blocks)
            for masked, weight in draws_of(scorer.packed, index, side, mine, draws, *noise_of):
                drawn.append(response_states(prompt, response, masked, weight, *scorer.masking))
        passes += sum(len(states.live) for states in drawn)
        found = score.state_scores(model, drawn, scorer.tokens_per_forward, scorer.ranks)
        sums = torch.stack([by_state.sum() for by_state in found])  # (2 D,)
        scores[p] = sums.view(2, draws).t().double().cpu()  # (D, 2)
        bar.update()
    return Scored(scores.numpy(), (time.time() - began) / scores.numel(), passes / scores.numel())


# --- what is measured -------------------------------------------------------------------------------------


def measured_rows(designs, policy, reference):
    """The table: a dictionary of plain values per design. policy, reference: [Scored], the truth last."""
    rows = []
    for design, by_policy, by_reference in zip(designs, policy, reference):
        found = measure(by_policy.scores, by_reference.scores, policy[-1].scores, reference[-1].scores)
        found = {name: float(value) for name, value in found.items()}
        cost = {"passes": by_reference.passes, "seconds": by_reference.seconds}
        noise_x_cost = {"noise_x_cost": found["margin_variance"] * by_reference.passes}
        rows.append(design._asdict() | cost | found | noise_x_cost)
    return rows


def run(packed, model_args, noise_args, args, masking, ranks):
    """Score the designs with both models, measure, and write the table and its plot."""
    # 1. Some pairs, and as many tokens in a forward pass as fit
    if len(packed) < 2 or args.pairs < 2 or args.draws < 2:
        raise InputError("a calibration compares pairs and draws: at least 2 pairs, --pairs 2 and --draws 2 are needed")
    rng = np.random.default_rng(noise_args.noise_seed)
    pairs = np.sort(rng.choice(len(packed), min(args.pairs, len(packed)), replace=False))
    model = streaming.load(model_args, ranks)
    tokens = score.tokens_of_a_pass(model, packed, model_args.tokens_per_forward, masking, ranks)

    # 2. The scores of the reference, then of the policy
    scorer = Scorer(packed, pairs, args.draws, masking, tokens, noise_args.noise_seed, ranks)
    reference = score_designs(model, scorer, "calibration, reference")
    if args.policy:
        del model  # there may be no room for two
        model = streaming.load(model_args, ranks, args.policy)
    else:
        move(model)
    policy = score_designs(model, scorer, "calibration, policy")

    # 3. The table
    rows = measured_rows(designs_of(masking), policy, reference)
    if not all(0 < row["noise_x_cost"] < float("inf") for row in rows):
        raise InputError(
            f"the scores of {args.policy or 'the moved model'} are those of the reference, or not finite; "
            "expected a model trained from it"
        )
    if ranks.first:
        report(rows, packed, model_args, args, len(pairs))
    dist.barrier()


# --- what is written --------------------------------------------------------------------------------------


def report(rows, packed, model_args, args, pairs):
    """Print the table, write it and its plot, and recommend a design."""
    path, best = place(packed, model_args), recommend(rows)
    show(rows, best)
    table = {
        "depends_on": key(packed, model_args),
        "policy": args.policy or f"every weight moved by {MOVED} sd",
        "pairs": pairs,
        "draws": args.draws,
        "rows": rows,
    }
    files.write_json(path, table)
    plot(rows, path.with_suffix(".png"))
    flags = " ".join(f"--{name} {best[name]}" for name in Design._fields)
    print(f"{path}, {path.with_suffix('.png').name}: of {pairs} pairs, {args.draws} draws each")
    print(f"recommended: {flags} (or --diffusion_steps auto)", flush=True)


def show(rows, best):
    """Print the table: passes per response, seconds per response and model, noise times cost relative to the best's."""
    print(
        f"{'estimator':<16}{'T':>4}{'R':>4}{'passes':>8}{'seconds':>9}   score: {'variance':>8}{'bias':>9}   "
        f"margin: {'variance':>8}{'bias':>9}{'noise x cost':>14}"
    )
    for row in sorted(rows, key=passes_of):
        design = f"{row['estimator']:<16}{row['diffusion_steps']:4d}{row['trajectories']:4d}"
        cost = f"{row['passes']:8.1f}{row['seconds']:9.3f}"
        of_score = f"{row['score_variance']:15.3g}{row['score_bias']:+9.2g}"
        of_margin = f"{row['margin_variance']:16.3g}{row['margin_bias']:9.2g}"
        relative = f"{row['noise_x_cost'] / best['noise_x_cost']:14.2f}"
        mark = "  <- recommended" if row is best else ""
        print(f"{design}{cost}   {of_score}   {of_margin}{relative}{mark}")


def plot(rows, path):
    """Variance (filled) and squared bias (hollow) against forward passes; of the score, of the margin."""
    from matplotlib.figure import Figure  # imported here: nothing else needs it

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    for axes, quantity in zip(figure.subplots(1, 2), ("score", "margin")):
        for colour, estimator in enumerate(noise.ESTIMATORS):
            mine = [row for row in rows if row["estimator"] == estimator]
            plot_estimator(axes, sorted(mine, key=passes_of), quantity, estimator, f"C{colour}")
        axes.set(xlabel="forward passes per response", ylabel="variance; hollow: squared bias")
        axes.set(title=quantity, yscale="log")
        axes.legend(fontsize=8)
    with files.replacing(path, "wb") as file:
        figure.savefig(file, format="png", dpi=120)


def plot_estimator(axes, rows, quantity, estimator, colour):
    """One estimator's designs, each labelled TxR."""
    passes = [row["passes"] for row in rows]
    variances = [row[f"{quantity}_variance"] for row in rows]
    biases = [row[f"{quantity}_bias"] ** 2 for row in rows]
    axes.plot(passes, variances, "o", color=colour, label=estimator)
    axes.plot(passes, biases, "o", color=colour, fillstyle="none")
    for row, point in zip(rows, zip(passes, variances)):
        label = f"{row['diffusion_steps']}x{row['trajectories']}"
        near = {"textcoords": "offset points", "xytext": (4, 3)}
        axes.annotate(label, point, fontsize=7, color=colour, **near)


def passes_of(row):
    return row["passes"]


def main(argv=None):
    groups = data_args, model_args, noise_args, _, args = read_arguments(argv)
    if nothing_to_measure(groups) is not None:
        return 0
    deepspeed_config.read_ds_config(model_args.deepspeed)
    packed = disk.Packed(data_args.data)
    packed.need("preferences")
    masking = recipe.check(packed, model_args, noise_args)
    run(packed, model_args, noise_args, args, masking, engine.start())
    return engine.leave()


if __name__ == "__main__":
    exits.run(main)
