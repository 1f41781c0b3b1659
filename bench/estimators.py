"""Noise and bias of score, margin and gradient on a trained model: every estimator, and rivals.py's, against VRPO's.

    python bench/estimators.py [--json FILE] [--pairs 20] [--draws 8]
    python bench/estimators.py --data packed --model_name_or_path M --policy P --json FILE

Without --data: the embedded model and preferences, and a policy that is 15 steps of train_dpo.py away, kept in --work.
For each pair and draw: the scores of both responses under policy and reference with the same masks, and the gradient
of the policy's S(w) - S(l) by every weight. The truth is single-token steps: elbo_stratified with every level 1..n.

passes     forward passes a response: states that count. heads: output rows a response
score      variance of a response's score, and its mean bias
margin     variance of (S(w) - S_ref(w)) - (S(l) - S_ref(l)) over draws, and its root mean square bias over pairs
gradient   variance of the gradient of S(w) - S(l), summed over all weights, and the squared length of its mean's bias
x          that variance as a share of the iid ELBO's at as many passes or fewer [95% interval, pairs resampled]
fair       the bias is below the standard deviation on a pair: of score, margin, gradient

Second table, of all designs, and of those with part of the states in the gradient:
error         squared error of one pair's gradient for the mean over pairs: between pairs, noise, squared bias
cost          in forward passes a response, a backward pass being two, all at one pass's length
error x cost  at equal compute (pairs times passes) the squared error, as a share of elbo 16x1's

n response tokens, T denoising steps, R trajectories, S states, k of them in the gradient, D draws.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import rivals  # noqa: F401  (its estimators join the product's)
import torch
from step import add_gradient

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import files
import score
from cli import exits
from models import checkpoint
from preferences import packed as disk
from scoring import noise
from scoring.states import States, response_states
from scoring.window import Piece
from training.engine import Ranks


class Design(NamedTuple):
    """An estimator with its numbers."""

    estimator: str
    T: int  # 0: a step for every token
    R: int
    k: int = 0  # states in the gradient; 0: all
    shared: bool = True  # whether chosen and rejected share their noise, if the estimator is one whose pairs do
    block_length: int = 0  # of --order blocks; 0: random order

    @property
    def name(self):
        more = [f"k={self.k}"] * bool(self.k) + ["own"] * (not self.shared)
        more += [f"blocks of {self.block_length}"] * bool(self.block_length)
        return " ".join([f"{self.estimator} {self.T}x{self.R}", *more])


DEFAULT = Design(*noise.default_design())


DESIGNS = [
    Design("elbo", 16, 1),
    Design("elbo_stratified", 16, 1),
    Design("stepwise", 16, 1),
    Design("stepwise", 4, 5),
    Design("spread", 4, 5, shared=False),
    Design("spread", 4, 5),
    Design("spread", 3, 7),
    Design("spread", 6, 3),
    Design("spread", 8, 2),
    Design("elbo", 8, 1),
    Design("elbo_stratified", 8, 1),
    Design("stepwise", 8, 1),
    Design("spread", 4, 2),
    Design("spread", 3, 3),
    Design("radau", 3, 3),
    Design("spread", 2, 7),
    Design("elbo", 4, 1),
    Design("spread", 2, 3),
    Design("radau", 2, 3),
    Design("flat", 2, 3),
    Design("steep", 2, 3),
    Design("coupled", 2, 1),
    Design("mirror", 2, 1),
    Design("stepwise", 4, 1, block_length=8),
    Design("spread", 2, 2),
    Design("flat", 2, 2),
    Design("sdmc", 3, 1),
    Design("halves", 1, 2),
    Design("spread", 1, 1),
    Design("stepwise", 20, 1),
]
PARTS = [Design("spread", 4, 5, k) for k in (1, 2, 4, 8)]
PARTS += [Design("spread", 3, 3, k) for k in (1, 2, 4)]
PARTS += [Design("spread", 2, 3, k) for k in (1, 2)]
PARTS += [Design("elbo", 8, 1, k) for k in (1, 2, 4)]
TRUTH_MASKS, TRUTH_DRAWS = 8, 3
TOKENS = 4096  # of a forward pass


def policy_of_examples(work):
    """(packed, model, policy) folders of the embedded model, made once."""
    model, data, policy = ROOT / "examples" / "tiny", work / "packed", work / "policy"
    common = ["--data", data, "--model_name_or_path", model, "--config_file", ROOT / "configs" / "tiny.yaml"]
    common += ["--estimator", "spread"]
    commands = {
        "data_prep.py": ["--in", ROOT / "examples" / "prefs.jsonl"],
        "score.py": [],
        "train_dpo.py": ["--max_steps", 15, "--output_dir", policy],
    }
    if not (policy / "final").exists():
        for script, more in commands.items():
            command = [sys.executable, ROOT / script, *map(str, common + more)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return data, model, policy / "final"


class Drawn(NamedTuple):
    """One draw for one response."""

    weight: np.ndarray  # (S, n)
    states: States


def draw(packed, index, design, number):
    """[Drawn] of both responses of a pair."""
    made = []
    for side, response in enumerate(packed[index][1:]):
        name = noise.side_of(design.estimator, side) if design.shared else ("chosen", "rejected")[side]
        rng = noise.generator(0, packed.content(index), f"{name} bench", number)
        levels = design.T or len(response)
        masked = noise.state_masks(len(response), design.estimator, levels, design.R, rng, design.block_length)
        weight = noise.state_weights(masked, design.estimator, levels, design.R)
        states = response_states(packed[index][0], response, masked, weight, packed.meta["mask_token_id"])
        if design.k:
            states = states.carrying(noise.gradient_states(masked, weight, design.k, rng))
        made.append(Drawn(weight, states))
    return made


def difference(scores):
    return scores[0] - scores[1]


class Errors(NamedTuple):
    """Of one design on one pair; variances are those of one draw."""

    score_variance: float
    score_bias: float
    margin_variance: float
    margin_bias2: float
    gradient_variance: float
    gradient_bias2: float


class Tally:
    """The draws of one pair by one design."""

    def __init__(self):
        self.scores, self.sum, self.squares, self.passes, self.heads = [], 0.0, 0.0, 0, 0

    def add(self, policy, reference, made):
        """made: [Drawn] of both responses."""
        policy.zero_grad()
        responses = [each.states for each in made]
        [(_, policy_scores)] = add_gradient(policy, [Piece(responses, difference)], TOKENS)
        with torch.no_grad():
            ref_scores = score.state_scores(reference, responses, TOKENS, Ranks(0, 1, torch.device("cpu")))
        gradient = torch.cat([parameter.grad.flatten() for parameter in policy.parameters()])
        self.scores.append([float(part.sum()) for part in (*policy_scores, *ref_scores)])
        self.sum = self.sum + gradient
        self.squares += float(gradient.double().square().sum())
        self.passes += sum(np.count_nonzero(each.weight.any(1)) for each in made) / 2
        self.heads += sum(np.count_nonzero(each.weight) for each in made) / 2

    def finish(self):
        """Turn sums over the D draws into means."""
        D, self.scores = len(self.scores), np.array(self.scores)  # (D, 4)
        self.mean = self.sum / D
        self.noise = (self.squares - float(self.sum.double().square().sum()) / D) / (D - 1)  # of one draw's gradient
        self.margins = self.scores @ [1, -1, -1, 1]  # (D,)
        self.passes, self.heads, self.draws, self.sum = self.passes / D, self.heads / D, D, None
        return self

    def against(self, truth):
        """The Errors against another Tally; what noise adds to a squared bias is taken off."""
        score_off = self.scores.mean(0) - truth.scores.mean(0)
        score_variance, margin_variance = self.scores.var(0, ddof=1), self.margins.var(ddof=1)
        margin_off = self.margins.mean() - truth.margins.mean()
        margin_noise = margin_variance / self.draws + truth.margins.var(ddof=1) / truth.draws
        gradient_off2 = float((self.mean - truth.mean).double().square().sum())
        gradient_noise = self.noise / self.draws + truth.noise / truth.draws
        return Errors(
            score_variance=score_variance[:2].mean(),
            score_bias=score_off[:2].mean(),
            margin_variance=margin_variance,
            margin_bias2=margin_off**2 - margin_noise,
            gradient_variance=self.noise,
            gradient_bias2=gradient_off2 - gradient_noise,
        )


def between(truths):
    """Variance of the true gradient between pairs, and its mean squared length, the truth's own noise taken off."""
    own_noise = np.mean([truth.noise / truth.draws for truth in truths])
    mean = sum(truth.mean for truth in truths) / len(truths)
    spread = sum(float((truth.mean - mean).double().square().sum()) for truth in truths) / (len(truths) - 1)
    return spread - own_noise, np.mean([float(truth.mean.double().square().sum()) for truth in truths]) - own_noise


