"""Ridge, lasso and elastic net on many variants: intercept, covariates and scores are not penalised, variants are.

Minimises the mean negative log-likelihood (half the mean squared error) + strength (l1 |b|_1 + (1 - l1)/2 |b|^2) over
standardised variants. Three schemes (spec/genomics.md, section 7): `newton` opens X'WX each round; `gram` opens X'X once
and a gradient a round, the quadratic problem is solved at the exchange; `conjugate_gradient` is for ridge of a
quantitative outcome beyond the Gram limit: X'(Xv) a round. A fourth, `folds`, opens X'X and X'y of each fold of a
quantitative outcome in one round and chooses the strength from a declared `grid` by cross-validation at the exchange. Exact
only; kind `glm` is the private model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from sequester.protocols.analyses import exact_glm
from sequester.protocols.analyses.analysis import Broadcast, Finished, Layout, Next, State, Sums
from sequester.protocols.analyses.cohort import Block, Cohort, Part, chosen, standardised
from sequester.protocols.analyses.newton import symmetric
from sequester.protocols.analyses.plan import AnalysisPlan, Number
from sequester.protocols.analyses.weights import mean_of, model, predictor

if TYPE_CHECKING:
    from sequester.protocols.study import Study

Vector = NDArray[np.float64]
NEWTON_LIMIT, GRAM_LIMIT = 1000, 5000
SETTLED = 1e-11  # of the objective: what a further step could still gain
RESIDUAL = 1e-8
PASSES = 2000


class PenalisedPlan(AnalysisPlan):
    """`strength` is lambda for one patient; or `fraction` of the smallest that leaves no variant (lasso, elastic net).

    Scheme `folds` takes neither: the strength of `grid` with the smallest mean squared error of left-out patients is used.
    `l1` is 0 for ridge, 1 for lasso.
    """

    kind: Literal["penalised"] = "penalised"
    scheme: Literal["newton", "gram", "conjugate_gradient", "folds"] = "gram"
    l1: Number
    strength: Number | None = None
    fraction: Number | None = None
    grid: tuple[Number, ...] = Field(default=(), exclude_if=lambda grid: not grid)
    rounds: int = Field(default=40, ge=2, le=500)
    part: Part = "train"

    @model_validator(mode="after")
    def _has_one_strength(self) -> PenalisedPlan:
        given = (self.strength is not None) + (self.fraction is not None)
        if (self.scheme == "folds") != bool(self.grid) or (self.grid and (given or len(self.grid) < 2)):
            raise ValueError("scheme folds takes a `grid` of at least two strengths, and only it does")
        if not self.grid and given != 1:
            raise ValueError("either `strength` or `fraction` is given")
        if not 0 <= self.l1 <= 1 or (self.l1 == 0 and self.fraction is not None):
            raise ValueError("l1 lies in 0..1; ridge (l1 0) has a strength, no fraction")
        if self.scheme == "conjugate_gradient" and self.l1 != 0:
            raise ValueError("conjugate gradients solve ridge: l1 0")
        return self


def family_of(study: Study) -> str:
    """logistic or linear."""
    return "logistic" if study.phenotype.kind == "binary" else "linear"


class Penalised:
    """See the module."""

    kind = "penalised"

    def rounds(self, plan: PenalisedPlan, study: Study) -> int:
        return 1 if plan.scheme == "folds" else plan.rounds

    def layout(self, plan: PenalisedPlan, study: Study, step: int) -> Layout:
        d = len(study.features()) + 1
        people = ("people", (3,))
        if plan.scheme == "folds":
            k = study.cohort.folds
            return Layout((("information", (k, d * (d + 1) // 2)), ("score", (k, d)), ("people", (k, 3))))
        if plan.scheme == "conjugate_gradient":
            return Layout((("moment", (d,)), ("diagonal", (d,)), people) if step == 0 else (("product", (d,)),))
        fields: tuple[tuple[str, tuple[int, ...]], ...] = (("score", (d,)), ("log_likelihood", (1,)), people)
        if step == 0 or plan.scheme == "newton":
            fields = (("information", (d * (d + 1) // 2,)), *fields)
        return Layout(fields)

    def sensitivity(self, plan: PenalisedPlan, study: Study) -> float:
        return 4096.0  # head-room only, a product of two standardised values; private mode is refused

    def is_iterative(self, plan: PenalisedPlan, study: Study) -> bool:
        return plan.scheme != "folds"

    def start(self, plan: PenalisedPlan, study: Study, earlier: Mapping[str, Finished]) -> Next:
        if plan.scheme == "folds":
            return Next({}, {})
        d = len(study.features()) + 1
        state: State = {"beta": np.zeros(d), "best": np.array([np.inf]), "held": np.zeros(d), "halved": np.zeros(1)}
        return Next(state, {"beta": state["beta"]})

    def contribution(self, plan: PenalisedPlan, study: Study, cohort: Cohort, broadcast: Broadcast, step: int) -> Sums:
        if plan.scheme == "folds":
            return _by_fold(plan, study, cohort)
        beta = np.asarray(broadcast["beta"], dtype=np.float64)
        if plan.scheme == "conjugate_gradient":
            return _wide(plan, study, cohort, beta, step)
        d = len(beta)
        square, score, value, people = np.zeros((d, d)), np.zeros(d), 0.0, np.zeros(3)
        with_square = step == 0 or plan.scheme == "newton"
        family = family_of(study)
        for block in cohort.blocks(plan.part):
            x = np.column_stack([np.ones(len(block.y)), block.x])
            z = predictor(block.x, beta[1:], float(beta[0]))
            if with_square:
                more, gradient, likelihood = exact_glm.moments(family, x, block.y, z)
                square += more
            else:
                gradient, likelihood = x.T @ (block.y - mean_of(family, z)), _log_likelihood(family, block, z)
            score += gradient
            value += likelihood
            people += [len(block.y), block.y.sum(), block.y @ block.y]
        sums: Sums = {"score": score, "log_likelihood": np.array([value]), "people": people}
        if with_square:
            sums["information"] = square[np.triu_indices(d)]
        return sums

    def combine(self, plan: PenalisedPlan, study: Study, state: State, sums: Sums, step: int) -> Next | Finished:
        if plan.scheme == "folds":
            return _cross_validated(plan, study, sums)
        last = step + 1 >= plan.rounds
        if plan.scheme == "conjugate_gradient":
            return _conjugate(plan, study, state, sums, step, last)
        state = {**state, "people": sums["people"]}
        n, total = float(sums["people"][0]), float(sums["people"][1])
        beta = np.asarray(state["beta"], dtype=np.float64)
        logistic = family_of(study) == "logistic"
        if step == 0:
            if logistic and not 0.5 < total < n - 0.5:
                return model(
                    study, np.zeros(len(beta) - 1), np.zeros(1), converged=False, not_fitted="one outcome only"
                )
            square = symmetric(sums["information"], len(beta))
            # at weights 0 every logistic weight is 1/4; prevalence (1 - prevalence) is nearer what they will be
            rate = total / n
            gram = square * (4 * rate * (1 - rate) if logistic else 1.0)
            state = {**state, "hessian": gram, "lambda": np.array([_strength(plan, study, square, sums, logistic)])}
        elif plan.scheme == "newton":
            state = {**state, "hessian": symmetric(sums["information"], len(beta))}
        weight, l1 = n * float(state["lambda"][0]) * _penalised(study), float(plan.l1)
        value = -float(sums["log_likelihood"][0]) + _penalty(beta, weight, l1)
        best = float(state["best"][0])
        if value > best + 1e-12 * abs(best) and float(state["halved"][0]) < 30:
            new = {**state, "beta": (beta + state["held"]) / 2, "halved": state["halved"] + 1}
            return _result(plan, study, new, state["held"], best, False) if last else Next(new, {"beta": new["beta"]})
        target = descend(state["hessian"], sums["score"], beta, weight, l1)
        move = target - beta
        gain = float(sums["score"] @ move - 0.5 * move @ state["hessian"] @ move)
        gain += _penalty(beta, weight, l1) - _penalty(target, weight, l1)
        settled = gain <= SETTLED * max(abs(value), 1.0)
        if settled or last:
            return _result(plan, study, state, beta, value, settled)
        new = {**state, "beta": target, "held": beta, "best": np.array([value]), "halved": np.zeros(1)}
        return Next(new, {"beta": target})


def _log_likelihood(family: str, block: Block, z: Vector) -> float:
    if family == "logistic":
        return float((block.y * z - np.logaddexp(0.0, z)).sum())
    return -0.5 * float(((block.y - z) ** 2).sum())


def _penalised(study: Study) -> Vector:
    """1 for variants, 0 for the intercept, covariates and scores."""
    return np.array([0.0, *(float(f.kind == "variant") for f in study.features())])


def _penalty(beta: Vector, weight: Vector, l1: float) -> float:
    return float(weight @ (l1 * np.abs(beta) + 0.5 * (1 - l1) * beta**2))


def _strength(plan: PenalisedPlan, study: Study, square: Vector, sums: Sums, logistic: bool) -> float:
    """lambda: as given, or a fraction of the largest mean score of a variant at the model of an intercept."""
    if plan.strength is not None:
        return float(plan.strength)
    n, total = float(sums["people"][0]), float(sums["people"][1])
    column = square[0] * (4 if logistic else 1)  # sums of each column
    score = sums["score"] + column * ((0.5 if logistic else 0.0) - total / n)  # sum of x (y - mean of y)
    largest = float(np.abs(score * _penalised(study)).max())
    return float(plan.fraction or 0) * largest / n / float(plan.l1)


def descend(hessian: Vector, score: Vector, beta: Vector, weight: Vector, l1: float) -> Vector:
    """Minimiser of -score (b - beta) + (b - beta)' hessian (b - beta)/2 + penalty, by coordinates.

    Passes run over the columns that are not 0 until they settle, then over all, until nothing moves.
    """
    b = beta.copy()
    slope = -score.copy()  # of the smooth part, at b
    own = np.diag(hessian).copy()
    curve = own + weight * (1 - l1)
    usable = own > 1e-12 * max(float(own.max()), 1e-300)
    rank = np.sqrt(np.maximum(curve, 1e-300))
    everybody = np.flatnonzero(usable)

    def sweep(columns: NDArray[np.int64]) -> float:
        largest = 0.0
        for j in columns:
            pull = own[j] * b[j] - slope[j]
            shrunk = np.sign(pull) * max(abs(pull) - weight[j] * l1, 0.0)
            change = shrunk / curve[j] - b[j]
            if change != 0.0:
                b[j] += change
                slope[:] += hessian[:, j] * change
                largest = max(largest, abs(change) * rank[j])
        return largest

    scale = 1e-13 * max(float(np.abs(beta * rank).max()), float(np.abs(score / rank)[usable].max(initial=0.0)))
    for _ in range(PASSES):
        if sweep(everybody) <= scale:
            break
        active = np.flatnonzero(usable & ((b != 0) | (weight == 0)))
        for _ in range(PASSES):
            if sweep(active) <= scale:
                break
    return b


def _result(plan: PenalisedPlan, study: Study, state: State, beta: Vector, objective: float, settled: bool) -> Finished:
    n = float(state["people"][0])
    variants = _penalised(study)[1:] > 0
    return model(
        study, beta[1:], beta[:1], strength=float(state["lambda"][0]), objective=objective / n, n=int(round(n)),
        variants_used=int((beta[1:][variants] != 0).sum()), converged=settled,
    )  # fmt: skip


# ---- the strength by cross-validation -----------------------------------------------------------------------------


def _by_fold(plan: PenalisedPlan, study: Study, cohort: Cohort) -> Sums:
    """X'X, X'y and people, sum of y, sum of y^2 of each fold; column 0 of X is the intercept's."""
    d, k = len(study.features()) + 1, study.cohort.folds
    square, score, people = np.zeros((k, d, d)), np.zeros((k, d)), np.zeros((k, 3))
    for block in cohort.blocks(plan.part):
        x = np.column_stack([np.ones(len(block.y)), block.x])
        for fold in range(k):
            rows = block.fold == fold
            square[fold] += x[rows].T @ x[rows]
            score[fold] += x[rows].T @ block.y[rows]
            people[fold] += [rows.sum(), block.y[rows].sum(), block.y[rows] @ block.y[rows]]
    upper = np.triu_indices(d)
    return {"information": np.array([m[upper] for m in square]), "score": score, "people": people}


