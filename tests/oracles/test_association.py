"""The scan against PLINK 2 and pooled fits; rare variants against exact tails; structure removed by components."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import statsmodels.api as sm
from scipy.optimize import brentq
from scipy.special import expit, logit
from scipy.stats import hypergeom, norm

import contracts
import plain_loop
from oracles import table
from oracles.test_exact_glm import penalised_maximum
from oracles.test_structure import populations, variants
from sequester.client.compute.genome.plink import PlinkFiles
from sequester.protocols.analyses import saddlepoint
from sequester.protocols.analyses.association import glm_lines
from sequester.protocols.errors import StudyError
from sequester.protocols.study import Study
from sequester.simulate.plink import Line, write_bed

EXACT = {"mode": "strict", "ring_bits": 64, "fraction_bits": 28}
BINARY = {"name": "case", "kind": "binary", "values": ["0", "1"]}
HEIGHT = {"name": "height", "kind": "quantitative", "lower": "-10", "upper": "10", "centre": "0", "scale": "1"}


def study_of(
    count: int, phenotype: dict[str, Any] = BINARY, columns: int = 2, first: Any = (), n0: int = 10_000,
    n_max: int = 12_000, **plan: Any,
) -> Study:  # fmt: skip
    return contracts.study(
        n0=n0, n_max=n_max, phenotype=phenotype, variants=variants(count), cohort={}, aggregation=EXACT,
        covariates=[
            {"name": f"c{j}", "kind": "quantitative", "lower": "-10", "upper": "10", "centre": "0", "scale": "1"}
            for j in range(columns)
        ],
        analyses=[*first, {"kind": "association", "name": "scan", "mode": "exact"} | plan],
    )  # fmt: skip


def data(n: int, v: int, seed: int, prevalence: float = 0.1) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Covariates, genotypes (some rare, 1 % missing), case status and height; v0 and v1 matter."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, 2))
    f = rng.uniform(0.05, 0.5, v)
    f[v // 2 :: 10] = 0.003
    g = rng.binomial(2, f, (n, v)).astype(float)
    liability = x @ [0.4, -0.3] + 0.45 * g[:, 0] - 0.4 * g[:, 1]
    intercept = brentq(lambda b: float((1 / (1 + np.exp(-liability - b))).mean()) - prevalence, -20, 20)
    y = (rng.random(n) < 1 / (1 + np.exp(-liability - intercept))).astype(float)
    height = np.clip(liability + rng.standard_normal(n), -10, 10)
    return x, g, y, height


SIZES = [2000, 1200, 500, 200, 100]
ALL = sum(SIZES)


def scan(study: Study, x: np.ndarray, g: np.ndarray, y: np.ndarray, sizes: list[int] = SIZES) -> dict[str, Any]:
    whole = plain_loop.patients(study, y, table=x, dosage=g)
    return plain_loop.run(study, plain_loop.split(whole, sizes))["scan"].result


def plink(folder: Path, x: np.ndarray, g: np.ndarray, y: np.ndarray, binary: bool) -> list[dict[str, str]]:
    n, v = g.shape
    lines = [Line("1", f"v{j}", 1000 + j, "A", "G") for j in range(v)]
    write_bed(folder / "g", [f"p{i}" for i in range(n)], lines, np.where(np.isnan(g), -1, g).astype(np.int8))
    (folder / "y.txt").write_text(
        "#IID\ty\n" + "".join(f"p{i}\t{y[i] + 1 if binary else y[i]:.17g}\n" for i in range(n))
    )
    (folder / "c.txt").write_text(
        "#IID\tc0\tc1\n" + "".join(f"p{i}\t{x[i, 0]:.17g}\t{x[i, 1]:.17g}\n" for i in range(n))
    )
    subprocess.run(
        ["plink2", "--bfile", "g", "--pheno", "y.txt", "--covar", "c.txt", "--out", "o", "--threads", "1",
         "--glm", "hide-covar", *(["no-firth"] if binary else [])],
        cwd=folder, check=True, capture_output=True,
    )  # fmt: skip
    head, *body = [line.split() for line in next(folder.glob("o.y.glm.*")).read_text().splitlines()]
    return [dict(zip(head, row, strict=True)) for row in body]


def sign(row: dict[str, str]) -> float:
    return 1.0 if row["A1"] == "A" else -1.0


@pytest.mark.skipif(shutil.which("plink2") is None, reason="no plink2")
def test_z_of_the_score_test_agrees_with_plink2_and_hits_are_the_exact_fit(tmp_path: Path) -> None:
    x, g, y, _ = data(ALL, 600, 1)
    study = study_of(600, follow=20, follow_below="0.01")
    result = scan(study, x, g, y)
    t = result["table"]
    theirs = {row["ID"]: row for row in plink(tmp_path, x, g, y, True)}
    ours, other = [], []
    for j, name in enumerate(t["id"]):
        row = theirs[name]
        minor = min(t["frequency"][j], 1 - t["frequency"][j]) * 2 * t["called"][j]
        if minor >= 100 and row["Z_STAT"] != "NA":
            ours.append(t["statistic"][j])
            other.append(sign(row) * float(row["Z_STAT"]))
    ours, other = np.array(ours), np.array(other)
    assert len(ours) > 500
    table.within("association scan", "PLINK 2", "1 - correlation of z", float(1 - np.corrcoef(ours, other)[0, 1]), 1e-4)
    small = np.abs(other) < 3
    table.record("association scan", "PLINK 2", "z below 3", ours[small], other[small], atol=0.06)
    for j in (0, 1):
        assert t["test"][j] == "newton"
        wald = sm.Logit(y, sm.add_constant(np.column_stack([x, g[:, j]]))).fit(disp=0, tol=1e-14)
        label = "association, hits refitted"
        table.record(label, "statsmodels", "z, relative", t["statistic"][j], wald.tvalues[-1], rtol=1e-8)
        table.record(label, "statsmodels", "effect, relative", t["effect"][j], wald.params[-1], rtol=1e-8)
        table.record(label, "statsmodels", "standard error, relative", t["se"][j], wald.bse[-1], rtol=1e-8)
    assert result["null_converged"] and result["cases"] == y.sum()
    head, *body = [line.split("\t") for line in list(glm_lines(study, result))[1:]]
    plink_head = list(next(iter(theirs.values())))
    assert [c for c in plink_head if c not in head] == [] and len(body) == 600


@pytest.mark.skipif(shutil.which("plink2") is None, reason="no plink2")
def test_a_quantitative_scan_is_the_exact_t_test_in_two_rounds(tmp_path: Path) -> None:
    x, g, _, height = data(ALL, 300, 2)
    t = scan(study_of(300, HEIGHT), x, g, height)["table"]
    for j in range(0, 300, 60):
        ols = sm.OLS(height, sm.add_constant(np.column_stack([x, g[:, j]]))).fit()
        label = "association, quantitative"
        table.record(label, "statsmodels", "effect, relative", t["effect"][j], ols.params[-1], rtol=1e-8)
        table.record(label, "statsmodels", "standard error, relative", t["se"][j], ols.bse[-1], rtol=1e-8)
        table.record(label, "statsmodels", "p, relative", t["p"][j], ols.pvalues[-1], rtol=1e-8)
    rows = plink(tmp_path, x, g, height, False)
    theirs = [sign(row) * float(row["T_STAT"]) for row in rows]
    ours = [t["statistic"][int(row["ID"][1:])] for row in rows]
    table.record(label, "PLINK 2", "t", ours, theirs, atol=1e-4)


def test_a_missing_call_is_the_pooled_mean_also_where_a_hospital_lacks_the_variant() -> None:
    x, g, _, height = data(ALL, 20, 3)
    g[:2000, 3] = np.nan
    g[np.random.default_rng(1).random(g.shape) < 0.05] = np.nan
    t = scan(study_of(20, HEIGHT), x, g, height)["table"]
    filled = np.where(np.isnan(g), np.nanmean(g, axis=0), g)
    for j in (0, 3):
        ols = sm.OLS(height, sm.add_constant(np.column_stack([x, filled[:, j]]))).fit()
        assert t["statistic"][j] == pytest.approx(ols.tvalues[-1], rel=1e-8)
    assert t["called"][3] < 2000


def test_what_cannot_be_tested_has_a_code_and_no_number() -> None:
    x, g, y, _ = data(ALL, 20, 4)
    g[:, 3], g[:, 4] = 0.0, np.nan
    g[:, 5] = (x[:, 0] > 0) * 1.0
    x[:, 1] = g[:, 5] * 2 - 1  # a covariate that is the variant
    study = study_of(20)
    result = scan(study, x, g, y)
    t = result["table"]
    assert [t["error"][j] for j in (3, 4, 5)] == ["CONST_ALLELE", "NO_CALLS", "RANK_DEFICIENT"]
    printed = [line.split("\t") for line in list(glm_lines(study, result))[2:]]
    assert [row[-2] for row in printed if row[2] in ("v3", "v4", "v5")] == ["NA"] * 3
    assert scan(study, x, g, np.zeros(ALL))["not_fitted"] == "one outcome only"


def test_a_separated_variant_is_fitted_by_firth() -> None:
    x, g, y, _ = data(ALL, 20, 5, prevalence=0.3)
    rng = np.random.default_rng(5)
    g[:, 2] = rng.random(ALL) < 0.02
    y[g[:, 2] == 1] = 0.0  # all carriers are well
    t = scan(study_of(20, follow_rounds=120, follow_below="0.01"), x, g, y)["table"]
    assert t["test"][2] == "firth" and t["error"][2] == "" and 0 < t["p"][2] < 0.01
    beta = penalised_maximum(np.column_stack([x, g[:, 2]]), y)[-1]
    table.record("association, hits refitted", "scipy.optimize", "effect by Firth", t["effect"][2], beta, atol=1e-5)


def pooled_saddlepoint(g: np.ndarray, mu: np.ndarray, s: float) -> float:
    """Two-sided p by a scalar root finder on the pooled data."""

    def k(t: float) -> float:
        return float(np.logaddexp(np.log1p(-mu), np.log(mu) + g * t).sum() - t * (g @ mu))

    def tilted_at(t: float) -> np.ndarray:
        return expit(logit(mu) + g * t)

    def first(t: float) -> float:
        return float(g @ (tilted_at(t) - mu))

    total = 0.0
    for aim in (abs(s), -abs(s)):
        if aim < np.minimum(g, 0).sum() - g @ mu:
            continue  # no outcome is as low
        t = brentq(lambda at, aim=aim: first(at) - aim, -3000, 30, xtol=1e-14)
        tilted = tilted_at(t)
        w = np.sign(t) * np.sqrt(2 * (t * aim - k(t)))
        v = t * np.sqrt((g * g * tilted * (1 - tilted)).sum())
        total += norm.sf(abs(w + np.log(v / w) / w))
    return total


def test_the_saddlepoint_equals_a_pooled_root_finder_and_stays_near_the_exact_tail() -> None:
    n, carriers, cases = 3000, 40, 60
    g = np.zeros(n)
    g[:carriers] = 1.0
    for hit in (5, 8, 12):
        # no covariates: given the margins the number of carriers among cases is hypergeometric
        mu = np.full(n, cases / n)
        adjusted = g - g.mean()
        s = hit - carriers * cases / n
        variance = float((adjusted**2 * mu * (1 - mu)).sum())
        state = saddlepoint.start(np.array([s]), np.array([variance]))
        for _ in range(40):
            t = saddlepoint.points(state)
            parts = np.split(np.arange(n), [20, 900, 2000])
            sums = sum(saddlepoint.contribution(adjusted[rows, None], mu[rows], t) for rows in parts)
            state = saddlepoint.advanced(state, sums)
        assert saddlepoint.is_done(state)
        p = float(saddlepoint.p_values(state)[0])
        table.record(
            "saddle-point p", "scipy.optimize", "p, relative", p, pooled_saddlepoint(adjusted, mu, s), rtol=1e-6
        )
        exact = float(hypergeom.sf(hit - 1, n, carriers, cases))
        mid = exact - 0.5 * float(hypergeom.pmf(hit, n, carriers, cases))
        normal = float(2 * norm.sf(abs(s) / variance**0.5))
        assert abs(np.log(p / mid)) < np.log(2)  # within a factor of 2 of the exact mid-p; the normal is off by far
        assert abs(np.log(normal / mid)) > 2 * abs(np.log(p / mid))


@pytest.mark.slow
def test_rare_variants_of_a_null_trait_are_not_inflated_with_the_saddlepoint() -> None:
    rng = np.random.default_rng(6)
    n, v = 4000, 400
    g = rng.binomial(2, 0.004, (n, v)).astype(float)
    y = (rng.random(n) < 0.03).astype(float)
    study = study_of(v, columns=1, follow=200, follow_rounds=60)
    result = scan(study, rng.standard_normal((n, 1)), g, y, [2000, 1500, 500])
    p = np.array(result["table"]["p"])
    assert (p < 1e-3).sum() <= 3  # 0.4 expected; the plain score test finds a dozen
    z = plain_loop.run(
        study_of(v, columns=1, follow=0),
        plain_loop.split(plain_loop.patients(study, y, table=rng.standard_normal((n, 1)), dosage=g), [2000, 1500, 500]),
    )["scan"].state["z"]
    assert (2 * norm.sf(np.abs(z)) < 1e-3).sum() > (p < 1e-3).sum()


@pytest.mark.slow
def test_components_of_an_earlier_analysis_take_structure_out_of_a_null_trait() -> None:
    rng = np.random.default_rng(7)
    n, v = 1500, 12_000  # the median of 12,000 tests has a standard error of 2 %
    g = populations(n, v, 7)
    prevalence = np.repeat([0.25, 0.10, 0.04], n // 3)
    y = (rng.random(n) < prevalence).astype(float)
    x = rng.standard_normal((n, 1))
    sizes = [600, 450, 250, 150, 50]
    without = scan(study_of(v, columns=1, follow=0), x, g, y, sizes)["lambda"]
    first = [{"kind": "structure", "name": "ancestry", "mode": "exact", "components": 4, "iterations": 8}]
    study = study_of(v, columns=1, follow=0, components="ancestry", first=first, n0=n, n_max=2000)
    with_components = scan(study, x, g, y, sizes)["lambda"]
    assert without > 5
    table.within("association scan", "the null", "lambda with 4 components minus 1", abs(with_components - 1), 0.05)


@pytest.mark.parametrize(
    ("plan", "said"),
    [({"mode": "private"}, "kind prs"), ({"components": "ancestry"}, "no structure analysis before it")],
)
def test_a_scan_that_cannot_be_run_is_refused(plan: dict[str, Any], said: str) -> None:
    with pytest.raises(StudyError, match=said):
        study_of(3, **plan)


MICE = Path(os.environ.get("SEQUESTER_DATA", str(Path(__file__).resolve().parents[3] / "shared/data"))) / "mouse_hs1940"


@pytest.mark.slow
@pytest.mark.skipif(not MICE.exists(), reason="SEQUESTER_DATA has no mouse_hs1940")
def test_the_chromosome_17_signal_of_cd8_is_found_in_five_groups_of_families() -> None:
    files = PlinkFiles(str(MICE / "mouse_hs1940"))
    chromosome = np.array([line.split()[0] for line in (MICE / "mouse_hs1940.bim").read_text().splitlines()])
    cd8 = np.array([line.split()[0] for line in (MICE / "mouse_hs1940.pheno.txt").read_text().splitlines()])
    family = np.array([line.split()[0] for line in (MICE / "mouse_hs1940.fam").read_text().splitlines()])
    use = np.flatnonzero(np.isin(chromosome, [str(c) for c in range(1, 20)]))
    counts = files.counts(use).astype(float)[cd8 != "NA"]
    g, y = np.where(counts < 0, np.nan, counts), cd8[cd8 != "NA"].astype(float)
    names, sizes = np.unique(family[cd8 != "NA"], return_counts=True)
    group = {name: k % 5 for k, name in enumerate(names[np.argsort(-sizes)])}
    site = np.array([group[name] for name in family[cd8 != "NA"]])
    listed = [{**v, "chromosome": chromosome[j]} for v, j in zip(variants(len(use)), use, strict=True)]
    study = contracts.study(
        phenotype=HEIGHT, variants=listed, covariates=[], cohort={}, aggregation=EXACT,
        analyses=[{"kind": "association", "name": "scan", "mode": "exact"}],
    )  # fmt: skip
    whole = plain_loop.patients(study, y, dosage=g)
    result = plain_loop.run(study, [whole.only(np.flatnonzero(site == s)) for s in range(5)])["scan"].result
    p, error = np.array(result["table"]["p"]), np.array(result["table"]["error"])
    top = int(np.argmin(np.where(error == "", p, 1.0)))
    assert chromosome[use[top]] == "17" and p[top] < 1e-20
    filled = np.where(np.isnan(g[:, top]), np.nanmean(g[:, top]), g[:, top])
    ols = sm.OLS(y, sm.add_constant(filled)).fit()
    table.record("association, quantitative", "statsmodels", "t of the top variant of real mice, relative",
                 result["table"]["statistic"][top], ols.tvalues[-1], rtol=1e-8)  # fmt: skip