def interval(ours, theirs, seed=0):
    """95% interval of mean(ours) / mean(theirs), pairs resampled."""
    picks = np.random.default_rng(seed).integers(len(ours), size=(4000, len(ours)))
    return np.quantile(ours[picks].mean(1) / theirs[picks].mean(1), [0.025, 0.975])


def row_of(design, tallies, truths, seconds, baselines):
    """One design's line; baselines: {N: its Errors, (pairs, 6)} of the iid ELBO so far."""
    values = np.array([tally.against(truth) for tally, truth in zip(tallies, truths)])  # (pairs, 6)
    passes = np.mean([tally.passes for tally in tallies])
    if design.estimator == "elbo" and not design.k:
        baselines[design.T] = values
    mean = Errors(*values.mean(0))
    row = {
        "estimator": design.estimator,
        "diffusion_steps": design.T,
        "trajectories": design.R,
        "backprop_steps": design.k,
        "shared_noise": design.shared,
        "block_length": design.block_length,
        "default": design == DEFAULT,
        "passes": passes,
        "heads": np.mean([tally.heads for tally in tallies]),
        "seconds": seconds,
        "score_variance": mean.score_variance,
        "score_bias": mean.score_bias,
        "margin_variance": mean.margin_variance,
        "margin_bias": max(0.0, mean.margin_bias2) ** 0.5,
        "gradient_variance": mean.gradient_variance,
        "gradient_bias2": mean.gradient_bias2,
        "fair": [
            bool(mean.score_bias**2 <= mean.score_variance),
            bool(mean.margin_bias2 <= mean.margin_variance),
            bool(mean.gradient_bias2 <= mean.gradient_variance),
        ],
    }
    N = max((N for N in baselines if N <= max(passes + 1, 4)), default=None)  # 15 passes are compared with 16
    if N:
        row["against_elbo"] = N
        for name in ("score", "margin", "gradient"):
            column = Errors._fields.index(f"{name}_variance")
            ours, theirs = values[:, column], baselines[N][:, column]
            row[f"{name}_ratio"] = ours.mean() / theirs.mean()
            row[f"{name}_interval"] = interval(ours, theirs).tolist()
    return row


