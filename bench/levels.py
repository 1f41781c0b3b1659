"""At which noise levels is a flaw decided? How a model without it judges pairs of the flawed one otherwise, by level.

    python bench/levels.py --data PACKED --flawed M --sound N [--pairs 100] [--draws 4] [--json FILE]

PACKED: pairs that were sampled from M and verified (make_prefs.py, data_prep.py). With f(l) the mean log-probability of
a token that is hidden with l - 1 others, the log-likelihood bound of a response is the sum of f(l) over l = 1..n. What
is shared out is the mean over pairs of

    D = [log p(chosen) - log p(rejected)] of the sound model - the same of the flawed one

to levels l / n in bins of equal width, with a 95% interval of each share (pairs resampled). In the last bin nearly
all is hidden: there a sampler starts.

n response tokens, l of them hidden, D draws.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import files
import score
from cli import exits
from models import checkpoint
from preferences import packed as disk
from scoring.states import response_states
from training.engine import Ranks

TOKENS = 4096  # of a forward pass
CPU = Ranks(0, 1, torch.device("cpu"))


def level_states(prompt, response, mask_id, rng):
    """The States of a response with l = 1..n tokens hidden, at random places: the score of state l - 1 is f(l)."""
    level = np.arange(1, len(response) + 1)[:, None]  # (n, 1)
    rank = rng.random((len(response), len(response))).argsort(1).argsort(1)
    masked = rank < level  # (n, n)
    return response_states(prompt, response, masked, masked / level, mask_id)


def bins_of(n, bins):
    """(n,) int: the bin of each level l = 1..n; bin b holds b / bins < l / n <= (b + 1) / bins."""
    return -(-np.arange(1, n + 1) * bins // n) - 1


@torch.no_grad()
def shares_of_pair(models, pair, mask_id, bins, rng):
    """(bins,) of D of one pair and draw; models: (sound, flawed), which see the same masks."""
    states = [level_states(pair[0], response, mask_id, rng) for response in pair[1:]]
    sound, flawed = (score.state_scores(model, states, TOKENS, CPU) for model in models)
    chosen, rejected = (
        np.bincount(bins_of(len(a), bins), (a - b).double().numpy(), bins) for a, b in zip(sound, flawed)
    )
    return chosen - rejected


def measure(packed, models, bins=8, pairs=100, draws=4):
    """(pairs, bins): D by level of random pairs, the mean of the draws."""
    rng = np.random.default_rng(0)
    chosen = rng.permutation(len(packed))[:pairs]
    mask_id = packed.meta["mask_token_id"]
    return np.array(
        [np.mean([shares_of_pair(models, packed[i], mask_id, bins, rng) for _ in range(draws)], 0) for i in chosen]
    )


def summary(found):
    """The line of a model: mean D, its shares by level with their intervals, and the mean level."""
    resampled = np.random.default_rng(0).integers(len(found), size=(4000, len(found)))
    means = found[resampled].mean(1)  # (4000, bins)
    shares = found.mean(0) / found.mean() / found.shape[1]
    low, high = np.quantile(means / means.sum(1, keepdims=True), [0.025, 0.975], axis=0)
    middles = (np.arange(found.shape[1]) + 0.5) / found.shape[1]
    return {
        "pairs": len(found),
        "difference": float(found.sum(1).mean()),
        "shares": shares.tolist(),
        "intervals": np.stack((low, high), 1).tolist(),
        "mean_level": float(shares @ middles),
    }


def show(line):
    bins = len(line["shares"])
    mean = f"{line['mean_level']:.0%} hidden on average"
    print(f"{line['pairs']} pairs, D = {line['difference']:.2f} nats, {mean}")
    print("hidden    " + "".join(f"{place / bins:>8.0%}" for place in range(1, bins + 1)))
    print("share     " + "".join(f"{share:>8.0%}" for share in line["shares"]))
    print("interval  " + "".join(f"{f'{100 * low:.0f}-{100 * high:.0f}':>8}" for low, high in line["intervals"]))


def read_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder of the packed pairs")
    parser.add_argument("--flawed", required=True, help="the model that they were sampled from")
    parser.add_argument("--sound", required=True, help="a model without the flaw")
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument("--bins", type=int, default=8)
    parser.add_argument("--json", help="write the table there")
    return parser.parse_args(argv)


def main(argv=None):
    args = read_arguments(argv)
    models = [checkpoint.load_model(path, torch.float32).eval() for path in (args.sound, args.flawed)]
    line = summary(measure(disk.Packed(args.data), models, args.bins, args.pairs, args.draws))
    show(line)
    if args.json:
        files.write_json(args.json, line)


if __name__ == "__main__":
    exits.run(main)
