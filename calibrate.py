"""How noisy and how biased the score's estimators are on your pairs and your model.

    packed/ + model (+ policy) -> packed/calibration-<key>.json, .png; read by --diffusion_steps auto
    python data_prep.py --in examples/prefs.jsonl
    python calibrate.py --data packed --use_mixed_precision no --pairs 2 --draws 2

Every design (estimator, T, R) is drawn several times for some pairs, for the reference and for a policy under the same noise:
--policy, or the reference with each weight moved a little. The truth is the score in single-token steps, by
elbo_stratified with up to 64 levels. What is recommended is the least noise at equal cost, variance of the margin times passes, of
the designs whose bias is below the standard error of a step of STEP_PAIRS pairs, which that step has in any case.

n response tokens, T denoising steps, R trajectories, S states, D draws.
"""

import dataclasses
import sys
import time
from dataclasses import dataclass
from typing import Optional

import config
from cli import exits
from cli.parser import arg, names
from preferences import packed as disk
from scoring import recipe
from scoring.calibration import key, place, recommend

UNUSED = names(config.DataArguments, config.TrainArguments) - {"data"} | {
    "end_token_id",
    "gradient_checkpointing",
    "lora_r",
    "lora_alpha",
    "lora_targets",
    "diffusion_steps",
    "trajectories",
    "estimator",
    "order",
    "block_length",
    "noise_sets",
}  # by this script, of the arguments that it accepts


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
    """One instance of each of config.GROUPS and CalibrateArguments, checked as far as nothing needs to be loaded for it."""
    groups = config.parse(argv, __doc__, *config.GROUPS, CalibrateArguments, hide=UNUSED)
    config.check_scoring(groups[1], groups[2])
    return groups


def nothing_to_measure(groups):
    """Why --reuse leaves nothing to measure ("": nothing was asked for); None if there is something."""
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
from tqdm import tqdm

import files
import score
from files import InputError
from models import checkpoint
from scoring import noise
from scoring.states import response_states
from training import deepspeed_config, engine, streaming

DESIGNS = [("spread", T, R) for T, R in ((2, 3), (2, 7), (3, 3), (4, 2), (4, 4), (4, 5), (6, 3), (8, 2))]
DESIGNS += [(name, N, 1) for name in ("elbo", "elbo_stratified") for N in (4, 8, 16)]
DESIGNS += [("stepwise", 4, 5), ("stepwise", 20, 1)]
LEVELS, MASKS, TRUTH_DRAWS = 64, 4, 2  # of the truth
MOVED = 0.02  # a weight's move without a policy, in standard deviations of its tensor


def draws_of(packed, index, side, design, draws, noise_seed):
    """Yields (masked, weight) of one response, `draws` times; the truth is the design (n, ...)."""
    for draw in range(draws):
        rng = noise.generator(
            noise_seed, packed.content(index), f"{noise.side_of(design[0], side)} calibration {design}", draw
        )
        masked = noise.state_masks(len(packed[index][1 + side]), *design, rng)
        yield masked, noise.state_weights(masked, *design)


def truth_design(n):
    return "elbo_stratified", min(n, LEVELS), MASKS


