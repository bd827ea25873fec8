"""Quadratic forms of normal scores: the tail of a mixture of chi-squared, and the optimal test of a gene (SKAT-O).

SKAT-O (Lee et al. 2012) looks at Q(rho) = (1 - rho) sum s^2 + rho (sum s)^2 over a grid of rho, SKAT at 0 and the
burden at 1, and takes the smallest p. That p's own distribution is an integral over the one direction that all Q(rho)
share, the burden's: given it, Q(rho) is a line in what is left, whose mixture is known.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
GRID = (0.0, 0.01, 0.04, 0.09, 0.16, 0.25, 0.5, 1.0)  # of their program
STEP, STEPS = 0.15, 72  # of the inversion, in units of the saddle-point's width
POLE = 0.7  # widths that the path keeps from 0
NODES = 40  # of each piece of the integral, by Gauss and Legendre
NOTHING = 1e-10  # of the largest eigenvalue
LEAST = 1e-300


def tails(q: Vector, values: Vector) -> tuple[Vector, Vector]:
    """(P(sum of values chi-squared_1 > q), its density) for q (n,), values (n, m) or (m,), 0 where a row has fewer.

    The inversion integral of exp(K(s) - s q) / s, along a parabola through the saddle-point that opens to the right,
    where the integrand neither oscillates nor cancels: full relative accuracy deep in the tail too. It is even and
    dies out like a normal, so that the rule of trapezia is exact but for rounding.
    """
    scale = values.max(axis=-1)
    values = np.broadcast_to(
        values / scale[..., None] if values.ndim > 1 else values / scale, (len(q), values.shape[-1])
    )
    q = q / scale
    inside = q > 0
    aim = np.where(inside, q, 1.0)
    low, high = 0.5 / aim, 0.5 * values.shape[1] / aim  # of 1/2 - t: no value is above 1, the largest is 1
    for _ in range(12):  # root of K'(t) = q, K(t) = -1/2 sum log(1 - 2 t values); the path need not meet it exactly
        t = 0.5 - (low * high) ** 0.5
        below = (values / (1 - 2 * t[:, None] * values)).sum(axis=1) < aim
        low, high = np.where(below, low, 0.5 - t), np.where(below, 0.5 - t, high)
    t = 0.5 - (low * high) ** 0.5

    def width_at(t: Vector) -> Vector:
        curve: Vector = 2 * ((values / (1 - 2 * t[:, None] * values)) ** 2).sum(axis=1)
        return curve**-0.5

    width = width_at(t)
    beside = np.minimum(POLE * width_at(np.zeros(len(q))), 0.25)
    t = np.where(np.abs(t) < beside, beside, t)
    width, bend = width_at(t), 0.5 / (0.5 - t)
    y = STEP * np.arange(STEPS) * width[:, None]
    s = t[:, None] + bend[:, None] * y * y + 1j * y
    top = -0.5 * np.log1p(-2 * t[:, None] * values).sum(axis=1) - t * aim
    k = -s * aim[:, None] - top[:, None]
    for j in range(values.shape[1]):  # (rows, steps, values) at once would not fit a cache
        k -= 0.5 * np.log(1 - 2 * s * values[:, j, None])
    along = np.exp(k) * (2 * bend[:, None] * y + 1j) * width[:, None] * STEP
    weight = np.where(np.arange(STEPS) == 0, 0.5, 1.0)
    size = np.exp(top) / np.pi
    beyond = (along / s).imag @ weight * size + (t < 0)  # left of the pole at 0 the integral is that of the other tail
    density = along.imag @ weight * size
    return np.where(inside, np.clip(beyond, 0.0, 1.0), 1.0), np.where(inside, np.maximum(density, 0.0), 0.0) / scale


def mixture_tail(q: float, values: Vector) -> float:
    """P(sum of values chi-squared_1 > q); values that are nothing beside the largest count as 0."""
    return float(tails(np.array([q]), _not_nothing(values)[None, :])[0][0])


def quantiles(p: float, values: Vector) -> Vector:
    """q (n,) with P(sum of values chi-squared_1 > q) = p, for each row of values (n, m)."""
    from scipy.special import chdtri  # heavy: loaded where it is used

    mean, square = values.sum(axis=1), (values**2).sum(axis=1)
    q = square / mean * np.maximum(chdtri(mean**2 / square, p), 1e-3)  # of the same mean and variance: close by
    low, high = np.zeros(len(values)), np.full(len(values), np.inf)
    for _ in range(100):
        beyond, density = tails(q, values)
        more = beyond > p
        low, high = np.where(more, q, low), np.where(more, high, q)
        with np.errstate(all="ignore"):
            step = q + np.log(np.maximum(beyond, LEAST) / p) * beyond / density
        open_ended = np.isinf(high)
        between = np.where(open_ended, 2 * low + mean, (low + np.where(open_ended, 0.0, high)) / 2)
        new = np.where(np.isfinite(step) & (step >= low) & (step <= high), step, between)
        if (np.abs(new - q) <= 1e-9 * (np.abs(q) + mean)).all():
            break
        q = new
    return new


def optimal(s: Vector, v: Vector) -> tuple[float, float]:
    """(p of SKAT-O, the rho of the smallest p) of weighted scores s (m,) with covariance v (m, m) under the null."""
    if len(s) == 1:
        return mixture_tail(float(s[0] ** 2), v[0]), 0.0
    grid, m = np.array(GRID), len(s)
    q = (1 - grid) * float(s @ s) + grid * float(s.sum()) ** 2
    across, burden = v.sum(axis=1), float(v.sum())
    if burden <= NOTHING * float(np.trace(v)):
        return mixture_tail(float(s @ s), _positive(v)), 0.0  # the burden cannot vary: nothing to mix in
    values = np.array([_positive(half @ v @ half) for half in (_root(rho, m) for rho in grid)])
    p, _ = tails(q, values)
    best = int(p.argmin())
    least = max(float(p[best]), LEAST)
    rest = v - np.outer(across, across) / burden
    own = _positive(rest)
    if not own.any() or float(np.trace(rest)) <= NOTHING * float(np.trace(v)):
        return least, float(grid[best])
    if least >= 1.0:
        return 1.0, float(grid[best])
    return _of_the_smallest(least, quantiles(least, values), own, across, burden, rest), float(grid[best])


def _of_the_smallest(least: float, at: Vector, own: Vector, across: Vector, burden: float, rest: Vector) -> float:
    """P(the smallest p <= least): `at` are the quantiles of Q(rho), `own` the eigenvalues of what the burden leaves.

    Lee et al. write z for the mean column of the root of v: z'z = burden / m^2, and M projects on it. Their kappa has
    the eigenvalues of the rest and a cross term of mean 0, which widens its variance; a mixture is stretched to that.
    """
    from scipy.special import chdtri, ndtr, roots_legendre  # heavy: loaded where it is used

    grid = np.array(GRID[:-1])
    tau = grid * burden + (1 - grid) * float(across @ across) / burden
    mean, alone = float(own.sum()), 2 * float((own**2).sum())
    narrow = (alone / (alone + 4 * float(across @ rest @ across) / burden)) ** 0.5
    end = float(chdtri(1, least))  # beyond it the burden's own p is smaller than `least`
    zero = mean - mean / narrow  # of kappa where the mixture is at 0
    corners = np.concatenate([_crossings(at[:-1], tau, grid), (at[:-1] - (1 - grid) * zero) / tau])
    bounds = np.unique(np.clip(np.concatenate([[0.0], corners, [end]]), 0.0, end)) ** 0.5
    x, weight = roots_legendre(NODES)
    middle, half = (bounds[1:] + bounds[:-1]) / 2, (bounds[1:] - bounds[:-1]) / 2
    z = (middle[:, None] + half[:, None] * x).ravel()
    weights = (half[:, None] * weight).ravel() * np.exp(-z * z / 2) * (2 / np.pi) ** 0.5
    lines = (at[:-1, None] - tau[:, None] * z * z) / (1 - grid[:, None])
    beyond, _ = tails((lines.min(axis=0) - mean) * narrow + mean, own)
    return min(float(beyond @ weights) + 2 * float(ndtr(-(end**0.5))), len(GRID) * least, 1.0)


def _crossings(at: Vector, tau: Vector, grid: Vector) -> Vector:
    """Where the lowest of the lines (at - tau x) / (1 - rho) changes, for the integral to stop there."""
    level, slope = at / (1 - grid), tau / (1 - grid)
    i, j = np.triu_indices(len(grid), 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        x = (level[i] - level[j]) / (slope[i] - slope[j])
    usable = np.isfinite(x) & (x > 0)
    x, i = x[usable], i[usable]
    height = level[i] - slope[i] * x
    lowest = (level[:, None] - slope[:, None] * x).min(axis=0)
    kept: Vector = x[height <= lowest + 1e-12 * np.abs(height)]
    return kept


def _root(rho: float, m: int) -> Vector:
    """The root of (1 - rho) I + rho 11'."""
    alone = (1 - rho) ** 0.5
    return np.asarray(alone * np.eye(m) + ((1 - rho + m * rho) ** 0.5 - alone) / m)


def _positive(v: Vector) -> Vector:
    """Eigenvalues, 0 in place of what is nothing beside the largest."""
    return _not_nothing(np.asarray(np.linalg.eigvalsh(v), dtype=np.float64))


def _not_nothing(values: Vector) -> Vector:
    return np.where(values > NOTHING * max(float(values.max()), LEAST), values, 0.0)
