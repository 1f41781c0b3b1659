"""Noise and bias of the score, of the margin and of its gradient on a trained model: every estimator beside VRPO's iid ELBO.

    python bench/estimators.py [--json FILE] [--pairs 20] [--draws 8]
    python bench/estimators.py --data packed --model_name_or_path M --policy P --json FILE

Without --data: the embedded model and preferences, and a policy that 15 steps of train_dpo.py take it to, kept in --work. For
each pair and draw: the scores of both responses under policy and reference with the same masks, and the gradient of the
policy's S(w) - S(l) by every weight. The truth is single-token steps: elbo_stratified with every level 1..n.

passes     forward passes a response: states that count. heads: output rows a response
score      variance of a response's score, and its mean bias
margin     variance of (S(w) - S_ref(w)) - (S(l) - S_ref(l)) over draws, and its root mean square bias over pairs
gradient   variance of the gradient of S(w) - S(l), summed over all weights, and the squared length of its mean's bias
x          that variance as a share of the iid ELBO's at as many passes or fewer [95% interval, pairs resampled]
fair       the bias is below the standard deviation on a pair: of score, margin, gradient

Second table, of parts of the states in the gradient: error is the squared error of one pair's gradient for the mean over pairs,
the variance between pairs included; cost is in forward passes a response, a backward pass being two, all at one pass's length.
error x cost: at equal compute, pairs times passes, the squared error of the mean, as a share of the first row's.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import files
import score  # noqa: E402
from cli import exits
from models import checkpoint
from preferences import packed as disk  # noqa: E402
from scoring import noise  # noqa: E402
from scoring.states import response_states  # noqa: E402

# estimator, T, R, k states in the gradient (0: all), whether both sides share their noise
SHARED, OWN = True, False
DESIGNS = [
    ("elbo", 16, 1, 0, OWN),
    ("elbo_stratified", 16, 1, 0, OWN),
    ("stepwise", 16, 1, 0, SHARED),
    ("stepwise", 4, 5, 0, SHARED),
    ("spread", 4, 5, 0, OWN),
    ("spread", 4, 5, 0, SHARED),
    ("spread", 3, 7, 0, SHARED),
    ("spread", 6, 3, 0, SHARED),
    ("spread", 8, 2, 0, SHARED),
    ("elbo", 8, 1, 0, OWN),
    ("elbo_stratified", 8, 1, 0, OWN),
    ("stepwise", 8, 1, 0, SHARED),
    ("spread", 4, 2, 0, SHARED),
    ("spread", 3, 3, 0, SHARED),
    ("spread", 2, 7, 0, SHARED),
    ("elbo", 4, 1, 0, OWN),
    ("spread", 2, 3, 0, SHARED),
    ("stepwise", 20, 1, 0, SHARED),
]
PARTS = (
    [("spread", 4, 5, k, SHARED) for k in (1, 2, 4, 8)]
    + [("spread", 3, 3, k, SHARED) for k in (1, 2, 4)]
    + [("spread", 2, 3, k, SHARED) for k in (1, 2)]
    + [("elbo", 8, 1, k, OWN) for k in (1, 2, 4)]
)
TRUTH_MASKS, TRUTH_DRAWS = 8, 3
ROWS = 64  # states a forward


def policy_of_examples(work):
    """(packed, model, policy) folders of the embedded model, made once."""
    model, data = ROOT / "examples" / "tiny", work / "packed"
    common = ["--data", data, "--model_name_or_path", model, "--config_file", ROOT / "configs" / "tiny.yaml"]
    if not (work / "policy" / "final").exists():
        for script, more in (
            ("data_prep", ["--in", ROOT / "examples" / "prefs.jsonl"]),
            ("score", []),
            ("train_dpo", ["--max_steps", 15, "--output_dir", work / "policy"]),
        ):
            subprocess.run(
                [sys.executable, ROOT / f"{script}.py", *map(str, common + more)], check=True, stdout=subprocess.DEVNULL
            )
    return data, model, work / "policy" / "final"


def draw(packed, index, design, number):
    """[(masked, weight, States)] of both responses, the States' graph of k."""
    estimator, T, R, k, shared = design
    made = []
    for side, response in enumerate(packed[index][1:]):
        name = noise.side_of(estimator, side) if shared else ("chosen", "rejected")[side]
        rng = noise.generator(0, packed.content(index), f"{name} bench", number)
        levels = T or len(response)  # 0: every level, the truth
        masked = noise.state_masks(len(response), estimator, levels, R, rng)
        weight = noise.state_weights(masked, estimator, levels, R)
        states = response_states(packed[index][0], response, masked, weight, packed.meta["mask_token_id"])
        made.append((weight, states.carrying(noise.gradient_states(masked, weight, k, rng), k) if k else states))
    return made