@torch.no_grad()
def scores_of(model, packed, pairs, draws, mask_id, states_per_forward, noise_seed, ranks, name):
    """Scores (pairs, D, 2) of every design and, last, of the truth; seconds and live states per response of each."""
    found, seconds, passes = [], np.zeros(len(DESIGNS) + 1), np.zeros(len(DESIGNS) + 1)
    bar = tqdm(
        total=len(pairs) * (len(DESIGNS) + 1),
        desc=name,
        unit="design",
        disable=not ranks.first,
        mininterval=1 if sys.stderr.isatty() else 30,
    )
    for d, design in enumerate([*DESIGNS, None]):
        D = draws if design else TRUTH_DRAWS
        table = torch.zeros(len(pairs), D, 2, dtype=torch.float64)
        for p, index in enumerate(pairs):
            began, parts = time.time(), []
            prompt, *responses = packed[index]
            for side, response in enumerate(responses):
                for masked, weight in draws_of(
                    packed, index, side, design or truth_design(len(response)), D, noise_seed
                ):
                    states = response_states(prompt, response, masked, weight, mask_id)
                    parts.append(score.state_scores(model, states, states_per_forward, ranks.device).sum())
                    passes[d] += weight.any(1).sum()
            table[p] = torch.stack(parts).double().cpu().view(2, D).T
            seconds[d] += time.time() - began
            bar.update()
        found.append(table.numpy())
        seconds[d], passes[d] = seconds[d] / table.numel(), passes[d] / table.numel()
    bar.close()
    return found, seconds, passes


def measure(policy, reference, truth_policy, truth_reference):
    """Variance and bias of score and margin over draws: each argument (pairs, D, 2)."""
    margin_of = lambda a, b: (a - b)[..., 0] - (a - b)[..., 1]  # noqa: E731  (pairs, D)
    margin, truth = margin_of(policy, reference), margin_of(truth_policy, truth_reference)
    off = margin.mean(1) - truth.mean(1)  # (pairs,)
    noise = margin.var(1, ddof=1).mean()
    doubt = noise / margin.shape[1] + truth.var(1, ddof=1).mean() / truth.shape[1]  # of `off`, squared
    return {
        "score_variance": policy.var(1, ddof=1).mean(),
        "score_bias": (policy.mean(1) - truth_policy.mean(1)).mean(),
        "margin_variance": noise,
        "margin_bias": max(0.0, (off**2).mean() - doubt) ** 0.5,
        "between_pairs": max(0.0, truth.mean(1).var(ddof=1) - truth.var(1, ddof=1).mean() / truth.shape[1]),
    }


@torch.no_grad()
def move(model, seed=0):
    """Add MOVED standard deviations of noise to every weight, in place; whole or partitioned."""
    rng = torch.Generator().manual_seed(seed)
    for parameter in filter(torch.is_floating_point, model.parameters()):  # 4-bit ones stay
        with checkpoint.writing(parameter) as mine:
            if mine:
                noise = torch.randn(parameter.shape, generator=rng)
                parameter.add_(
                    (MOVED * parameter.float().std(correction=0) * noise.to(parameter.device)).to(parameter.dtype)
                )


def run(packed, model_args, noise_args, args, mask_id, ranks):
    """Measure, print the table, write it and its plot."""
    if len(packed) < 2 or args.pairs < 2 or args.draws < 2:
        raise InputError("a calibration compares pairs and draws: at least 2 pairs, --pairs 2 and --draws 2 are needed")
    rng = np.random.default_rng(noise_args.noise_seed)
    pairs = np.sort(rng.choice(len(packed), min(args.pairs, len(packed)), replace=False))
    model, size = streaming.load(model_args, ranks), model_args.states_per_forward
    if size == "auto":
        widest = dataclasses.replace(noise_args, estimator="spread", diffusion_steps=4, trajectories=5, order="random")
        size = score.fit_reference(model, packed, widest, mask_id, ranks)
    common = (packed, pairs, args.draws, mask_id, size, noise_args.noise_seed, ranks)
    reference, seconds, passes = scores_of(model, *common, "calibration, reference")
    if args.policy:
        del model
        model = streaming.load(model_args, ranks, args.policy)
    else:
        move(model)
    policy, _, _ = scores_of(model, *common, "calibration, policy")
    rows = []
    for (name, T, R), a, b, second, count in zip(DESIGNS, policy, reference, seconds, passes):
        found = measure(a, b, policy[-1], reference[-1])
        rows.append(
            {
                "estimator": name,
                "diffusion_steps": T,
                "trajectories": R,
                "passes": count,
                "seconds": second,
                **found,
                "noise_x_cost": found["margin_variance"] * count,
            }
        )
    rows = [
        {name: value if isinstance(value, (str, int)) else float(value) for name, value in row.items()} for row in rows
    ]
    if not all(0 < row["noise_x_cost"] < float("inf") for row in rows):
        raise InputError(
            f"the scores of {args.policy or 'the moved model'} are those of the reference, or not finite; "
            "expected a model trained from it"
        )
    if ranks.first:
        path, best = place(packed, model_args), recommend(rows)
        show(rows, best)
        files.write_json(
            path,
            {
                "depends_on": key(packed, model_args),
                "policy": args.policy or f"every weight moved by {MOVED} sd",
                "pairs": len(pairs),
                "draws": args.draws,
                "rows": rows,
            },
        )
        plot(rows, path.with_suffix(".png"))
        print(
            f"{path}, {path.with_suffix('.png').name}: of {len(pairs)} pairs, {args.draws} draws each\n"
            f"recommended: --estimator {best['estimator']} --diffusion_steps {best['diffusion_steps']} "
            f"--trajectories {best['trajectories']} (or --diffusion_steps auto)",
            flush=True,
        )
    dist.barrier()


