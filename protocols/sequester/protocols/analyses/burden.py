"""Rare variants of a gene together: a burden test, a variance test (SKAT), and both combined.

Summed in one pass after the null model: U = G'r, G'WX, and G'WG within each gene. Variants weigh by their public
frequency, Beta(1, 25) by default, so nothing is chosen from the patients (Wu et al. 2011). Burden: (w'U)^2 / w'Vw is
chi-squared with one degree of freedom; SKAT: the sum of (w U)^2 is a mixture of chi-squared by the eigenvalues of the
weighted V; combined by the Cauchy rule (Liu and Xie 2020). A missing call is the variant's public mean. Exact only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from sequester.protocols.analyses import null_model
from sequester.protocols.analyses.analysis import Broadcast, Finished, Layout, Next, State, Sums
from sequester.protocols.analyses.cohort import Cohort, Result
from sequester.protocols.analyses.newton import inverse, symmetric
from sequester.protocols.analyses.null_model import ScorePlan
from sequester.protocols.analyses.plan import Number

if TYPE_CHECKING:
    from sequester.protocols.study import Study

Vector = NDArray[np.float64]
MAX_IN_A_GENE = 500
NOTHING_LEFT = 1e-9  # of a variance beside the covariates: the gene is not tested


class Gene(BaseModel):
    """A name and the study's variants that count towards it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,39}$")]
    variants: tuple[str, ...] = Field(min_length=1, max_length=MAX_IN_A_GENE)


class BurdenPlan(ScorePlan):
    """`beta` are the two parameters of the weight's Beta density at the public minor allele frequency."""

    kind: Literal["burden"] = "burden"
    genes: tuple[Gene, ...] = Field(min_length=1)
    beta: tuple[Number, Number] = (Decimal(1), Decimal(25))


