"""Counts, variants and genes by pandas, PLINK 2 and statsmodels: one function a kind of analysis, named as the kind is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from scipy.linalg import subspace_angles

from examples import plink2
from examples.compared import Compared, absolute, relative
from examples.ran import SAME, TIGHT, Matrix, Ran, Result
from sequester.protocols.analyses.heterogeneity import LEAST_CARRIERS, LEAST_PEOPLE


def counts(ran: Ran, plan: Any, result: Result) -> Iterator[Compared]:
    """Every printed cell, by pandas."""
    columns = {c.name: c for c in (ran.study.phenotype, *ran.study.covariates)}
    levels = []
    for axis, printed in zip(plan.axes, result["axes"], strict=True):
        cells = ran.table[axis.column].str.strip()
        column = columns.get(axis.column)
        if axis.column == ran.study.cohort.subgroup:
            levels.append(cells.where(cells.isin(ran.study.cohort.subgroup_values), "other"))
        elif axis.edges:
            edges = [-np.inf, *(float(edge) for edge in axis.edges), np.inf]
            levels.append(pd.cut(cells.astype(float), edges, right=False, labels=printed["levels"][: len(edges) - 1]))
        else:
            assert column is not None
            levels.append(cells.where(cells.isin(list(column.values)), "missing"))
    expected = pd.concat(levels, axis=1).value_counts(sort=False)
    shown = [cell for cell in result["cells"] if isinstance(cell["people"], int)]
    theirs = [int(expected.get(tuple(cell["levels"]), 0)) for cell in shown]
    yield absolute(plan.name, "pandas", f"{len(shown)} printed cells", [c["people"] for c in shown], theirs, 0)
    small = sum(people < ran.study.publication_floor for people in theirs)
    yield absolute(plan.name, "pandas", "cells below the floor that are printed", [small], [0], 0)


def quality(ran: Ran, plan: Any, result: Result) -> Iterator[Compared]:
    """Allele counts, missing calls and Hardy-Weinberg, by PLINK 2."""
    if ran.plink is None or not plan.frequencies:
        return
    rows = {row["id"]: row for row in result["frequencies"]}
    out = ran.plink.run(plan.name, "--freq", "counts", "--missing", "variant-only")
    ours, theirs, missing = [], [], []
    for row in plink2.read(out.with_name(f"{plan.name}.acount")):
        mine = rows[row["ID"]]
        ours.append(mine["effect_frequency"] * 2 * mine["called"])
        alt = float(row["ALT_CTS"])
        theirs.append(alt if ran.sign(row["ID"], row["ALT"]) > 0 else float(row["OBS_CT"]) - alt)
    yield absolute(plan.name, "PLINK 2", "allele counts", ours, theirs, 1e-6)
    for row in plink2.read(out.with_name(f"{plan.name}.vmiss")):
        missing.append(rows[row["ID"]]["missing"] - float(row["MISSING_CT"]))
    yield absolute(plan.name, "PLINK 2", "missing calls", missing, np.zeros(len(missing)), 0)
    tested = ran.plink.people
    if plan.split == "outcome":  # in controls only
        tested = [person for person, y in zip(tested, ran.people("all").y, strict=True) if y < 0.5]
    if plan.split != "subgroup":
        ran.plink.run(f"{plan.name}-hardy", "--hardy", people=tested)
        found = plink2.read(out.with_name(f"{plan.name}-hardy.hardy"))
        ours = [rows[row["ID"]]["hardy_weinberg_p"] for row in found]
        yield relative(plan.name, "PLINK 2", "Hardy-Weinberg p", ours, [float(row["P"]) for row in found], 1e-5)


def components_of(ran: Ran, name: str) -> Matrix:
    """Federated components of everybody (people, components), from the loadings that the study printed."""
    people = ran.people("all")
    mean = np.nanmean(people.copies, axis=0)
    scale = np.sqrt(mean * (1 - mean / 2))
    z = np.nan_to_num((people.copies - mean) / np.where(scale > 1e-6, scale, np.inf))
    loadings = np.array(list(ran.result(name)["loadings"].values())).T
    projected: Matrix = z @ loadings
    return projected


def structure(ran: Ran, plan: Any, result: Result) -> Iterator[Compared]:
    """The space of the components and their eigenvalues, by PLINK 2."""
    if ran.plink is None:
        return
    count = len(result["eigenvalues"])
    out = ran.plink.run(plan.name, "--pca", str(count))
    theirs = plink2.components(out, ran.plink.people, count)
    angle = float(subspace_angles(components_of(ran, plan.name), theirs).max())
    yield Compared(plan.name, "PLINK 2", f"angle of the space of 1-{count}, radians", angle, 0.03)
    values = [float(line) for line in out.with_name(f"{plan.name}.eigenval").read_text("utf-8").split()]
    yield relative(plan.name, "PLINK 2", f"eigenvalues 1-{count}", result["eigenvalues"], values, 1e-3)


def association(ran: Ran, plan: Any, result: Result) -> Iterator[Compared]:
    """z or t of every variant by PLINK 2 with its own components; the smallest p values by statsmodels."""
    t = result["table"]
    is_linear = ran.study.phenotype.kind == "quantitative"
    if ran.plink is not None:
        theirs = _plink_scan(ran, plan, is_linear)
        alleles = np.array([2 * f * n for f, n in zip(t["frequency"], t["called"], strict=True)])
        minor = np.minimum(alleles, 2 * np.array(t["called"]) - alleles)
        common = [j for j, name in enumerate(t["id"]) if minor[j] >= 100 and name in theirs and not t["error"][j]]
        ours, other = np.array(t["statistic"])[common], np.array([theirs[t["id"][j]] for j in common])
        what = "t" if is_linear else "z"
        far = 1 - float(np.corrcoef(ours, other)[0, 1])
        yield Compared(plan.name, "PLINK 2", f"1 - correlation of {what}, {len(common)} variants", far, 1e-4)
        small = np.abs(other) < 3
        yield absolute(plan.name, "PLINK 2", f"{what} below 3", ours[small], other[small], 0.06)
    yield from _hits(ran, plan, result, is_linear)


def _covariates(ran: Ran, plan: Any) -> dict[str, Matrix]:
    table = ran.people("all").table
    return {f"c{j}": table[:, j] for j in range(table.shape[1])}


def _plink_scan(ran: Ran, plan: Any, is_linear: bool) -> dict[str, float]:
    """Statistic of each variant, by the study's effect allele; components are PLINK's own."""
    assert ran.plink is not None
    covariates = _covariates(ran, plan)
    if plan.components is not None:
        count = len(ran.result(plan.components)["eigenvalues"])
        out = ran.plink.run(f"{plan.name}-pca", "--pca", str(count))
        own = plink2.components(out, ran.plink.people, count)
        covariates |= {f"PC{k + 1}": own[:, k] for k in range(count)}
    y = ran.people("all").y
    words = ["--pheno", str(ran.plink.columns("y", {"y": y if is_linear else y + 1})),
             "--covar", str(ran.plink.columns("x", covariates)), "--covar-variance-standardize",
             "--glm", "hide-covar", *([] if is_linear else ["no-firth"])]  # fmt: skip
    out = ran.plink.run(plan.name, *words)
    kind, column = ("linear", "T_STAT") if is_linear else ("logistic", "Z_STAT")
    rows = plink2.read(out.with_name(f"{plan.name}.y.glm.{kind}"))
    return {row["ID"]: ran.sign(row["ID"], row["A1"]) * float(row[column]) for row in rows if row[column] != "NA"}


def _hits(ran: Ran, plan: Any, result: Result, is_linear: bool) -> Iterator[Compared]:
    """The ten smallest p values that Newton (or one pass of least squares) settled, with the study's own components."""
    import statsmodels.api as sm

    t, people = result["table"], ran.people("all")
    settled = [j for j in range(len(t["id"])) if not t["error"][j] and (is_linear or t["test"][j] == "newton")]
    best = sorted(settled, key=lambda j: t["p"][j])[:10]
    if not best:
        return
    parts = [np.ones((len(people.y), 1)), people.table]
    if plan.components is not None:
        parts.append(components_of(ran, plan.components))
    x = np.hstack(parts)
    x[:, 1:] /= np.maximum(np.abs(x[:, 1:]).max(axis=0), 1e-300)  # the same fit, better conditioned
    found = []
    for j in best:
        model = (sm.OLS if is_linear else sm.Logit)(people.y, np.column_stack([x, people.filled(j)]))
        fit = model.fit() if is_linear else model.fit(**TIGHT)
        found.append([fit.params[-1], fit.bse[-1], fit.tvalues[-1]])
    for k, (key, what) in enumerate((("effect", "effect"), ("se", "standard error"), ("statistic", "statistic"))):
        ours = [t[key][j] for j in best]
        yield relative(plan.name, "statsmodels", f"{what} of {len(best)} hits", ours, np.array(found)[:, k], SAME)