class Tally:
    """What the draws of one pair say of one design."""

    def __init__(self):
        self.scores, self.sum, self.squares, self.passes, self.heads = [], 0.0, 0.0, 0, 0

    def add(self, policy, reference, packed, index, design, number):
        made = draw(packed, index, design, number)
        policy.zero_grad()
        _, ours = score.score_and_backward(
            policy, [states for _, states in made], lambda s: s[0] - s[1], ROWS, "cpu", lambda loss: loss.backward()
        )
        with torch.no_grad():
            theirs = [score.state_scores(reference, states, ROWS, "cpu") for _, states in made]
        gradient = torch.cat([parameter.grad.flatten() for parameter in policy.parameters()])
        self.scores.append([float(part.sum()) for part in (*ours, *theirs)])
        self.sum = self.sum + gradient
        self.squares += float(gradient.double().square().sum())
        self.passes += sum(np.count_nonzero(weight.any(1)) for weight, _ in made) / 2
        self.heads += sum(np.count_nonzero(weight) for weight, _ in made) / 2

    def finish(self):
        """Turn sums over the D draws into means."""
        D, self.scores = len(self.scores), np.array(self.scores)
        self.mean = self.sum / D
        self.noise = (self.squares - float(self.sum.double().square().sum()) / D) / (D - 1)  # of one draw's gradient
        self.margins = self.scores @ [1, -1, -1, 1]
        self.passes, self.heads, self.draws, self.sum = self.passes / D, self.heads / D, D, None
        return self

    def against(self, truth):
        """[score variance, score bias, margin variance, margin bias squared, gradient variance, gradient bias squared]."""
        off = self.scores.mean(0) - truth.scores.mean(0)
        variance, true_variance = self.scores.var(0, ddof=1), truth.margins.var(ddof=1)
        margin = self.margins.mean() - truth.margins.mean()
        bias = float((self.mean - truth.mean).double().square().sum())
        return [
            variance[:2].mean(),
            off[:2].mean(),
            self.margins.var(ddof=1),
            margin**2 - self.margins.var(ddof=1) / self.draws - true_variance / truth.draws,
            self.noise,
            bias - self.noise / self.draws - truth.noise / truth.draws,
        ]


def between(truths):
    """Variance of the true gradient between pairs, and its mean squared length, the truth's own noise taken off."""
    noise = np.mean([truth.noise / truth.draws for truth in truths])
    mean = sum(truth.mean for truth in truths) / len(truths)
    spread = sum(float((truth.mean - mean).double().square().sum()) for truth in truths) / (len(truths) - 1)
    return spread - noise, np.mean([float(truth.mean.double().square().sum()) for truth in truths]) - noise


def interval(ours, theirs, seed=0):
    """95% interval of mean(ours) / mean(theirs), pairs resampled."""
    picks = np.random.default_rng(seed).integers(len(ours), size=(4000, len(ours)))
    return np.quantile(ours[picks].mean(1) / theirs[picks].mean(1), [0.025, 0.975])


def row_of(design, tallies, truths, seconds, baselines):
    """One design's line; baselines: {N: values (pairs, 6)} of the iid ELBO so far."""
    values = np.array([tally.against(truth) for tally, truth in zip(tallies, truths)])  # (pairs, 6)
    estimator, T, R, k, shared = design
    passes = np.mean([tally.passes for tally in tallies])
    if estimator == "elbo" and not k:
        baselines[T] = values
    mean = values.mean(0)
    row = {
        "estimator": estimator,
        "diffusion_steps": T,
        "trajectories": R,
        "backprop_steps": k,
        "shared_noise": shared,
        "passes": passes,
        "heads": np.mean([tally.heads for tally in tallies]),
        "seconds": seconds,
        **dict(zip(("score_variance", "score_bias", "margin_variance"), mean)),
        "margin_bias": max(0.0, mean[3]) ** 0.5,
        "gradient_variance": mean[4],
        "gradient_bias2": mean[5],
    }
    row["fair"] = [
        bool(bias2 <= variance) for bias2, variance in ((mean[1] ** 2, mean[0]), (mean[3], mean[2]), (mean[5], mean[4]))
    ]
    N = max((N for N in baselines if N <= max(passes + 1, 4)), default=None)  # 15 passes are set beside 16
    if N:
        row["against_elbo"] = N
        for name, column in (("score", 0), ("margin", 2), ("gradient", 4)):
            row[f"{name}_ratio"] = mean[column] / baselines[N][:, column].mean()
            row[f"{name}_interval"] = interval(values[:, column], baselines[N][:, column]).tolist()
    return row


def name_of(row):
    return (
        f"{row['estimator']} {row['diffusion_steps']}x{row['trajectories']}"
        + (f" k={row['backprop_steps']}" if row["backprop_steps"] else "")
        + (" own" if not row["shared_noise"] and not row["estimator"].startswith("elbo") else "")
    )


