"""Tests of scoring/sft_noise.py.

bash tests/run.sh tests/scoring/test_sft_noise.py
"""

import numpy as np

from scoring import sft_noise
from scoring.noise import generator


def test_formula():
    """weight = masked / (p n) with p = (1 - 1e-3) t + 1e-3 and t the first number drawn."""
    for key in range(20):
        [masked], [weight] = sft_noise.draw(9, generator(0, [key], "sft"))
        p = 0.999 * generator(0, [key], "sft").random() + 0.001
        assert masked.dtype == bool and weight.dtype == np.float32
        np.testing.assert_allclose(weight, masked / (p * 9), rtol=1e-6)


def test_expectations():
    draws = [sft_noise.draw(50, generator(0, [key], "sft")) for key in range(4000)]
    share = np.array([masked.mean() for masked, _ in draws])
    assert abs(share.mean() - 0.5005) < 0.025  # E[p]; 5 sigma
    np.testing.assert_allclose(np.quantile(share, [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=0.05)  # t is uniform
    assert abs(np.mean([weight.sum() for _, weight in draws]) - 1) < 0.03  # unbiased: E[sum of weights] = 1
    columns = np.mean([masked[0] for masked, _ in draws], 0)
    np.testing.assert_allclose(columns, 0.5005, atol=0.045)  # no position is favoured