def show(rows, best):
    """The table: passes a response, seconds a response and model, and noise times cost against the best's."""
    print(
        f"{'estimator':<16}{'T':>4}{'R':>4}{'passes':>8}{'seconds':>9}   score: {'variance':>8}{'bias':>9}   "
        f"margin: {'variance':>8}{'bias':>9}{'noise x cost':>14}"
    )
    for row in sorted(rows, key=lambda row: row["passes"]):
        print(
            f"{row['estimator']:<16}{row['diffusion_steps']:4d}{row['trajectories']:4d}{row['passes']:8.1f}{row['seconds']:9.3f}   "
            f"{row['score_variance']:15.3g}{row['score_bias']:+9.2g}   {row['margin_variance']:16.3g}{row['margin_bias']:9.2g}"
            f"{row['noise_x_cost'] / best['noise_x_cost']:14.2f}" + ("  <- recommended" if row is best else "")
        )


def plot(rows, path):
    """Variance (filled) and squared bias (hollow) against forward passes; of the score, of the margin."""
    from matplotlib.figure import Figure  # here alone: no other job waits for it

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), ("score", "margin")):
        for colour, estimator in enumerate(noise.ESTIMATORS):
            mine = sorted((row for row in rows if row["estimator"] == estimator), key=lambda row: row["passes"])
            x = [row["passes"] for row in mine]
            axes.plot(x, [row[f"{name}_variance"] for row in mine], "o", color=f"C{colour}", label=estimator)
            axes.plot(x, [row[f"{name}_bias"] ** 2 for row in mine], "o", color=f"C{colour}", fillstyle="none")
            for row in mine:
                axes.annotate(
                    f"{row['diffusion_steps']}x{row['trajectories']}",
                    (row["passes"], row[f"{name}_variance"]),
                    textcoords="offset points",
                    xytext=(4, 3),
                    fontsize=7,
                    color=f"C{colour}",
                )
        axes.set(title=name, xlabel="forward passes a response", ylabel="variance; hollow: squared bias", yscale="log")
        axes.legend(fontsize=8)
    with files.replacing(path, "wb") as file:
        figure.savefig(file, format="png", dpi=120)


def main(argv=None):
    groups = data_args, model_args, noise_args, _, args = read_arguments(argv)
    if nothing_to_measure(groups) is not None:
        return 0
    deepspeed_config.read_ds_config(model_args.deepspeed)
    packed = disk.Packed(data_args.data)
    packed.need_pairs()
    mask_id = recipe.check(packed, model_args, noise_args)
    run(packed, model_args, noise_args, args, mask_id, engine.start())
    return engine.leave()


if __name__ == "__main__":
    exits.run(main)
