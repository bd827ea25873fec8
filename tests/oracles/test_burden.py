"""Burden and SKAT against the pooled formulas, the mixture tail against known distributions; all three at their level."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import statsmodels.api as sm
from scipy.stats import beta, chi2, norm

import contracts
import plain_loop
from oracles import table
from oracles.test_association import pooled_saddlepoint
from oracles.test_structure import variants
from sequester.protocols.analyses import saddlepoint
from sequester.protocols.analyses.burden import LEAST_EXPECTED
from sequester.protocols.analyses.burden import tests as gene_tests
from sequester.protocols.analyses.quadratic import mixture_tail
from sequester.protocols.errors import StudyError
from sequester.protocols.study import Study

EXACT = {"mode": "strict", "ring_bits": 64, "fraction_bits": 28}
BINARY = {"name": "case", "kind": "binary", "values": ["0", "1"]}
HEIGHT = {"name": "height", "kind": "quantitative", "lower": "-10", "upper": "10", "centre": "0", "scale": "1"}
FEW_EXPECTED = "too few carriers expected in the rarer outcome"
SIZES = [3000, 1500, 400, 100]
ALL = sum(SIZES)
F = np.array([0.001, 0.002, 0.004, 0.008, 0.01, 0.02, 0.995, 0.003, 0.006, 0.012, 0.0004, 0.0004])
GENES = [
    {"name": "ONE", "variants": [f"v{j}" for j in range(7)]},
    {"name": "TWO", "variants": ["v7", "v8"]},
    {"name": "SOLE", "variants": ["v9"]},
    {"name": "FEW", "variants": ["v10", "v11"]},
]


def study_of(phenotype: dict[str, Any] = BINARY, **plan: Any) -> Study:
    return contracts.study(
        phenotype=phenotype, cohort={}, aggregation=EXACT,
        variants=[{**v, "frequency": str(f)} for v, f in zip(variants(12), F, strict=True)],
        covariates=[{"name": "c0", "kind": "quantitative", "lower": "-9", "upper": "9", "centre": "0", "scale": "1"}],
        analyses=[{"kind": "burden", "name": "genes", "mode": "exact", "genes": GENES} | plan],
    )  # fmt: skip


def people(seed: int, effect: float = 0.0, cases: float = 0.2) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((ALL, 1))
    g = rng.binomial(2, F, (ALL, 12)).astype(float)
    g[rng.random(g.shape) < 0.01] = np.nan
    g[:, 10:] = 0.0
    g[:4, 10] = 1.0
    load = np.nan_to_num(g[:, :6]).sum(axis=1)
    z = 0.3 * x[:, 0] + effect * load
    y = (rng.random(ALL) < 1 / (1 + np.exp(-(z + np.log(cases / (1 - cases)))))).astype(float)
    return x, g, y, np.clip(z + rng.standard_normal(ALL), -10, 10)


def run(study: Study, x: np.ndarray, g: np.ndarray, y: np.ndarray) -> list[dict[str, Any]]:
    whole = plain_loop.patients(study, y, table=x, dosage=g)
    return plain_loop.run(study, plain_loop.split(whole, SIZES))["genes"].result["genes"]


def pooled(
    x: np.ndarray, g: np.ndarray, y: np.ndarray, places: list[int], linear: bool
) -> tuple[float, float, np.ndarray]:
    """Burden z, SKAT Q and its eigenvalues, from patients, by the formulas of Wu et al. 2011."""
    design = sm.add_constant(x)
    filled = np.where(np.isnan(g), 2 * F, g)[:, places]
    if linear:
        null = sm.OLS(y, design).fit()
        r, w = y - null.fittedvalues, np.full(len(y), 1 / null.scale)
        r = r / null.scale
    else:
        mu = sm.Logit(y, design).fit(disp=0, tol=1e-14).predict()
        r, w = y - mu, mu * (1 - mu)
    minor = np.minimum(F, 1 - F)[places]
    weight = beta.pdf(minor, 1, 25) * np.where(F[places] > 0.5, -1, 1)
    gw = filled * weight
    cross = gw.T @ (design * w[:, None])
    v = gw.T @ (gw * w[:, None]) - cross @ np.linalg.solve(design.T @ (design * w[:, None]), cross.T)
    u = gw.T @ r
    return float(u.sum() / np.sqrt(v.sum())), float(u @ u), np.linalg.eigvalsh(v)


@pytest.mark.parametrize("linear", [False, True])
def test_gene_tests_equal_the_pooled_formulas(linear: bool) -> None:
    x, g, y, height = people(1, 0.3)
    outcome = height if linear else y
    rows = run(study_of(HEIGHT if linear else BINARY), x, g, outcome)
    for row, places in zip(rows, (list(range(7)), [7, 8], [9]), strict=False):
        if not linear and places == [7, 8]:
            assert row["not_tested"] == FEW_EXPECTED  # some 90 carriers, of whom a fifth would be cases
            continue
        z, q, values = pooled(x, g, outcome, places, linear)
        table.record("gene tests", "statsmodels", "burden z, relative", row["burden_z"], z, rtol=1e-8)
        if not linear:
            continue  # its tails have a test of their own
        drawn = np.random.default_rng(2).chisquare(1, (400_000, len(values))) @ values
        p = float((drawn > q).mean())
        error = 4 * np.sqrt(max(p * (1 - p), 2.5e-6) / 400_000)
        assert abs(row["skat_p"] - p) < error  # 4 standard errors of a simulation of 400,000 draws
    # one variant: the same test
    assert rows[2]["skat_p"] == pytest.approx(rows[2]["burden_p"], rel=1e-6)
    assert rows[2]["p"] == pytest.approx(rows[2]["burden_p"], rel=1e-6)
    assert rows[3] == {"gene": "FEW", "variants": 2, "carriers": "<10", "not_tested": "too few carriers"}


def test_the_mixture_tail_of_equal_weights_is_a_chi_squared() -> None:
    for m in (1, 2, 3, 5, 30):
        for p in (0.999, 0.5, 0.05, 1e-3, 1e-6, 1e-12, 1e-40):
            found = mixture_tail(3 * float(chi2.isf(p, m)), np.full(m, 3.0))
            table.record("gene tests", "scipy.stats", "tail of a mixture, relative", found, p, rtol=1e-8)


def test_two_unequal_weights_are_the_convolution() -> None:
    rng = np.random.default_rng(3)
    drawn = rng.chisquare(1, (2_000_000, 2)) @ [1.0, 0.2]
    for q in (0.5, 2.0, 6.0):
        p = float((drawn > q).mean())
        assert mixture_tail(q, np.array([0.2, 1.0])) == pytest.approx(p, abs=4 * (p * (1 - p) / 2e6) ** 0.5)


def robust(x: np.ndarray, g: np.ndarray, y: np.ndarray, places: list[int]) -> tuple[float, float]:
    """p of burden and SKAT from patients: pooled saddle-points by a root finder, V scaled as Zhao et al. (2020) do."""
    design = sm.add_constant(x)
    mu = sm.Logit(y, design).fit(disp=0, tol=1e-14).predict()
    w = mu * (1 - mu)
    minor = np.minimum(F, 1 - F)[places]
    weight = beta.pdf(minor, 1, 25) * np.where(F[places] > 0.5, -1, 1)
    filled = np.where(np.isnan(g), 2 * F, g)[:, places] - 2 * F[places]
    adjusted = filled - design @ np.linalg.solve(design.T @ (design * w[:, None]), design.T @ (filled * w[:, None]))

    def tail(column: np.ndarray) -> tuple[float, float, float]:
        sd = float((column**2 @ w) ** 0.5)
        s = float(column @ (y - mu))
        p = pooled_saddlepoint(column / sd, mu, s / sd) if abs(s) >= 2 * sd else 2 * norm.sf(abs(s) / sd)
        return s, p, s * s / chi2.isf(p, 1)

    u, _, implied = (np.array(a) for a in zip(*(tail(column) for column in adjusted.T), strict=True))
    v = adjusted.T @ (adjusted * w[:, None])
    stretch = np.sqrt(implied / np.diag(v))
    v = v * np.outer(stretch, stretch) * np.outer(weight, weight)
    s, burden, wanted = tail(adjusted @ weight)
    if abs(s) >= 2 * float(((adjusted @ weight) ** 2 @ w) ** 0.5):
        v *= max(1.0, wanted / v.sum())
    return burden, mixture_tail(float(((weight * u) ** 2).sum()), np.linalg.eigvalsh(v))


@pytest.mark.parametrize(("seed", "effect", "cases"), [(5, 0.8, 0.2), (6, 1.2, 0.06), (8, 0.8, 0.08)])
def test_tails_of_an_unbalanced_outcome_are_the_pooled_saddlepoints(seed: int, effect: float, cases: float) -> None:
    x, g, y, _ = people(seed, effect, cases)
    rows = run(study_of(), x, g, y)
    for row, places in zip(rows, (list(range(7)), [7, 8], [9]), strict=False):
        assert "p" in row or row["not_tested"] == FEW_EXPECTED
        if "p" in row:
            burden, skat = robust(x, g, y, places)
            table.record("gene tests", "scipy.optimize", "burden p by the saddle-point, relative", row["burden_p"], burden,
                         rtol=1e-6)  # fmt: skip
            table.record("gene tests", "scipy.optimize", "SKAT p by the saddle-points, relative", row["skat_p"], skat,
                         rtol=1e-6)  # fmt: skip
    assert rows[0]["burden_z"] > 2  # so that the tails were asked for


def test_no_p_where_the_rarer_outcome_holds_too_few_carriers() -> None:
    x, g, _, _ = people(7)
    y = np.zeros(ALL)
    y[::100] = 1.0
    rows = run(study_of(), x, g, y)
    assert rows[1]["not_tested"] == FEW_EXPECTED and "p" not in rows[1]
    short = run(study_of(tail_rounds=4), *people(5, 0.8)[:3])[0]
    assert "p" not in short and "tail_rounds" in short["not_tested"]


def levels(draw: Callable[[np.random.Generator], np.ndarray | None], draws: int, label: str) -> None:
    """Burden, SKAT and both at 5 % over null traits; each must reject 4 to 6 %."""
    rng, p = np.random.default_rng(30), []
    for _ in range(draws):
        found = draw(rng)
        p += [] if found is None else [found]
    rejected = (np.array(p) < 0.05).mean(axis=0)
    for name, level in zip(("burden", "SKAT", "SKAT-O"), rejected, strict=True):
        table.within("gene tests", f"{draws:,} null simulations", f"type I error at 5 % from .05, {label}: {name}",
                     abs(float(level) - 0.05), 0.01)  # fmt: skip


RARE = np.array([0.001, 0.002, 0.004, 0.008, 0.01, 0.02, 0.003, 0.006, 0.005, 0.012])
WEIGHT = beta.pdf(RARE, 1, 25)


@pytest.mark.slow
def test_null_genes_of_a_quantitative_outcome_are_rejected_at_their_level() -> None:
    g = np.random.default_rng(40).binomial(2, RARE, (3000, 10)).astype(float)
    g -= g.mean(axis=0)
    v, none = g.T @ g, np.full(10, np.inf)

    def draw(rng: np.random.Generator) -> np.ndarray:
        y = rng.standard_normal(3000)
        found = gene_tests(g.T @ (y - y.mean()) / y.var(), v / y.var(), WEIGHT, np.inf, none)
        return np.array([found[name] for name in ("burden_p", "skat_p", "p")])

    levels(draw, 4000, "quantitative")


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("n", "cases", "f"), [(4000, 400, RARE), (4000, 160, RARE), (6000, 600, RARE / 4)])
def test_null_genes_of_unbalanced_studies_are_rejected_at_their_level(n: int, cases: int, f: np.ndarray) -> None:
    y = np.zeros(n)
    y[:cases] = 1.0
    mu = np.full(n, cases / n)

    def tail(columns: np.ndarray, s: np.ndarray, variance: np.ndarray) -> np.ndarray:
        wanted = (variance > 1e-9) & (np.abs(s) >= 2 * np.sqrt(variance))
        out = np.full(len(s), np.inf)
        if wanted.any():
            state = saddlepoint.start(s[wanted], variance[wanted])
            while not saddlepoint.is_done(state):
                sums = saddlepoint.contribution(columns[:, wanted], mu, saddlepoint.points(state))
                state = saddlepoint.advanced(state, sums)
            out[wanted] = saddlepoint.p_values(state)
        return out

    def draw(rng: np.random.Generator) -> np.ndarray | None:
        g = rng.binomial(2, f, (n, 10)).astype(float)
        if (g.sum(axis=1) > 0).sum() * cases / n < LEAST_EXPECTED:
            return None
        g -= g.mean(axis=0)
        u, v = g.T @ (y - mu), g.T @ g * (cases / n) * (1 - cases / n)
        weight = beta.pdf(f, 1, 25)
        burden = tail((g @ weight)[:, None], np.array([weight @ u]), np.array([weight @ v @ weight]))
        found = gene_tests(u, v, weight, float(burden[0]), tail(g, u, np.diag(v)))
        return np.array([found[name] for name in ("burden_p", "skat_p", "p")])

    levels(draw, 12_000, "unbalanced")  # the estimate has a standard error of .2 %


def test_a_gene_with_an_effect_is_found() -> None:
    x, g, y, _ = people(5, 0.8)
    rows = run(study_of(), x, g, y)
    assert rows[0]["p"] < 1e-4 and rows[0]["burden_z"] > 0 and rows[0]["burden_p"] < 1e-4


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ({"mode": "private"}, "exact only"),
        ({"genes": [{"name": "A", "variants": ["v99"]}]}, "names v99, which the study does not list"),
        ({"genes": [{"name": "A", "variants": ["v1"]}, {"name": "A", "variants": ["v2"]}]}, "named twice"),
        ({"beta": ["0", "25"]}, "above 0"),
    ],
)
def test_a_plan_that_cannot_be_run_is_refused(plan: dict[str, Any], said: str) -> None:
    with pytest.raises(StudyError, match=said):
        study_of(**plan)
