"""Quadrature rules over the levels 1..n of a response: at how many hidden tokens to look, and how much each counts.

What is estimated is n times the mean of f(l) over l = 1..n under a weighting w, f(l) the mean log-probability of a
token hidden with l - 1 others. Uniform w gives the likelihood bound. A rule has T nodes k, whole numbers of hidden
tokens, and shares that sum to 1; the estimate is n sum_k share_k f(k).

The nodes of Gauss's rule are eigenvalues of a small matrix, and those of Radau's rule, which has a node at the end
l = n, are Gauss's for the weighting (n - l) w (Golub, SIAM Review 15, 1973). They are rounded to different whole
numbers, and the shares are computed for these, so no rounding is left in the rule.
"""

import numpy as np


def weighting(n, power=0.0):
    """(n,) float64: w(l) in proportion to l^power for l = 1..n, of sum 1.

    0 is the likelihood bound. 1 counts every hidden token alike, whatever the level, as the loss of masked language
    models does: f(l) is the mean of l tokens.
    """
    w = np.arange(1, n + 1) ** float(power)
    return w / w.sum()


def gauss_nodes(w, T):
    """(T,) int64, rising: the rounded nodes of Gauss's rule for the weights w (n,) of 1..n. 1 <= T <= n.

    >>> gauss_nodes(weighting(30), 3).tolist()
    [4, 16, 27]
    """
    n = len(w)
    at = np.arange(1, n + 1)
    powers = np.polynomial.legendre.legvander(2 * at / n - 1, T - 1)  # (n, T)
    basis, _ = np.linalg.qr(np.sqrt(w)[:, None] * powers)  # (n, T) orthonormal
    nodes = np.rint(np.linalg.eigvalsh(basis.T * at @ basis)).astype(np.int64)
    place = np.arange(T)
    nodes = np.maximum.accumulate(np.maximum(nodes, 1) - place) + place  # rising by at least 1
    return np.minimum(nodes, n - T + 1 + place)


def radau_nodes(w, T):
    """(T,) int64, falling: n, where every trajectory begins, and T - 1 nodes below it, for the weights w (n,) of 1..n.

    With n <= T every level is there, and what is left over hides nothing. There are fewer nodes, too, where they lie so
    close together that a share would be below 0.

    >>> radau_nodes(weighting(30), 2).tolist(), radau_nodes(weighting(30, 1), 2).tolist()
    ([30, 10], [30, 15])
    >>> radau_nodes(weighting(30), 3).tolist(), radau_nodes(weighting(2), 3).tolist()
    ([30, 20, 5], [2, 1, 0])
    """
    n = len(w)
    if n <= T or T == 1:
        return np.maximum(n - np.arange(T), 0)
    for count in range(T, 1, -1):
        nodes = np.append(gauss_nodes(((n - np.arange(1, n + 1)) * w)[:-1], count - 1), n)
        if (shares(w, nodes) >= 0).all():
            return np.append(nodes[::-1], np.zeros(T - count, np.int64))
    return np.append(n, np.zeros(T - 1, np.int64))


def shares(w, levels):
    """(levels,) float64 with sum_k share_k k^p = sum_l w(l) l^p for as many powers p as there are different levels."""
    n = len(w)
    rows = np.polynomial.legendre.legvander(2 * np.arange(1, n + 1) / n - 1, len(levels) - 1)  # (n, levels)
    return np.linalg.solve(rows[levels - 1].T, w @ rows)