def _cross_validated(plan: PenalisedPlan, study: Study, sums: Sums) -> Finished:
    """Each strength is fitted without each fold and judged on it; the best one, strongest of equals, is fitted to all."""
    d, l1, penalised = len(study.features()) + 1, float(plan.l1), _penalised(study)
    square = np.array([symmetric(row, d) for row in sums["information"]])
    score, people = sums["score"], sums["people"]
    whole, moment, n = square.sum(axis=0), score.sum(axis=0), float(people[:, 0].sum())
    grid = sorted((float(strength) for strength in plan.grid), reverse=True)
    error = np.zeros(len(grid))
    for fold in range(len(square)):
        matrix, vector, rest = whole - square[fold], moment - score[fold], n - float(people[fold, 0])
        b = np.zeros(d)
        for at, strength in enumerate(grid):
            b = descend(matrix, vector - matrix @ b, b, rest * strength * penalised, l1)
            error[at] += float(people[fold, 2]) - 2 * float(b @ score[fold]) + float(b @ square[fold] @ b)
    best = grid[int(error.argmin())]
    b = descend(whole, moment, np.zeros(d), n * best * penalised, l1)
    value = 0.5 * (float(people[:, 2].sum()) - 2 * float(b @ moment) + float(b @ whole @ b))
    state: State = {"people": np.array([n]), "lambda": np.array([best])}
    done = _result(plan, study, state, b, value + _penalty(b, n * best * penalised, l1), True)
    rows = [{"strength": s, "mean_squared_error": float(e) / max(n, 1.0)} for s, e in zip(grid, error, strict=True)]
    return Finished(done.result | {"grid": rows, "folds": len(square)}, done.state)