class Burden:
    """See the module."""

    kind = "burden"

    def rounds(self, plan: BurdenPlan, study: Study) -> int:
        return null_model.rounds(plan, study) + 1

    def layout(self, plan: BurdenPlan, study: Study, step: int) -> Layout:
        null = null_model.fields(plan, study)
        if step < null_model.rounds(plan, study):
            return Layout(null)
        m, c = _places(plan, study), null_model.columns(plan, study)
        total = sum(map(len, m))
        pairs = sum(len(rows) * (len(rows) + 1) // 2 for rows in m)
        return Layout((*null, ("u", (total,)), ("gx", (total, c)), ("gg", (pairs,)), ("carriers", (len(m),))))

    def sensitivity(self, plan: BurdenPlan, study: Study) -> float:
        return 64.0 * null_model.columns(plan, study)  # head-room only: private mode is refused

    def is_iterative(self, plan: BurdenPlan, study: Study) -> bool:
        return True

    def start(self, plan: BurdenPlan, study: Study, earlier: Mapping[str, Finished]) -> Next:
        state = null_model.start(plan, study, earlier)
        return Next(state, null_model.to_all(state))

    def contribution(self, plan: BurdenPlan, study: Study, cohort: Cohort, broadcast: Broadcast, step: int) -> Sums:
        x, y, z = null_model.design(plan, study, cohort, broadcast)
        sums = null_model.sums(study, x, y, z)
        if step < null_model.rounds(plan, study):
            return sums
        r, w = null_model.residuals(study, y, z)
        u, gx, gg, carriers = [], [], [], []
        for rows in _places(plan, study):
            mean = np.array([2 * float(study.variants[j].frequency) for j in rows])
            g = cohort.some(plan.part, rows) - mean
            rare = np.where(mean > 1, -1.0, 1.0)  # +1 where the effect allele is the rare one
            with np.errstate(invalid="ignore"):
                carriers.append(float((((g + mean) * rare + (1 - rare)) > 0.5).any(axis=1).sum()))
            g[np.isnan(g)] = 0.0
            weighted = g * w[:, None]
            u.append(g.T @ r)
            gx.append(weighted.T @ x)
            gg.append((weighted.T @ g)[np.triu_indices(len(rows))])
        more = {"u": np.concatenate(u), "gx": np.vstack(gx), "gg": np.concatenate(gg), "carriers": np.array(carriers)}
        return sums | more

    def combine(self, plan: BurdenPlan, study: Study, state: State, sums: Sums, step: int) -> Next | Finished:
        if step == 0:
            state = {**state, "people": sums["people"]}
            if null_model.has_one_outcome(study, sums["people"]):
                people = int(round(float(sums["people"][0])))
                return Finished({"people": people, "not_fitted": "one outcome only"}, {})
        if step < null_model.rounds(plan, study):
            new = null_model.advanced(study, state, sums)
            return Next(new, null_model.to_all(new))
        kept = np.asarray(state["kept"], dtype=bool)
        n, total, _ = (float(v) for v in state["people"])
        of = inverse(symmetric(sums["information"], len(kept)), kept)
        scale = 1.0
        if null_model.is_linear(study):
            rss = -2 * float(sums["log_likelihood"][0]) - float(sums["score"] @ of @ sums["score"])
            scale = max(rss, 1e-300) / max(n - float(kept.sum()), 1.0)
        rows, at, pair = [], 0, 0
        for gene, places, carriers in zip(plan.genes, _places(plan, study), sums["carriers"], strict=True):
            m = len(places)
            gx = sums["gx"][at : at + m]
            u = sums["u"][at : at + m] - gx @ of @ sums["score"]
            v = symmetric(sums["gg"][pair : pair + m * (m + 1) // 2], m) - gx @ of @ gx.T
            at, pair = at + m, pair + m * (m + 1) // 2
            weight = _weights(plan, study, places)
            rows.append(
                {"gene": gene.name, "variants": m} | tests(u, v * scale, weight, carriers, study.publication_floor)
            )
        result: Result = {"people": int(round(n)), "null_converged": bool(state["converged"][0]), "genes": rows}
        if not null_model.is_linear(study):
            result["cases"] = int(round(total))
        return Finished(result, {})


def _places(plan: BurdenPlan, study: Study) -> list[list[int]]:
    place = {v.id: j for j, v in enumerate(study.variants)}
    return [[place[name] for name in gene.variants] for gene in plan.genes]


def _weights(plan: BurdenPlan, study: Study, places: list[int]) -> Vector:
    """The Beta density at the public minor allele frequency; negative where the effect allele is the common one."""
    from scipy.special import betaln  # heavy: loaded where it is used

    a, b = (float(p) for p in plan.beta)
    f = np.array([float(study.variants[j].frequency) for j in places])
    minor = np.minimum(f, 1 - f)
    density = np.exp((a - 1) * np.log(minor) + (b - 1) * np.log1p(-minor) - betaln(a, b))
    signed: Vector = np.where(f <= 0.5, density, -density)
    return signed


def tests(u: Vector, v: Vector, weight: Vector, carriers: float, floor: int) -> Result:
    """p of the burden test, of SKAT and of both; a gene that too few people carry is said, not tested."""
    if carriers < floor:
        return {"carriers": f"<{floor}", "not_tested": "too few carriers"}
    found: Result = {"carriers": int(round(carriers))}
    if float(np.diag(v).max()) <= NOTHING_LEFT:
        return found | {"not_tested": "no variance beside the covariates"}
    from scipy.special import ndtr

    score, variance = float(weight @ u), float(weight @ v @ weight)
    burden = (
        2 * float(ndtr(-abs(score) / np.sqrt(variance))) if variance > NOTHING_LEFT * float(weight @ weight) else 1.0
    )
    q = float(((weight * u) ** 2).sum())
    values = np.linalg.eigvalsh(v * np.outer(weight, weight))
    skat = mixture_tail(q, values[values > 1e-10 * values.max()])
    found |= {"burden_z": score / np.sqrt(variance) if variance > 0 else 0.0, "burden_p": burden, "skat_q": q}
    return found | {"skat_p": skat, "p": cauchy([burden, skat])}


def mixture_tail(q: float, values: Vector) -> float:
    """P(sum of values chi-squared_1 > q), with full relative accuracy deep in the tail too.

    The inversion integral of exp(K(s) - s q) / s, taken along a parabola through the saddle-point that opens to the right,
    where the integrand neither oscillates nor cancels.
    """
    from scipy.integrate import quad  # heavy: loaded where it is used

    scale = float(values.max())
    values, q = values / scale, q / scale
    if q <= 0:
        return 1.0
    low, high = -1e6, 0.5
    for _ in range(200):  # root of K'(t) = q, K(t) = -1/2 sum log(1 - 2 t values)
        t = (low + high) / 2
        low, high = (t, high) if float((values / (1 - 2 * t * values)).sum()) < q else (low, t)
    t = max(low, 0.1)  # left of the pole at 0 the integral would be another
    curve = 2 * float(((values / (1 - 2 * t * values)) ** 2).sum())
    width, bend = curve**-0.5, 0.5 / (0.5 - t)
    top = -0.5 * float(np.log1p(-2 * t * values).sum()) - t * q

    def integrand(v: float) -> float:
        y = v * width
        s = complex(t + bend * y * y, y)
        k = -0.5 * complex(np.log(1 - 2 * s * values).sum()) - s * q - top
        value = complex(np.exp(k)) / s * complex(2 * bend * y, 1.0)
        return float(value.imag * width)

    area = float(quad(integrand, 0, np.inf, limit=1000, epsabs=0, epsrel=1e-10)[0])
    return min(max(float(np.exp(top)) * area / float(np.pi), 0.0), 1.0)


def cauchy(p: list[float]) -> float:
    """p values that may depend on each other, combined (Liu and Xie 2020)."""
    clean = np.clip(np.array(p), 1e-300, 1 - 1e-15)
    terms = np.where(clean < 1e-15, 1 / (clean * np.pi), np.tan((0.5 - clean) * np.pi))
    mean = float(terms.mean())
    return 1 / (mean * np.pi) if mean > 1e15 else float(0.5 - np.arctan(mean) / np.pi)


def faults(study: Study, plan: BurdenPlan, earlier: Mapping[str, Any]) -> Iterator[str]:
    """What a plan says against its study."""
    if plan.mode == "private":
        yield f"analysis {plan.name}: gene tests are exact only"
    yield from null_model.faults(study, plan, earlier)
    known = {v.id for v in study.variants}
    if len({gene.name for gene in plan.genes}) < len(plan.genes):
        yield f"analysis {plan.name}: a gene is named twice"
    for gene in plan.genes:
        missing = [name for name in gene.variants if name not in known]
        if missing or len(set(gene.variants)) < len(gene.variants):
            yield f"analysis {plan.name}: gene {gene.name} names {missing[0] if missing else 'a variant twice'}" + (
                ", which the study does not list" if missing else ""
            )
    if min(plan.beta) <= 0:
        yield f"analysis {plan.name}: beta parameters are above 0"


BURDEN = Burden()
