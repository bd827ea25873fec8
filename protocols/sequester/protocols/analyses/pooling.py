"""Partial pooling of groups from sums with noise: what each group's own patients say, weighed against all of them together.

A linear model of the opened sums: score_g ~ N(I_g delta_g, I_g + noise^2) and delta_g ~ N(common, c P), with the public prior
variances P. `common` is a change of the intercept and of the multiplier alone, columns 0 and -1: few private rounds leave a
pooled model's weights all too small by one factor, and a small group must not pay for that with a column out of proportion.
How far the groups lie apart, c, is not known beforehand; it is averaged over `APART` by how likely each makes the scores.
"""

from __future__ import annotations

from itertools import product

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
APART = (0.0, 1 / 16, 1 / 4, 1.0, 4.0)  # c: variance between groups, over that of the plan
COMMON = 4.0  # variance of the common change, over that of the plan


def posterior(
    informations: list[Vector], scores: list[Vector], prior: Vector, noise: float
) -> tuple[list[tuple[Vector, float]], Vector]:
    """Of each group the posterior mean of delta (d,), and the weight of its own data in it, 0..1; and the common change (d,).

    `prior` (d,) variances; `noise` is the standard deviation in every number of information and score.
    """
    d = len(prior)
    ends = np.eye(d)[:, [0, -1]]
    wide = np.diag(1 / (COMMON * prior[[0, -1]]))
    of = [_variance(information) for information in informations]
    likely, means, own, shared = [], [], [], []
    for outer, inner in product(APART, APART):
        c = np.concatenate([[outer], np.full(d - 2, inner), [outer]]) * prior
        spreads = [i @ (c[:, None] * i) + i + max(noise**2, 1e-12) * np.eye(d) for i in of]
        solved = [np.linalg.solve(s, np.column_stack([m, i])) for s, m, i in zip(spreads, scores, of, strict=True)]
        left, right = wide.copy(), np.zeros(2)
        for i, s in zip(of, solved, strict=True):
            left += ends.T @ i @ s[:, 1:] @ ends
            right += ends.T @ i @ s[:, 0]
        two = np.linalg.solve(left, right)
        common = ends @ two
        value = float(two @ wide @ two) + float(np.linalg.slogdet(left)[1])
        mean, share = [], []
        for i, m, spread, s in zip(of, scores, spreads, solved, strict=True):
            apart = s[:, 0] - s[:, 1:] @ common  # spread^-1 (score - I common)
            value += float(np.linalg.slogdet(spread)[1]) + float((m - i @ common) @ apart)
            mean.append(common + c * (i @ apart))
            share.append(float(np.trace(c[:, None] * (i @ s[:, 1:]))) / d)
        likely.append(-0.5 * value)
        means.append(mean)
        own.append(share)
        shared.append(common)
    weight = np.exp(np.array(likely) - max(likely))
    weight /= weight.sum()
    deltas, shares = np.tensordot(weight, np.array(means), 1), np.clip(weight @ np.array(own), 0.0, 1.0)
    found = [(delta, float(share)) for delta, share in zip(deltas, shares, strict=True)]
    return found, np.asarray(weight @ np.array(shared))


def _variance(information: Vector) -> Vector:
    """The nearest matrix that can be an information: what noise made of it below 0 counts as none."""
    values, axes = np.linalg.eigh(information)
    return np.asarray((axes * np.maximum(values, 0.0)) @ axes.T)