# ---- wide ridge -----------------------------------------------------------------------------------------------------


def _wide(plan: PenalisedPlan, study: Study, cohort: Cohort, v: Vector, step: int) -> Sums:
    """X'y, the squares of the columns and people; later X'(X v). One block of variants in memory at a time."""
    table = chosen(study, "table")
    columns = cohort.columns(plan.part)
    head = np.column_stack([np.ones(len(columns.y)), standardised(columns.raw, table)])
    p = head.shape[1]
    features = study.features()
    out, squares = np.zeros(len(v)), np.zeros(len(v))

    def blocks() -> Iterator[tuple[slice, Vector]]:
        yield slice(0, p), head
        for block in cohort.dosages(plan.part):
            first = p - 1 + block.first
            own = features[first : first + block.copies.shape[1]]
            yield slice(first + 1, first + 1 + len(own)), standardised(block.copies, own)

    if step == 0:
        u = columns.y
    else:
        u = np.zeros(len(columns.y))
        for at, x in blocks():
            u = u + x @ v[at]
    for at, x in blocks():
        out[at] = x.T @ u
        if step == 0:
            squares[at] = np.einsum("ij,ij->j", x, x)
    if step:
        return {"product": out}
    return {"moment": out, "diagonal": squares, "people": np.array([len(u), u.sum(), u @ u])}


