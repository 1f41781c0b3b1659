"""Estimators of other papers, and other weightings of the levels, for comparison. They are no choice of the product.

    python bench/rivals.py score.py --estimator sdmc --diffusion_steps 3 --trajectories 1 ...

runs a script with these estimators beside its own; learned.py and estimators.py know them too.

    flat      radau for w(l) ~ l: every hidden token counts the same, whatever the level
    steep     radau for w(l) ~ l^2
    sdmc      Gauss's rule of T nodes, R random masks each, of exactly the node's size, each response by itself (SDMC of
              GDPO, arXiv 2510.08554)
    halves    the same for T = 1 with R rotated windows, which the pair shares: with R = 2 two complementary halves
    coupled   T pairs of complementary masks at random levels, l and n + 1 - l hidden (coupled sampling of DiffuCoder,
              arXiv 2506.20639, and ESPO, arXiv 2512.03759); both levels are uniform, so the sum has no bias
    mirror    T levels drawn with P-POTS's density, two masks each: the l first and the l last in a random order
              (MIRROR, arXiv 2511.18159)

P-POTS draws a level in proportion to the root of the second moment of what it would add, and divides by the chance.
The moment is modelled as (l / n)^2 + NOISE / l; NOISE was not fitted to a model.

n response tokens, l of them hidden, S states.
"""

import runpy
import sys
from pathlib import Path
from typing import Literal

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import config
from files import InputError
from scoring import noise, quadrature

NOISE = 1.0


def random_ranks(n, count, rng):
    """(count, n) int: random orders of n tokens."""
    return rng.random((count, n)).argsort(1).argsort(1)


# --- Gauss's rule ----------------------------------------------------------------------------


def sdmc_masks(n, T, R, rng):
    nodes = quadrature.gauss_nodes(quadrature.weighting(n), min(n, T))
    levels = np.append(nodes, np.full(T - len(nodes), n)).repeat(R)  # a short response has some levels twice
    return random_ranks(n, T * R, rng) < levels[:, None]


def halves_masks(n, T, R, rng):
    return noise.windows(n, quadrature.gauss_nodes(quadrature.weighting(n), 1), R, rng)[:, 0]


# --- pairs of masks ---------------------------------------------------------------------------------------


def coupled_masks(n, T, R, rng):
    level, rank = rng.integers(1, n + 1, T)[:, None], random_ranks(n, T, rng)
    return np.stack((rank < level, rank >= level - 1), 1).reshape(2 * T, n)


def mirrored_masks(n, T, R, rng):
    level, rank = 1 + rng.choice(n, T, p=density(n))[:, None], random_ranks(n, T, rng)
    return np.stack((rank < level, rank >= n - level), 1).reshape(2 * T, n)


def density(n):
    """(n,) the chance of each level 1..n."""
    level = np.arange(1, n + 1)
    p = np.sqrt((level / n) ** 2 + NOISE / level)
    return p / p.sum()


def mirrored_weights(masked, T, R):
    level = masked.sum(1)
    return (masked / (level * density(masked.shape[1])[level - 1] * len(masked))[:, None]).astype(np.float32)


def pair_steps(T, R):
    return noise.level_steps(T, 2)


by_rule, by_chance = noise.ESTIMATORS["radau"].weights, noise.ESTIMATORS["elbo"].weights
RIVALS = {
    "flat": noise.radau(1),
    "steep": noise.radau(2),
    "sdmc": noise.Estimator(sdmc_masks, by_rule, noise.level_steps, (3, 1), is_paired=False),
    "halves": noise.Estimator(halves_masks, by_rule, noise.level_steps, (1, 2)),
    "coupled": noise.Estimator(coupled_masks, by_chance, pair_steps, (2, 1), is_paired=False),
    "mirror": noise.Estimator(mirrored_masks, mirrored_weights, pair_steps, (2, 1), is_paired=False),
}
noise.ESTIMATORS.update(RIVALS)


def main(argv=None):
    script, *flags = (sys.argv[1:] if argv is None else argv) or [""]
    if not (ROOT / script).is_file():
        raise InputError(f"{script} is no script of this repository; expected score.py, train_dpo.py or another")
    config.NoiseArguments.__dataclass_fields__["estimator"].type = Literal["auto", *noise.ESTIMATORS]
    sys.argv = [str(ROOT / script), *flags]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    from cli import exits

    exits.run(main)
