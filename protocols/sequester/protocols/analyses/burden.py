"""Rare variants of a gene together: a burden test, a variance test (SKAT), and both combined (SKAT-O).

Summed in one pass after the null model: U = G'r, G'WX, and G'WG within each gene. Variants weigh by their public
frequency, Beta(1, 25) by default, so nothing is chosen from the patients (Wu et al. 2011). Burden: (w'U)^2 / w'Vw is
chi-squared with one degree of freedom; SKAT: the sum of (w U)^2 is a mixture of chi-squared by the eigenvalues of the
weighted V; both combined by the best mixture of them, which follows from the same sums (SKAT-O, Lee et al. 2012). A
missing call is the variant's public mean. Exact only.

Of a binary outcome, burdens and single variants beyond two standard deviations get their tails by the saddle-point, in
further rounds; V is scaled to the variances those imply before SKAT and SKAT-O (Zhao et al. 2020). Where the carriers
of a gene would be expected to number fewer than `LEAST_EXPECTED` in the rarer outcome no p is printed: by simulation, its
level is not 5 %.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from sequester.protocols.analyses import null_model, saddlepoint
from sequester.protocols.analyses.analysis import Broadcast, Finished, Layout, Next, State, Sums
from sequester.protocols.analyses.cohort import Cohort, Result
from sequester.protocols.analyses.newton import inverse, symmetric
from sequester.protocols.analyses.null_model import ScorePlan
from sequester.protocols.analyses.plan import Number
from sequester.protocols.analyses.quadratic import mixture_tail, optimal
from sequester.protocols.analyses.weights import mean_of

if TYPE_CHECKING:
    from sequester.protocols.study import Study

Vector = NDArray[np.float64]
MAX_IN_A_GENE = 500
LEAST_EXPECTED = 20.0  # carriers in the rarer outcome: as the scan trusts the normal (spec/genomics.md, section 7)
NOTHING_LEFT = 1e-9  # of a variance beside the covariates: the gene is not tested


class Gene(BaseModel):
    """A name and the study's variants that count towards it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,39}$")]
    variants: tuple[str, ...] = Field(min_length=1, max_length=MAX_IN_A_GENE)


class BurdenPlan(ScorePlan):
    """`beta` are the two parameters of the weight's Beta density at the public minor allele frequency.

    `tail_rounds` is how many rounds the saddle-points of a binary outcome may take.
    """

    kind: Literal["burden"] = "burden"
    genes: tuple[Gene, ...] = Field(min_length=1)
    beta: tuple[Number, Number] = (Decimal(1), Decimal(25))
    tail_rounds: int = Field(default=24, ge=4, le=200)