def _conjugate(plan: PenalisedPlan, study: Study, state: State, sums: Sums, step: int, last: bool) -> Next | Finished:
    if step == 0:
        ridge = float(plan.strength or 0) * float(sums["people"][0]) * _penalised(study)
        used = sums["diagonal"] > 1e-9
        residual = sums["moment"] * used
        scale = 1.0 / np.sqrt(np.where(used, sums["diagonal"] + ridge, 1.0))
        direction = scale**2 * residual
        new: State = {
            "beta": np.zeros(len(ridge)), "residual": residual, "moment": residual, "direction": direction,
            "ridge": ridge, "scale": scale, "used": used.astype(np.uint8),
            "first": np.array([np.sqrt(residual @ residual)]), "people": sums["people"],
        }  # fmt: skip
        return Next(new, {"beta": direction})
    used = np.asarray(state["used"], dtype=np.float64)
    direction, residual = state["direction"], state["residual"]
    product = (sums["product"] + state["ridge"] * direction) * used
    before = float(residual @ (state["scale"] ** 2 * residual))
    length = before / max(float(direction @ product), 1e-300)
    beta = state["beta"] + length * direction
    residual = residual - length * product
    size = float(np.sqrt(residual @ residual)) / max(float(state["first"][0]), 1e-300)
    pulled = state["scale"] ** 2 * residual
    direction = pulled + float(residual @ pulled) / max(before, 1e-300) * direction
    new = {**state, "beta": beta, "residual": residual, "direction": direction}
    if size > RESIDUAL and not last:
        return Next(new, {"beta": direction})
    n, _, squares = (float(v) for v in state["people"])
    # (X'X + ridge) b is the moment minus the residual, so the objective needs no further round
    objective = 0.5 * (squares - float(beta @ (state["moment"] + residual))) / max(n, 1.0)
    return model(
        study, beta[1:], beta[:1], strength=float(plan.strength or 0), objective=objective, n=int(round(n)),
        converged=size <= RESIDUAL, residual=size, steps=step,
    )  # fmt: skip


def faults(study: Study, plan: PenalisedPlan, earlier: Mapping[str, Any]) -> Iterator[str]:
    """What a plan says against its study."""
    v = len(study.variants)
    if plan.mode == "private":
        yield f"analysis {plan.name}: a penalised model is exact only; the private model of many variants is glm or prs"
    if not v:
        yield f"analysis {plan.name}: a penalised model of no variants"
    if study.phenotype.kind == "time":
        yield f"analysis {plan.name}: a penalised model of a time; binary or quantitative was expected"
    if plan.scheme == "conjugate_gradient" and study.phenotype.kind == "binary":
        yield f"analysis {plan.name}: conjugate gradients solve least squares; scheme gram takes a binary outcome"
    if plan.scheme == "folds" and study.phenotype.kind == "binary":
        yield (
            f"analysis {plan.name}: scheme folds is least squares; for a binary outcome give each strength an analysis of "
            "its own and compare them by evaluations on held-out patients"
        )
    limit = {"newton": NEWTON_LIMIT, "folds": NEWTON_LIMIT, "gram": GRAM_LIMIT}.get(plan.scheme)
    if limit is not None and v > limit:
        yield f"analysis {plan.name}: scheme {plan.scheme} takes {limit} variants, found {v}: clump them first"
    if any(x is not None and x <= 0 for x in (plan.strength, plan.fraction, *plan.grid)):
        yield f"analysis {plan.name}: strength, fraction and grid are above 0"


PENALISED = Penalised()