def burden(ran: Ran, plan: Any, result: Result) -> Iterator[Compared]:
    """Burden z and SKAT's Q by the formulas of Wu et al. 2011 on statsmodels' null model."""
    import statsmodels.api as sm
    from scipy.stats import beta

    people = ran.people(plan.part)
    parts = [np.ones((len(people.y), 1)), people.table]
    if plan.components is not None:
        parts.append(components_of(ran, plan.components))
    x = np.hstack(parts)
    if ran.study.phenotype.kind == "quantitative":
        null = sm.OLS(people.y, x).fit()
        r, w, variance = people.y - null.fittedvalues, np.ones(len(x)), null.scale
    else:
        mu = sm.Logit(people.y, x).fit(**TIGHT).predict()
        r, w, variance = people.y - mu, mu * (1 - mu), 1.0
    place = {v.id: j for j, v in enumerate(ran.study.variants)}
    z, q, mean, ours = [], [], [], []
    for gene, row in zip(plan.genes, result["genes"], strict=True):
        if "burden_z" not in row:
            continue
        columns = [place[name] for name in gene.variants]
        f = np.array([float(ran.study.variants[j].frequency) for j in columns])
        copies = people.copies[:, columns]
        weight = beta.pdf(np.minimum(f, 1 - f), *(float(p) for p in plan.beta)) * np.where(f > 0.5, -1, 1)
        g = np.where(np.isnan(copies), 2 * f, copies) * weight
        cross = (g * w[:, None]).T @ x
        v = (g * w[:, None]).T @ g - cross @ np.linalg.solve((x * w[:, None]).T @ x, cross.T)
        u = g.T @ r
        z.append(u.sum() / np.sqrt(v.sum() * variance))
        q.append(u @ u)
        mean.append(np.trace(v) * variance)
        ours.append(row)
    label = f"of {len(ours)} genes"
    yield absolute(plan.name, "statsmodels", f"burden z {label}", [row["burden_z"] for row in ours], z, SAME)
    far = np.abs(np.array([row["skat_q"] for row in ours]) - q) / mean  # under the null its mean is the trace
    yield Compared(plan.name, "statsmodels", f"SKAT's Q {label}, over its mean", float(far.max()), SAME)


