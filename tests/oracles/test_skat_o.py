"""SKAT-O against a slow second implementation from patients, against simulated smallest p values, and at its level."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.integrate import quad, simpson
from scipy.optimize import brentq
from scipy.stats import beta, chi2

from oracles import table
from sequester.protocols.analyses.burden import tests as gene_tests
from sequester.protocols.analyses.quadratic import GRID, optimal, quantiles, tails

F = np.array([0.004, 0.01, 0.02, 0.006, 0.015])
WEIGHT = beta.pdf(F, 1, 25)


U = np.linspace(0.0, 500.0, 50_001)[1:]


def imhof(q: float, values: np.ndarray) -> float:
    """P(sum of values chi-squared_1 > q) by Imhof's (1961) integral, by Simpson's rule."""
    if q <= 0:
        return 1.0
    values, q = values / values.max(), q / values.max()
    if (values > 1e-9).sum() == 1:
        return float(chi2.sf(q, 1))  # whose integrand dies out too slowly
    at = np.outer(values, U)
    theta = 0.5 * np.arctan(at).sum(axis=0) - 0.5 * q * U
    part = np.sin(theta) / (U * np.prod((1 + at**2) ** 0.25, axis=0))
    start = 0.5 * float(values.sum()) - 0.5 * q  # its limit at 0
    return 0.5 + float(simpson(np.append(start, part), x=np.append(0.0, U))) / np.pi


def slow(g: np.ndarray, x: np.ndarray, y: np.ndarray, weight: np.ndarray) -> float:
    """p of SKAT-O by the paper's own matrices: Z = P^(1/2) G W R_rho^(1/2), patients by variants, its mean column and M."""
    n, m = g.shape
    hat = x @ np.linalg.solve(x.T @ x, x.T)
    r = y - hat @ y
    sigma = float(r @ r) / (n - x.shape[1])
    z = (g - hat @ g) * weight
    s = z.T @ r / sigma**0.5
    mean = z.mean(axis=1)
    project = np.outer(mean, mean) / (mean @ mean)
    inside, outside = z.T @ project @ z, z.T @ z - z.T @ project @ z
    kappa = np.clip(np.linalg.eigvalsh(outside), 0, None)
    zeta = 4 * float(np.trace(inside @ outside))
    variance = 2 * float((kappa**2).sum()) + zeta
    p, lambdas = [], []
    for rho in GRID:
        r_rho = (1 - rho) * np.eye(m) + rho * np.ones((m, m))
        values = np.clip(np.linalg.eigvals(z.T @ z @ r_rho).real, 0, None)
        lambdas.append(values)
        p.append(imhof(float(s @ r_rho @ s), values))
    least = min(p)
    q = [brentq(lambda q, v=v: imhof(q, v) - least, 1e-3 * v.sum(), 30 * v.sum(), xtol=1e-7) for v in lambdas]
    tau = [m**2 * rho * (mean @ mean) + (1 - rho) / (mean @ mean) * float(((mean @ z) ** 2).sum()) for rho in GRID]

    def given(eta: float) -> float:
        delta = min((q[k] - tau[k] * eta) / (1 - rho) for k, rho in enumerate(GRID[:-1]))
        shrunk = (delta - kappa.sum()) * ((variance - zeta) / variance) ** 0.5 + kappa.sum()
        return imhof(shrunk, kappa) * float(chi2.pdf(eta, 1))

    end = q[-1] / tau[-1]
    # eta = t^2: the density has a pole at 0
    area = quad(lambda t: given(t * t) * 2 * t, 1e-9, end**0.5, limit=100, epsabs=1e-9, epsrel=1e-6)[0]
    return float(area + chi2.sf(end, 1))


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "effect"), [(1, 0.0), (3, 0.4)])
def test_skat_o_is_the_slow_form_from_patients(seed: int, effect: float) -> None:
    rng = np.random.default_rng(seed)
    n = 500
    x = np.column_stack([np.ones(n), rng.standard_normal(n)])
    g = rng.binomial(2, F * 3, (n, len(F))).astype(float)
    y = 0.5 * x[:, 1] + effect * g[:, :2].sum(axis=1) + rng.standard_normal(n)
    hat = x @ np.linalg.solve(x.T @ x, x.T)
    r = y - hat @ y
    sigma = float(r @ r) / (n - 2)
    left = g - hat @ g
    found = gene_tests(left.T @ r / sigma, left.T @ left / sigma, WEIGHT, np.inf, np.full(len(F), np.inf))
    wanted = slow(g, x, y, WEIGHT)
    table.record("gene tests", "Imhof's integral, from patients", "SKAT-O p, relative", found["p"], wanted, rtol=1e-6)


