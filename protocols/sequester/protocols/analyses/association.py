"""Association of every variant with the outcome: a score test in one pass, then exact fits of what stands out.

Rounds: Newton for the null model of covariates (and federated components), with allele counts in the first; one pass
over the variants (U, sum w g^2, sum w g x); then Newton or Firth and the saddle-point p value of up to `follow` variants,
all in step. A linear model needs one round and one pass: the pass is its exact t test. A missing call is the pooled mean
of the variant, at a hospital that does not carry it for everybody (spec/genomics.md, section 7). Exact only; the private
form of this question is kind `prs`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from sequester.protocols.analyses import exact_glm, null_model, saddlepoint
from sequester.protocols.analyses.analysis import Broadcast, Finished, Layout, Next, State, Sums
from sequester.protocols.analyses.cohort import Cohort, Result
from sequester.protocols.analyses.newton import inverse, symmetric
from sequester.protocols.analyses.null_model import ScorePlan
from sequester.protocols.analyses.plan import Number
from sequester.protocols.analyses.structure import allele_counts
from sequester.protocols.analyses.weights import mean_of

if TYPE_CHECKING:
    from sequester.protocols.study import Study

Vector = NDArray[np.float64]
MEDIAN_CHI2 = 0.45493642311957283  # of one degree of freedom
RARE_CASES = 20.0  # expected minor alleles among cases below which the normal approximation is not trusted
RARE_P = 0.01
VARIANCE_LEFT = 1e-6  # of a variant's variance must remain beside the covariates


class AssociationPlan(ScorePlan):
    """Variants with p below `follow_below`, and rare ones with p < 0.01, are followed, at most `follow`, smallest first."""

    kind: Literal["association"] = "association"
    follow: int = Field(default=50, ge=0, le=1000)
    follow_below: Number = Decimal("0.00001")
    follow_rounds: int = Field(default=24, ge=4, le=200)
    firth: bool = True


class Association:
    """See the module."""

    kind = "association"

    def rounds(self, plan: AssociationPlan, study: Study) -> int:
        if null_model.is_linear(study):
            return 2
        return null_model.rounds(plan, study) + 1 + (plan.follow_rounds if plan.follow else 0)

    def layout(self, plan: AssociationPlan, study: Study, step: int) -> Layout:
        c, v = null_model.columns(plan, study), len(study.variants)
        null, scan = null_model.fields(plan, study), null_model.rounds(plan, study)
        if step == 0:
            return Layout((*null, ("copies", (v,)), ("observed", (v,))))
        if step < scan:
            return Layout(null)
        if step == scan:
            return Layout((*null, ("u", (v,)), ("gg", (v,)), ("gx", (v, c))))
        m, d = min(plan.follow, v), c + 1
        return Layout((
            ("information", (m, d * (d + 1) // 2)), ("score", (m, d)), ("log_likelihood", (m, 1)),
            ("cumulants", (m, 2, 4)),
        ))  # fmt: skip

    def sensitivity(self, plan: AssociationPlan, study: Study) -> float:
        return 64.0 * null_model.columns(plan, study)  # head-room only: private mode is refused

    def is_iterative(self, plan: AssociationPlan, study: Study) -> bool:
        return True

    def start(self, plan: AssociationPlan, study: Study, earlier: Mapping[str, Finished]) -> Next:
        state = null_model.start(plan, study, earlier)
        return Next(state, _to_all(state))

    def later(self, plan: AssociationPlan, study: Study, step: int) -> list[Broadcast]:
        c, v = null_model.columns(plan, study), len(study.variants)
        null: Broadcast = null_model.stand_in(plan, study) | {"mean": np.zeros(v)}
        if step <= null_model.rounds(plan, study):
            return [null]
        m, d = min(plan.follow, v), c + 1
        flags = np.zeros(m, dtype=np.uint8)
        return [
            null
            | {
                "active": flags, "second": flags, "places": np.zeros(m, dtype=np.int64), "betas": np.zeros((m, d)),
                "slopes": np.zeros((m, c)), "inverses": np.zeros((m, d, d)), "t": np.zeros((m, 2)),
            }
        ]  # fmt: skip

    # ---- at the site ----------------------------------------------------------------------------------------------

    def contribution(
        self, plan: AssociationPlan, study: Study, cohort: Cohort, broadcast: Broadcast, step: int
    ) -> Sums:
        x, y, z = null_model.design(plan, study, cohort, broadcast)
        scan = null_model.rounds(plan, study)
        if step > scan:
            return self._followed(plan, study, cohort, broadcast, x, y, z)
        sums = null_model.sums(study, x, y, z)
        if step == 0:
            counted = allele_counts(study, cohort, plan.part)
            sums |= {"copies": counted["copies"], "observed": counted["observed"]}
        if step == scan:
            sums |= self._pass(plan, study, cohort, broadcast, x, *null_model.residuals(study, y, z))
        return sums

    def _pass(
        self, plan: AssociationPlan, study: Study, cohort: Cohort, broadcast: Broadcast, x: Vector, r: Vector, w: Vector
    ) -> Sums:
        v = len(study.variants)
        mean = np.asarray(broadcast["mean"], dtype=np.float64)
        u, gg, gx = np.zeros(v), np.zeros(v), np.zeros((v, x.shape[1]))
        sides = np.column_stack([r, x * w[:, None]])  # (patients, 1 + columns)
        for block in cohort.dosages(plan.part):
            at = slice(block.first, block.first + block.copies.shape[1])
            g = block.copies
            np.subtract(g, mean[at], out=g)
            both = g.T @ sides
            holes = np.flatnonzero(np.isnan(both[:, 0]))  # NaN spreads: only these variants have missing calls
            if len(holes):
                g[:, holes] = np.nan_to_num(g[:, holes])
                both[holes] = g[:, holes].T @ sides
            u[at], gx[at] = both[:, 0], both[:, 1:]
            np.multiply(g, g, out=g)
            gg[at] = w @ g
        return {"u": u, "gg": gg, "gx": gx}

    def _followed(
        self, plan: AssociationPlan, study: Study, cohort: Cohort, broadcast: Broadcast, x: Vector, y: Vector, z: Vector
    ) -> Sums:
        places = np.clip(np.asarray(broadcast["places"], dtype=np.int64), 0, len(study.variants) - 1)
        g = cohort.some(plan.part, [int(j) for j in places]) - np.asarray(broadcast["mean"])[places]
        g[np.isnan(g)] = 0.0
        m, d = len(places), x.shape[1] + 1
        information, score, value = np.zeros((m, d * (d + 1) // 2)), np.zeros((m, d)), np.zeros((m, 1))
        upper = np.triu_indices(d)
        beta, second = np.asarray(broadcast["betas"], dtype=np.float64), np.asarray(broadcast["second"])
        inverses = np.asarray(broadcast["inverses"], dtype=np.float64)
        for k in np.flatnonzero(np.asarray(broadcast["active"])):
            wide = np.column_stack([x, g[:, k]])
            at = np.clip(np.nan_to_num(wide @ beta[k]), -1e6, 1e6)
            if second[k]:
                score[k] = exact_glm.adjustment(wide, mean_of("logistic", at), inverses[k])
                continue
            matrix, score[k], value[k] = exact_glm.moments("logistic", wide, y, at)
            information[k] = matrix[upper]
        adjusted = g - x @ np.asarray(broadcast["slopes"], dtype=np.float64).T  # (patients, m)
        sums = saddlepoint.contribution(adjusted, mean_of("logistic", z), np.asarray(broadcast["t"], dtype=np.float64))
        return {"information": information, "score": score, "log_likelihood": value, "cumulants": sums}

    # ---- at the exchange ------------------------------------------------------------------------------------------

    def combine(self, plan: AssociationPlan, study: Study, state: State, sums: Sums, step: int) -> Next | Finished:
        scan = null_model.rounds(plan, study)
        if step == 0:
            mean = sums["copies"] / np.maximum(sums["observed"], 1.0)
            state = {**state, "people": sums["people"], "mean": mean, "observed": sums["observed"]}
            if null_model.has_one_outcome(study, sums["people"]):
                people = int(round(float(sums["people"][0])))
                return Finished({"people": people, "not_fitted": "one outcome only"}, {})
        if step < scan:
            new = null_model.advanced(study, state, sums)
            return Next(new, _to_all(new))
        if step == scan:
            state = self._tested(plan, study, state, sums)
            if null_model.is_linear(study) or not plan.follow:
                return Finished(_result(plan, study, state), {"z": state["z"], "effect": state["effect"]})
            state = _follow(plan, study, state)
            return Next(state, _to_all(state))
        state = _advanced(plan, study, state, sums, last=step + 1 >= self.rounds(plan, study))
        over = step + 1 >= self.rounds(plan, study)
        if over or (state["f.done"].all() and saddlepoint.is_done(state["spa"])):
            return Finished(_result(plan, study, state), {"z": state["z"], "effect": state["effect"]})
        return Next(state, _to_all(state))

    def _tested(self, plan: AssociationPlan, study: Study, state: State, sums: Sums) -> State:
        """z, effect, standard error and p of every variant; 0 and p 1 where there is nothing to test, with a code."""
        from scipy.special import ndtr, stdtr  # heavy: loaded where it is used

        kept = np.asarray(state["kept"], dtype=bool)
        matrix = symmetric(sums["information"], len(kept))
        of = inverse(matrix, kept)
        slopes = sums["gx"] @ of  # (variants, columns)
        u = sums["u"] - slopes @ sums["score"]  # the null's own score is 0 but for rounding and a last step
        left = sums["gg"] - np.einsum("ij,ij->i", slopes, sums["gx"])
        centred = sums["gg"] - sums["gx"][:, 0] ** 2 / max(float(matrix[0, 0]), 1e-300)
        called = state["observed"] > 0.5
        varies = called & (sums["gg"] > 1e-9) & (centred > 1e-9 * np.maximum(sums["gg"], 1e-300))
        ok = varies & (left > VARIANCE_LEFT * centred)
        code = np.where(~called, 3, np.where(~varies, 1, np.where(~ok, 2, 0)))
        left = np.where(ok, left, 1.0)
        effect, z = np.where(ok, u / left, 0.0), np.where(ok, u / np.sqrt(left), 0.0)
        se, p = np.where(ok, 1 / np.sqrt(left), 0.0), np.ones(len(u))
        if null_model.is_linear(study):
            n = float(state["people"][0])
            df = n - float(kept.sum()) - 1
            rss = -2 * float(sums["log_likelihood"][0]) - float(sums["score"] @ of @ sums["score"])
            variance = np.maximum(rss - u * u / left, 1e-300) / max(df, 1.0)
            se = np.where(ok, np.sqrt(variance / left), 0.0)
            z = np.where(ok, effect / np.where(ok, se, 1.0), 0.0)
            p[ok] = 2 * stdtr(df, -np.abs(z[ok]))
        else:
            p[ok] = 2 * ndtr(-np.abs(z[ok]))
        return {
            **state, "z": z, "effect": effect, "se": se, "p": p, "code": code, "u": u, "left": left, "slopes": slopes,
            "test": np.zeros(len(u), dtype=np.int64),
        }  # fmt: skip


CODES = ["", "CONST_ALLELE", "RANK_DEFICIENT", "NO_CALLS", "UNFINISHED"]
TESTS = ["score", "newton", "firth"]


def _to_all(state: State) -> Broadcast:
    sent = null_model.to_all(state)
    if "mean" in state:
        sent["mean"] = state["mean"]
    if "places" in state:
        second = np.array([len(fit["score"]) > 0 for fit in _fits(state)])
        inverses = [inverse(fit["information"], np.asarray(fit["kept"], dtype=bool)) for fit in _fits(state)]
        sent |= {
            "active": 1 - state["f.done"][:, 0].astype(np.uint8), "second": second.astype(np.uint8),
            "places": state["places"], "betas": state["f.beta"], "slopes": state["slopes"][state["places"]],
            "inverses": np.array(inverses) * second[:, None, None], "t": saddlepoint.points(state["spa"]),
        }  # fmt: skip
    return sent


def _follow(plan: AssociationPlan, study: Study, state: State) -> State:
    """Choose who is followed and start their fits."""
    n, cases, _ = (float(v) for v in state["people"])
    minor = np.minimum(state["mean"], 2 - state["mean"]) * state["observed"]
    rare = (minor * cases / n < RARE_CASES) | (minor * (n - cases) / n < RARE_CASES)
    wanted = (state["code"] == 0) & ((state["p"] < float(plan.follow_below)) | (rare & (state["p"] < RARE_P)))
    order = np.lexsort((np.arange(len(wanted)), -np.abs(state["z"]), ~wanted))
    m = min(plan.follow, len(wanted))
    places = order[:m].astype(np.int64)
    d = len(state["beta"]) + 1
    fits = []
    for j in places:
        fit = exact_glm.fresh(np.zeros(d), bool(plan.firth and rare[j]))
        fit |= {"people": state["people"], "done": np.array([float(not wanted[j])])}
        fits.append(fit)
    state = {**state, "places": places, "rare": rare[places].astype(np.uint8), "wanted": wanted.astype(np.uint8)}
    # who is not followed asks for the tail at 0, which is found at once
    state["spa"] = saddlepoint.start(state["u"][places] * wanted[places], state["left"][places])
    return state | _packed(fits)


def _packed(fits: list[State]) -> State:
    """Many fits as one state; a score that is not there yet is all NaN."""
    d = len(fits[0]["beta"])
    packed: State = {}
    for name in fits[0]:
        rows = [fit[name] if name != "score" or len(fit[name]) else np.full(d, np.nan) for fit in fits]
        packed[f"f.{name}"] = np.array(rows)
    return packed


def _fits(state: State) -> list[State]:
    names = [name for name in state if name.startswith("f.")]
    fits = [{name[2:]: state[name][k] for name in names} for k in range(len(state["places"]))]
    return [{**fit, "score": np.zeros(0) if np.isnan(fit["score"]).any() else fit["score"]} for fit in fits]


def _advanced(plan: AssociationPlan, study: Study, state: State, sums: Sums, last: bool) -> State:
    fits = []
    firth = "if_separated" if plan.firth else "never"
    for k, fit in enumerate(_fits(state)):
        if not fit["done"][0]:
            mine = {name: sums[name][k] for name in ("information", "score", "log_likelihood")}
            fit = exact_glm.progressed(fit, mine, "logistic", firth, study, last)
        fits.append(fit)
    return {**state, **_packed(fits), "spa": saddlepoint.advanced(state["spa"], sums["cumulants"])}


def _result(plan: AssociationPlan, study: Study, state: State) -> Result:
    """The table in columns, lambda, and what was followed and how."""
    from scipy.special import ndtr  # heavy: loaded where it is used

    n, total, _ = (float(v) for v in state["people"])
    z, effect, se, p = (np.array(state[name]) for name in ("z", "effect", "se", "p"))
    code, test = np.array(state["code"]), np.array(state["test"])
    tested = code == 0
    chi2 = z[tested] ** 2
    result: Result = {
        "people": int(round(n)),
        "null_converged": null_model.is_linear(study) or bool(state["converged"][0]),
        "lambda": float(np.median(chi2)) / MEDIAN_CHI2 if len(chi2) else None,
        "tested": int(tested.sum()),
    }
    if not null_model.is_linear(study):
        result["cases"] = int(round(total))
    if "places" in state:
        saddle = saddlepoint.p_values(state["spa"])
        for k, (j, fit) in enumerate(zip(state["places"], _fits(state), strict=True)):
            if not state["wanted"][j]:
                continue
            kept = np.asarray(fit["kept"], dtype=bool)
            variance = float(np.diag(inverse(fit["information"], kept))[-1])
            if fit["done"][0] and not fit["gone"].any() and kept[-1] and variance > 0:
                effect[j], se[j] = float(fit["beta"][-1]), variance**0.5
                z[j] = effect[j] / se[j]
                test[j] = 2 if fit["firth"][0] else 1
                p[j] = 2 * float(ndtr(-abs(z[j])))
            else:
                code[j] = 4
            if state["rare"][k] and np.isfinite(saddle[k]):
                p[j] = saddle[k]
        result["followed"] = int(np.asarray(state["wanted"])[state["places"]].sum())
        result["not_followed"] = int(np.asarray(state["wanted"]).sum()) - result["followed"]
        result["saddlepoint"] = {
            study.variants[int(j)].id: float(saddle[k])
            for k, j in enumerate(state["places"])
            if state["wanted"][j] and np.isfinite(saddle[k])
        }
    result["table"] = {
        "id": [v.id for v in study.variants],
        "frequency": [float(m) / 2 for m in state["mean"]],
        "called": [int(round(float(o))) for o in state["observed"]],
        "effect": [float(v) for v in effect], "se": [float(v) for v in se], "statistic": [float(v) for v in z],
        "p": [float(v) for v in p], "test": [TESTS[int(t)] for t in test], "error": [CODES[int(c)] for c in code],
    }  # fmt: skip
    return result


def glm_lines(study: Study, result: Result) -> Iterator[str]:
    """The table as PLINK 2 prints `--glm`: a `#` line on the mode, the header, one line a variant; A1 is the effect allele."""
    linear = null_model.is_linear(study)
    t, rows = result["table"], {v.id: v for v in study.variants}
    yield f"##mode=exact, people={result['people']}, study={study.lineage}"
    names = ["BETA", "SE", "T_STAT"] if linear else ["OR", "LOG(OR)_SE", "Z_STAT"]
    firth = [] if linear else ["FIRTH?"]
    yield "\t".join(
        ["#CHROM", "POS", "ID", "REF", "ALT", "A1", "A1_FREQ", *firth, "TEST", "OBS_CT", *names, "P", "ERRCODE"]
    )
    for j, name in enumerate(t["id"]):
        v = rows[name]
        numbers = ["NA"] * 4
        if t["error"][j] in ("", "UNFINISHED"):
            effect = t["effect"][j] if linear else float(np.exp(t["effect"][j]))
            numbers = [f"{value:.6g}" for value in (effect, t["se"][j], t["statistic"][j], t["p"][j])]
        was = [] if linear else ["Y" if t["test"][j] == "firth" else "N"]
        head = [v.chromosome, str(v.position), name, v.other, v.effect, v.effect, f"{t['frequency'][j]:.6g}"]
        yield "\t".join([*head, *was, "ADD", str(t["called"][j]), *numbers, t["error"][j] or "."])


def faults(study: Study, plan: AssociationPlan, earlier: Mapping[str, Any]) -> Iterator[str]:
    """What a plan says against its study."""
    if plan.mode == "private":
        yield f"analysis {plan.name}: an association scan is exact only; private effects of declared variants are kind prs"
    yield from null_model.faults(study, plan, earlier)


ASSOCIATION = Association()