def heterogeneity(ran: Ran, plan: Any, result: Result) -> Iterator[Compared]:
    """Cochran's Q and the mean of the hospitals' own fits, by statsmodels' meta-analysis."""
    from statsmodels.stats.meta_analysis import combine_effects

    people = ran.people(plan.part)
    names = [f.name for f in ran.study.table_features()]
    place = {v.id: j for j, v in enumerate(ran.study.variants)}
    ours, theirs, hospitals = [], [], []
    for row in result["terms"]:
        x, at = people.table, names.index(row["term"]) if row["term"] in names else people.table.shape[1]
        if row["term"] in place:
            j = place[row["term"]]
            filled = np.nan_to_num(people.copies[:, j] - 2 * float(ran.study.variants[j].frequency))
            x = np.column_stack([x, filled])
        fits = [_own_fit(ran, x[people.site == s], people.y[people.site == s], at) for s in np.unique(people.site)]
        usable = np.array([fit for fit in fits if fit is not None])
        hospitals.append(row["hospitals"] - len(usable))
        if "q" in row:
            pooled_fit = combine_effects(usable[:, 0], usable[:, 1])
            ours.append([row["q"], row["effect"]])
            theirs.append([pooled_fit.q, pooled_fit.mean_effect_fe])
    yield absolute(plan.name, "statsmodels", "hospitals that can estimate a term", hospitals, [0] * len(hospitals), 0)
    if ours:
        yield absolute(plan.name, "statsmodels", f"Q and mean effect of {len(ours)} terms", ours, theirs, SAME)


def _own_fit(ran: Ran, x: Matrix, y: Matrix, at: int) -> tuple[float, float] | None:
    """Estimate and variance of one column at one hospital; None where people or carriers are too few to say."""
    import statsmodels.api as sm

    d, binary = x.shape[1] + 1, ran.study.phenotype.kind == "binary"
    rarer = min(y.sum(), len(y) - y.sum()) if binary else len(y) - d
    squares = np.square(x[:, at] - x[:, at].mean())
    carriers = squares.sum() ** 2 / np.square(squares).sum()
    if rarer < LEAST_PEOPLE * d or (binary and carriers * rarer / len(y) < LEAST_CARRIERS):
        return None
    design = sm.add_constant(x, has_constant="add")
    fit = sm.Logit(y, design).fit(**TIGHT) if binary else sm.OLS(y, design).fit()
    return float(fit.params[1 + at]), float(fit.bse[1 + at]) ** 2