class Burden:
    """See the module."""

    kind = "burden"

    def rounds(self, plan: BurdenPlan, study: Study) -> int:
        return null_model.rounds(plan, study) + 1 + (0 if null_model.is_linear(study) else plan.tail_rounds)

    def layout(self, plan: BurdenPlan, study: Study, step: int) -> Layout:
        null = null_model.fields(plan, study)
        if step < null_model.rounds(plan, study):
            return Layout(null)
        m, c = _places(plan, study), null_model.columns(plan, study)
        total = sum(map(len, m))
        if step > null_model.rounds(plan, study):
            return Layout((("cumulants", (len(m) + total, 2, 4)),))
        pairs = sum(len(rows) * (len(rows) + 1) // 2 for rows in m)
        return Layout((*null, ("u", (total,)), ("gx", (total, c)), ("gg", (pairs,)), ("carriers", (len(m),))))

    def sensitivity(self, plan: BurdenPlan, study: Study) -> float:
        return 64.0 * null_model.columns(plan, study)  # head-room only: private mode is refused

    def is_iterative(self, plan: BurdenPlan, study: Study) -> bool:
        return True

    def start(self, plan: BurdenPlan, study: Study, earlier: Mapping[str, Finished]) -> Next:
        state = null_model.start(plan, study, earlier)
        return Next(state, null_model.to_all(state))

    def later(self, plan: BurdenPlan, study: Study, step: int) -> list[Broadcast]:
        null, c = null_model.stand_in(plan, study), null_model.columns(plan, study)
        if step <= null_model.rounds(plan, study):
            return [null]
        total = sum(map(len, _places(plan, study)))
        tails = len(plan.genes) + total
        return [null | {"t": np.zeros((tails, 2)), "slopes": np.zeros((total, c)), "size": np.zeros(tails)}]

    def contribution(self, plan: BurdenPlan, study: Study, cohort: Cohort, broadcast: Broadcast, step: int) -> Sums:
        x, y, z = null_model.design(plan, study, cohort, broadcast)
        if step > null_model.rounds(plan, study):
            return self._tails(plan, study, cohort, broadcast, x, mean_of("logistic", z))
        sums = null_model.sums(study, x, y, z)
        if step < null_model.rounds(plan, study):
            return sums
        r, w = null_model.residuals(study, y, z)
        u, gx, gg, carriers = [], [], [], []
        for rows in _places(plan, study):
            mean = _means(study, rows)
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

    def _tails(
        self, plan: BurdenPlan, study: Study, cohort: Cohort, broadcast: Broadcast, x: Vector, mu: Vector
    ) -> Sums:
        """Cumulants of the genes' burdens, then of all their variants; 0 where the exchange does not ask."""
        places = _places(plan, study)
        t, slopes, size = (np.asarray(broadcast[name], dtype=np.float64) for name in ("t", "slopes", "size"))
        out, at = np.zeros((len(t), 2, 4)), 0
        for gene, rows in enumerate(places):
            mine = np.array([gene, *range(len(places) + at, len(places) + at + len(rows))])
            if t[mine].any():
                g = cohort.some(plan.part, rows) - _means(study, rows)
                g[np.isnan(g)] = 0.0
                g -= x @ slopes[at : at + len(rows)].T
                columns = np.column_stack([g @ _weights(plan, study, rows), g]) / size[mine]
                out[mine] = saddlepoint.contribution(np.nan_to_num(columns), mu, t[mine])
            at += len(rows)
        return {"cumulants": out}

    def combine(self, plan: BurdenPlan, study: Study, state: State, sums: Sums, step: int) -> Next | Finished:
        if step == 0:
            state = {**state, "people": sums["people"]}
            if null_model.has_one_outcome(study, sums["people"]):
                people = int(round(float(sums["people"][0])))
                return Finished({"people": people, "not_fitted": "one outcome only"}, {})
        if step < null_model.rounds(plan, study):
            new = null_model.advanced(study, state, sums)
            return Next(new, null_model.to_all(new))
        if step == null_model.rounds(plan, study):
            state = _passed(plan, study, state, sums)
        else:
            state = {**state, "tails": saddlepoint.advanced(state["tails"], sums["cumulants"])}
        if null_model.is_linear(study) or saddlepoint.is_done(state["tails"]) or step + 1 >= self.rounds(plan, study):
            return _finished(plan, study, state)
        sent = {"t": saddlepoint.points(state["tails"]), "slopes": state["slopes"], "size": state["size"]}
        return Next(state, null_model.to_all(state) | sent)


def _passed(plan: BurdenPlan, study: Study, state: State, sums: Sums) -> State:
    """U, V, carriers and the start of the tails after the pass; V is packed, gene by gene."""
    kept = np.asarray(state["kept"], dtype=bool)
    n, cases, _ = (float(v) for v in state["people"])
    of = inverse(symmetric(sums["information"], len(kept)), kept)
    slopes, scale = sums["gx"] @ of, 1.0
    u = sums["u"] - slopes @ sums["score"]
    if null_model.is_linear(study):
        rss = -2 * float(sums["log_likelihood"][0]) - float(sums["score"] @ of @ sums["score"])
        scale = max(rss, 1e-300) / max(n - float(kept.sum()), 1.0)
    packed, scores, at, pair = [], [], 0, 0
    rarer = min(cases, n - cases) / n
    tested = np.zeros(len(plan.genes) + len(u), dtype=bool)
    for gene, places in enumerate(_places(plan, study)):
        m = len(places)
        rows, pairs = slice(at, at + m), slice(pair, pair + m * (m + 1) // 2)
        v = (symmetric(sums["gg"][pairs], m) - slopes[rows] @ sums["gx"][rows].T) * scale
        weight = _weights(plan, study, places)
        packed.append(v[np.triu_indices(m)])
        scores.append((float(weight @ u[rows]), float(weight @ v @ weight), np.diag(v)))
        expected = float(sums["carriers"][gene]) * rarer
        enough = expected >= LEAST_EXPECTED and float(sums["carriers"][gene]) >= study.publication_floor
        tested[[gene, *range(len(plan.genes) + at, len(plan.genes) + at + m)]] = enough
        at, pair = at + m, pairs.stop
    new: State = {**state, "u": u, "v": np.concatenate(packed), "carriers": sums["carriers"]}
    if null_model.is_linear(study):
        return new
    variance = np.concatenate([[b for _, b, _ in scores], *(d for _, _, d in scores)])
    varies = variance > NOTHING_LEFT
    size = np.sqrt(np.where(varies, variance, 1.0))
    z = np.concatenate([[s for s, _, _ in scores], u]) / size
    # what the normal serves for asks for the tail at 0, which is found at once
    z = np.where(tested & varies & (np.abs(z) >= saddlepoint.NORMAL_BELOW), z, 0.0)
    return {**new, "slopes": slopes, "size": size, "tails": saddlepoint.start(z, np.ones(len(z)))}


def _finished(plan: BurdenPlan, study: Study, state: State) -> Finished:
    n, cases, _ = (float(v) for v in state["people"])
    linear, genes = null_model.is_linear(study), len(plan.genes)
    total = len(state["u"])
    tails = np.full(genes + total, np.inf)  # infinite: the normal serves
    if not linear:
        asked = state["tails"][:, 0, saddlepoint.AIM] != 0
        tails[asked] = saddlepoint.p_values(state["tails"])[asked]
    rows, at, pair = [], 0, 0
    for k, (gene, places) in enumerate(zip(plan.genes, _places(plan, study), strict=True)):
        m = len(places)
        mine, pairs = slice(at, at + m), slice(pair, pair + m * (m + 1) // 2)
        v = symmetric(state["v"][pairs], m)
        carriers = float(state["carriers"][k])
        row: Result = {"gene": gene.name, "variants": m}
        if carriers < study.publication_floor:
            row |= {"carriers": f"<{study.publication_floor}", "not_tested": "too few carriers"}
        elif not linear and carriers * min(cases, n - cases) / n < LEAST_EXPECTED:
            row |= {"carriers": int(round(carriers)), "not_tested": "too few carriers expected in the rarer outcome"}
        else:
            own = tails[genes + at : genes + at + m]
            found = tests(state["u"][mine], v, _weights(plan, study, places), float(tails[k]), own)
            row |= {"carriers": int(round(carriers))} | found
        rows.append(row)
        at, pair = at + m, pairs.stop
    result: Result = {
        "people": int(round(n)),
        "null_converged": null_model.is_linear(study) or bool(state["converged"][0]),
        "genes": rows,
        "combined": "SKAT-O",  # of older results, which do not say it, by the Cauchy rule
    }
    if not linear:
        result["cases"] = int(round(cases))
    return Finished(result, {})


def _places(plan: BurdenPlan, study: Study) -> list[list[int]]:
    place = {v.id: j for j, v in enumerate(study.variants)}
    return [[place[name] for name in gene.variants] for gene in plan.genes]


def _means(study: Study, places: list[int]) -> Vector:
    """Public mean copies."""
    return np.array([2 * float(study.variants[j].frequency) for j in places])


def _weights(plan: BurdenPlan, study: Study, places: list[int]) -> Vector:
    """The Beta density at the public minor allele frequency; negative where the effect allele is the common one."""
    from scipy.special import betaln  # heavy: loaded where it is used

    a, b = (float(p) for p in plan.beta)
    f = np.array([float(study.variants[j].frequency) for j in places])
    minor = np.minimum(f, 1 - f)
    density = np.exp((a - 1) * np.log(minor) + (b - 1) * np.log1p(-minor) - betaln(a, b))
    signed: Vector = np.where(f <= 0.5, density, -density)
    return signed


def tests(u: Vector, v: Vector, weight: Vector, burden_tail: float, tails: Vector) -> Result:
    """p of the burden test, of SKAT and of both by SKAT-O, whose `rho` is 0 where SKAT has the smallest p, 1 the burden.

    `burden_tail` and `tails` (variants,) are p by the saddle-point, infinite where the normal serves and NaN where no root
    was found: then the gene is not tested, by name.
    """
    if float(np.diag(v).max()) <= NOTHING_LEFT:
        return {"not_tested": "no variance beside the covariates"}
    if np.isnan([burden_tail, *tails]).any():
        return {"not_tested": "its saddle-point was not found in `tail_rounds` rounds"}
    from scipy.special import ndtr

    score, variance = float(weight @ u), float(weight @ v @ weight)
    varies = variance > NOTHING_LEFT * float(weight @ weight)
    burden = 2 * float(ndtr(-abs(score) / np.sqrt(variance))) if varies else 1.0
    scaled = v * np.outer(stretch := np.sqrt(_implied(u, tails, np.diag(v)) / np.maximum(np.diag(v), 1e-300)), stretch)
    if np.isfinite(burden_tail):
        burden = burden_tail
        wanted = float(_implied(np.array([score]), np.array([burden_tail]), np.array([variance]))[0])
        scaled = scaled * max(1.0, wanted / max(float(weight @ scaled @ weight), 1e-300))
    weighted = scaled * np.outer(weight, weight)
    q = float(((weight * u) ** 2).sum())
    skat = mixture_tail(q, np.linalg.eigvalsh(weighted))
    both, rho = optimal(weight * u, weighted)
    found: Result = {"burden_z": score / float(variance**0.5) if varies else 0.0, "burden_p": burden, "skat_q": q}
    return found | {"skat_p": skat, "p": both, "rho": rho}


def _implied(score: Vector, tails: Vector, variance: Vector) -> Vector:
    """The variance with which a normal would give the score its p; the score's own where the normal serves."""
    from scipy.special import chdtri

    use = np.isfinite(tails)
    chi2 = chdtri(1, np.where(use, np.clip(tails, 1e-300, 1 - 1e-12), 0.5))
    implied: Vector = np.where(use, score**2 / chi2, variance)
    return implied


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