def name_of(row):
    names = ("estimator", "diffusion_steps", "trajectories", "backprop_steps", "shared_noise", "block_length")
    return Design(*(row[name] for name in names)).name


def show(row):
    def ratio(name):
        low, high = row[f"{name}_interval"]
        return f"{row[f'{name}_ratio']:6.2f} [{low:.2f}-{high:.2f}]"

    print(
        f"{name_of(row):<22}{row['passes']:6.1f}{row['heads']:6.0f} |"
        f"{row['score_variance']:8.3g}{row['score_bias']:+8.2f}{ratio('score'):>19} |"
        f"{row['margin_variance']:8.3g}{row['margin_bias']:7.2f}{ratio('margin'):>19} |"
        f"{row['gradient_variance']:9.4g}{row['gradient_bias2']:8.0f}{ratio('gradient'):>19} | "
        f"{'/'.join('yes' if fair else 'no' for fair in row['fair'])}{'  default' if row['default'] else ''}",
        flush=True,
    )


def compare_parts(rows, spread):
    """Print what a design's passes bring, with all of its states in the gradient and with part of them."""
    head = f"{'states in the gradient':<24}{'cost':>7}{'noise':>9}{'bias^2':>9}{'error x cost':>14}"
    print(f"\n{head}   (variance between pairs {spread:.0f})")
    for row in rows:
        k = row["backprop_steps"]
        row["cost"] = row["passes"] + min(k, row["passes"]) * 3 if k else 3 * row["passes"]
        row["error"] = spread + row["gradient_variance"] + max(0.0, row["gradient_bias2"])
    unit = next(row["error"] * row["cost"] for row in rows if name_of(row) == "elbo 16x1")
    for row in rows:
        row["error_x_cost"] = row["error"] * row["cost"] / unit
        print(
            f"{name_of(row):<24}{row['cost']:7.1f}{row['gradient_variance']:9.0f}{row['gradient_bias2']:9.0f}"
            f"{row['error_x_cost']:14.2f}"
        )