def show(row):
    ratio = lambda name: (
        f"{row[f'{name}_ratio']:6.2f} [{row[f'{name}_interval'][0]:.2f}-{row[f'{name}_interval'][1]:.2f}]"
    )  # noqa: E731
    print(
        f"{name_of(row):<22}{row['passes']:6.1f}{row['heads']:6.0f} |{row['score_variance']:8.3g}{row['score_bias']:+8.2f}{ratio('score'):>19} |"
        f"{row['margin_variance']:8.3g}{row['margin_bias']:7.2f}{ratio('margin'):>19} |{row['gradient_variance']:9.4g}"
        f"{row['gradient_bias2']:8.0f}{ratio('gradient'):>19} | {'/'.join('yes' if fair else 'no' for fair in row['fair'])}",
        flush=True,
    )


def compare_parts(rows, spread):
    """Print what k costs and brings: rows of all states first, then of part of them."""
    print(
        f"\n{'states in the gradient':<24}{'cost':>7}{'noise':>9}{'bias^2':>9}{'error x cost':>14}   (variance between pairs {spread:.0f})"
    )
    first = None
    for row in sorted(rows, key=lambda row: (row["estimator"], -row["passes"], row["backprop_steps"])):
        k = row["backprop_steps"]
        row["cost"] = row["passes"] + min(k, row["passes"]) * 3 if k else 3 * row["passes"]
        row["error"] = spread + row["gradient_variance"]
        first = first or row["error"] * row["cost"]
        row["error_x_cost"] = row["error"] * row["cost"] / first
        print(
            f"{name_of(row):<24}{row['cost']:7.1f}{row['gradient_variance']:9.0f}{row['gradient_bias2']:9.0f}{row['error_x_cost']:14.2f}"
        )


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write the table there")
    parser.add_argument("--data", help="folder of the packed arrays")
    parser.add_argument("--model_name_or_path", help="the reference")
    parser.add_argument("--policy", help="a model trained from it")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--draws", type=int, default=8, help="of each design for each pair")
    parser.add_argument("--lengths", type=int, nargs=2, default=[18, 100], help="least and most tokens of a response")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these designs alone, as the table names them")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "estimators")
    args = parser.parse_args(argv)
    data, model, policy = (
        (args.data, args.model_name_or_path, args.policy) if args.data else policy_of_examples(args.work)
    )
    packed = disk.Packed(data)
    reference, policy = (checkpoint.load_model(str(path), torch.float32).eval() for path in (model, policy))
    low, high = args.lengths
    pairs = [
        int(index)
        for index in np.random.default_rng(0).permutation(len(packed))
        if all(low <= len(side) <= high for side in packed[index][1:])
    ][: args.pairs]
    if len(pairs) < 2 or args.draws < 2:
        raise files.InputError(
            f"{data}: {len(pairs)} pairs have responses of {low} to {high} tokens; at least 2 and --draws 2 are needed"
        )

    def measure(design, draws):
        tallies, began = [Tally() for _ in pairs], time.time()
        for tally, index in zip(tallies, pairs):
            for number in range(draws):
                tally.add(policy, reference, packed, index, design, number)
        return [tally.finish() for tally in tallies], (time.time() - began) / (2 * draws * len(pairs))

    truths, _ = measure(("elbo_stratified", 0, TRUTH_MASKS, 0, OWN), TRUTH_DRAWS)
    spread, length = between(truths)
    words = [len(side) for index in pairs for side in packed[index][1:]]
    print(
        f"{len(pairs)} pairs, responses of {np.mean(words):.0f} tokens ({min(words)} to {max(words)}), {args.draws} draws; "
        f"gradient: squared length {length:.0f}, between pairs {spread:.0f}\n{'':34} | score: variance, bias, x{'':11} | margin: variance, bias, x{'':9} | "
        f"gradient: variance, bias^2, x{'':6} | fair",
        flush=True,
    )
    rows, baselines = [], {}
    for design in DESIGNS + PARTS:
        names = dict(zip(("estimator", "diffusion_steps", "trajectories", "backprop_steps", "shared_noise"), design))
        if not args.only or name_of(names) in args.only or design[0] == "elbo" and not design[3]:
            tallies, seconds = measure(design, args.draws)
            rows.append(row_of(design, tallies, truths, seconds, baselines))
            show(rows[-1])
    compare_parts([row for row in rows if row["estimator"] in ("spread", "elbo")], spread)
    if args.json:
        plain = [
            {name: value if isinstance(value, (str, bool, int, list)) else float(value) for name, value in row.items()}
            for row in rows
        ]
        files.write_json(
            args.json,
            {
                "pairs": len(pairs),
                "draws": args.draws,
                "mean_tokens": float(np.mean(words)),
                "gradient_length2": float(length),
                "between_pairs": float(spread),
                "rows": plain,
            },
        )


if __name__ == "__main__":
    exits.run(main)