def test_quantiles_and_tails_are_each_other_backwards() -> None:
    values = np.random.default_rng(1).exponential(1.0, (6, 8)) ** 3
    for p in (0.9, 0.05, 1e-8, 1e-30):
        np.testing.assert_allclose(tails(quantiles(p, values), values)[0], p, rtol=1e-9)
    q, step = np.linspace(0.1, 30.0, 40), 1e-5
    change = (tails(q - step, values[0])[0] - tails(q + step, values[0])[0]) / (2 * step)
    np.testing.assert_allclose(tails(q, values[0])[1], change, rtol=1e-6, atol=1e-12)


def test_the_smallest_p_is_as_frequent_as_skat_o_says() -> None:
    # the smallest of the eight p values of simulated scores, counted: the paper's integral leaves one correlation out
    rng = np.random.default_rng(6)
    a = rng.standard_normal((6, 6))
    v = a @ a.T + 0.5 * np.ones((6, 6))
    s = rng.standard_normal((10_000, 6)) @ np.linalg.cholesky(v).T
    eigen = [np.linalg.eigvals(v @ ((1 - rho) * np.eye(6) + rho)).real for rho in GRID]
    q = [(1 - rho) * (s**2).sum(axis=1) + rho * s.sum(axis=1) ** 2 for rho in GRID]
    smallest = np.min([tails(q[k], np.clip(eigen[k], 0, None))[0] for k in range(len(GRID))], axis=0)
    for level in (0.2, 0.02):
        at = int(np.abs(smallest - level).argmin())
        share = float((smallest <= smallest[at]).mean())
        error = 4 * (share * (1 - share) / len(s)) ** 0.5
        assert abs(optimal(s[at], v)[0] - share) < error + 0.06 * share


def test_skat_o_lies_between_the_smallest_p_and_its_multiple_however_small() -> None:
    v = np.array([[2.0, 0.5, 0.0], [0.5, 1.0, 0.3], [0.0, 0.3, 3.0]])
    for s in ([30.0, 20.0, 40.0], [30.0, -20.0, 1.0], [9.0, 9.0, 9.0], [0.1, 0.0, -0.1], [0.0, 0.0, 0.0]):
        p, rho = optimal(np.array(s), v)
        each = [
            float(tails(np.array([(1 - r) * np.square(s).sum() + r * np.sum(s) ** 2]),
                        np.linalg.eigvals(v @ ((1 - r) * np.eye(3) + r)).real.clip(0))[0][0])
            for r in GRID
        ]  # fmt: skip
        assert min(each) * (1 - 1e-9) <= p <= min(1.0, len(GRID) * min(each)) * (1 + 1e-9) and rho in GRID
        assert each[GRID.index(rho)] == pytest.approx(min(each), rel=1e-6)
    assert 0 < optimal(np.array([300.0, 200.0, 400.0]), v)[0] < 1e-298  # beyond what a float holds


def test_scores_that_leave_nothing_to_mix_have_the_p_of_the_one_test_there_is() -> None:
    one = np.outer([1.0, 2.0, 0.5], [1.0, 2.0, 0.5])  # all variants are one direction: burden and SKAT are one test
    s = 1.7 * np.array([1.0, 2.0, 0.5])
    assert optimal(s, one)[0] == pytest.approx(float(chi2.sf(1.7**2, 1)), rel=1e-8)
    apart = np.array([[1.0, -1.0], [-1.0, 1.0]])  # the burden cannot vary: SKAT alone
    assert optimal(np.array([1.5, -1.5]), apart)[0] == pytest.approx(float(chi2.sf(1.5**2, 1)), rel=1e-8)
    assert optimal(np.array([1.5]), np.array([[2.0]]))[0] == pytest.approx(float(chi2.sf(1.5**2 / 2, 1)), rel=1e-8)
    kept = np.zeros((3, 3))
    kept[:2, :2] = [[1.0, 0.2], [0.2, 2.0]]  # a variant that nobody carries changes nothing
    alone = optimal(np.array([1.0, 2.0]), kept[:2, :2])[0]
    assert optimal(np.array([1.0, 2.0, 0.0]), kept)[0] == pytest.approx(alone, rel=1e-9)
