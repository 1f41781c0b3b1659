"""Tests of bench/rivals.py: estimators without a bias, and what their masks are.

bash tests/run.sh tests/bench/test_bench_rivals.py
"""

import sys

import numpy as np
import pytest
from small import ROOT

sys.path.insert(0, str(ROOT / "bench"))
import rivals

import config
from files import InputError
from scoring import noise
from scoring.noise import generator


@pytest.mark.parametrize("name, T, R", [("sdmc", 3, 2), ("halves", 1, 2), ("coupled", 2, 1), ("mirror", 2, 1)])
def test_rivals_have_no_bias(name, T, R):
    """The mean score of f(l) = a + b l is its sum over levels, n (a + b (n + 1) / 2), and no token is favoured."""
    n, sums, columns = 15, [], np.zeros(15)
    for key in range(3000):
        masked = noise.state_masks(n, name, T, R, generator(0, [key], "rival"))
        weight = noise.state_weights(masked, name, T, R)
        assert masked.shape == weight.shape == (len(noise.step_of_state(name, T, R)), n) and not weight[~masked].any()
        level = masked.sum(1)
        sums.append([weight.sum() / n, (weight.sum(1) * level).sum() / n / 8])
        columns += weight.sum(0)
    np.testing.assert_allclose(np.mean(sums, 0), 1, atol=5 * np.std(sums, 0).max() / 3000**0.5 + 1e-6)
    np.testing.assert_allclose(columns / columns.mean(), 1, atol=0.15)


def test_complementary_masks():
    """coupled hides every token once and one twice; mirror hides the same number from either end of an order."""
    for n in (4, 9, 30):
        for key in range(20):
            first, second = noise.state_masks(n, "coupled", 1, 1, generator(0, [key], "rival"))
            assert (first | second).all() and (first & second).sum() == 1
            first, second = noise.state_masks(n, "mirror", 1, 1, generator(0, [key], "rival"))
            assert rivals.density(n).sum() == pytest.approx(1)
            assert first.sum() == second.sum() and (first & second).sum() == max(0, 2 * first.sum() - n)


@pytest.mark.parametrize("name", rivals.RIVALS)
def test_scripts_take_them(name):
    """T and R are filled in; block-causal models refuse them."""
    noise_args = config.NoiseArguments(estimator=name)
    noise.settle(noise_args, False)
    assert noise_args.estimator == name and noise_args.diffusion_steps >= 1 and noise_args.trajectories >= 1
    with pytest.raises(InputError, match="bidirectional"):
        noise.settle(config.NoiseArguments(estimator=name), True)