def chosen_pairs(packed, lengths, count):
    """Indices of `count` random pairs whose responses have lengths in this range."""
    low, high = lengths
    order = np.random.default_rng(0).permutation(len(packed))
    lengths = np.diff(packed.bounds[:, 1:], axis=1)  # (pairs, 2) tokens of the responses
    fits = ((low <= lengths) & (lengths <= high)).all(axis=1)
    return order[fits[order]][:count].tolist()


class Measuring(NamedTuple):
    """What every design is measured on."""

    policy: torch.nn.Module
    reference: torch.nn.Module
    packed: disk.Packed
    pairs: list

    def measure(self, design, draws):
        """(its Tally for each pair, seconds a response)."""
        tallies, began = [Tally() for _ in self.pairs], time.time()
        for tally, index in zip(tallies, self.pairs):
            for number in range(draws):
                tally.add(self.policy, self.reference, draw(self.packed, index, design, number))
        return [tally.finish() for tally in tallies], (time.time() - began) / (2 * draws * len(self.pairs))


def read_arguments(argv):
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
    return parser.parse_args(argv)


def main(argv=None):
    # 1. The models and the pairs.
    args = read_arguments(argv)
    folders = (args.data, args.model_name_or_path, args.policy) if args.data else policy_of_examples(args.work)
    packed = disk.Packed(folders[0])
    reference, policy = (checkpoint.load_model(str(path), torch.float32).eval() for path in folders[1:])
    pairs = chosen_pairs(packed, args.lengths, args.pairs)
    if len(pairs) < 2 or args.draws < 2:
        raise files.InputError(
            f"{folders[0]}: {len(pairs)} pairs have responses of {args.lengths[0]} to {args.lengths[1]} tokens; "
            "at least 2 and --draws 2 are needed"
        )
    measuring = Measuring(policy, reference, packed, pairs)

    # 2. The truth.
    truths, _ = measuring.measure(Design("elbo_stratified", 0, TRUTH_MASKS), TRUTH_DRAWS)
    spread, length = between(truths)
    tokens = [len(side) for index in pairs for side in packed[index][1:]]
    print(
        f"{len(pairs)} pairs, responses of {np.mean(tokens):.0f} tokens ({min(tokens)} to {max(tokens)}), "
        f"{args.draws} draws; gradient: squared length {length:.0f}, between pairs {spread:.0f}\n"
        f"{'':34} | score: variance, bias, x{'':11} | margin: variance, bias, x{'':9} | "
        f"gradient: variance, bias^2, x{'':6} | fair",
        flush=True,
    )

    # 3. Every design against it; the iid ELBO is always measured, for the others are compared with it.
    rows, baselines = [], {}
    for design in DESIGNS + PARTS:
        if not args.only or design.name in args.only or (design.estimator == "elbo" and not design.k):
            tallies, seconds = measuring.measure(design, args.draws)
            rows.append(row_of(design, tallies, truths, seconds, baselines))
            show(rows[-1])
    compare_parts(rows, spread)
    if args.json:
        table = {
            "pairs": len(pairs),
            "draws": args.draws,
            "mean_tokens": float(np.mean(tokens)),
            "gradient_length2": float(length),
            "between_pairs": float(spread),
            "rows": list(map(plain, rows)),
        }
        files.write_json(args.json, table)


def plain(row):
    """A row with Python's numbers for numpy's."""
    return {name: value if isinstance(value, (str, bool, int, list)) else float(value) for name, value in row.items()}


if __name__ == "__main__":
    exits.run(main)
