"""The columns of a study for made-up people: text for a hospital's table, numbers as a frozen cohort holds them.

Values lie within the declared bounds, a few covariates are missing, conditions on other columns are met. An outcome follows
from a liability: a yes/no outcome at the prevalence its plans declare, a quantity, a count, or a time with its event.
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal

import numpy as np
from numpy.typing import NDArray

from sequester.protocols.errors import StudyError
from sequester.protocols.faults import CONDITION
from sequester.protocols.study import Column, Study, standardisation, transformed
from sequester.simulate.genomes import POPULATIONS
from sequester.simulate.patients import survival

Vector = NDArray[np.float64]
MISSING = 0.01  # of covariates
OUTCOME_SD = 0.3  # of a quantitative outcome, in halves of its bounds
FOLLOW_UP_YEARS = 12.0  # of the simulated times, stretched to the study's own bound


class Table:
    """Columns as they are drawn: text for the file, numbers as a frozen cohort holds them."""

    def __init__(self, study: Study, rng: np.random.Generator, genetic: Vector) -> None:
        self._study, self._rng, self._n = study, rng, len(genetic)
        self.cells: dict[str, Sequence[str]] = {}
        columns: list[Vector] = []
        for score in study.scores:
            columns.append(np.zeros(self._n))
            if not score.weights:  # the hospital's own column: it knows most of what the genes do
                known = 0.8 * genetic + 0.6 * rng.standard_normal(self._n)
                columns[-1] = float(score.mean) + float(score.sd) * known
                self.cells[score.name] = [f"{value:.6g}" for value in columns[-1]]
        for column in study.covariates:
            columns += self._covariate(column)
        self.raw = np.column_stack([np.zeros((self._n, 0)), *columns])
        for condition in study.cohort.where:
            matched = CONDITION.match(condition)
            assert matched is not None  # the study was validated
            name, sign, value = matched.groups()
            if name not in self.cells and name != study.phenotype.name:
                self.cells[name] = [_meeting(sign, value)] * self._n

    def _covariate(self, column: Column) -> list[Vector]:
        gone = self._rng.random(self._n) < MISSING
        if column.kind == "category":
            level = self._rng.choice(len(column.values), self._n, p=_falling(len(column.values)))
            self.cells[column.name] = ["" if g else column.values[k] for g, k in zip(gone, level, strict=True)]
            return [np.where(gone, np.nan, level == k) for k in range(1, len(column.values))]
        if column.kind == "binary":
            one = self._rng.random(self._n) < (0.5 if column.centre == Decimal("0.5") else 0.3)
            names = column.values or ("0", "1")
            self.cells[column.name] = ["" if g else names[int(k)] for g, k in zip(gone, one, strict=True)]
            return [np.where(gone, np.nan, one)]
        low, high = float(column.lower or 0), float(column.upper or 1)
        mean, sd = (low + high) / 2, (high - low) / 6
        if column.transform == "none":  # a declared centre and scale are a public mean and SD
            mean, sd = float(column.centre or mean), float(column.scale or sd)
        values = np.clip(self._rng.normal(mean, sd, self._n), low, high)
        self.cells[column.name] = ["" if g else f"{v:.6g}" for g, v in zip(gone, values, strict=True)]
        return [np.where(gone, np.nan, [transformed(column, float(f"{v:.6g}")) for v in values])]

    def scores(self, dosage: NDArray[np.int8]) -> None:
        """Fill in the published scores that are weights of variants, as `data freeze` computes them."""
        place = {v.id: j for j, v in enumerate(self._study.variants)}
        for k, score in enumerate(self._study.scores):
            for name, weight in score.weights:
                if name not in place:
                    raise StudyError(
                        f"score {score.name} weighs {name}, which the study does not list as a variant",
                        hint="list it, or leave it out of the score: a hospital would refuse",
                    )
                copies = dosage[:, place[name]].astype(np.float64)
                missing = 2 * float(self._study.variants[place[name]].frequency)
                self.raw[:, k] += float(weight) * np.where(copies < 0, missing, copies)
            reach = 3 * float(score.sd)
            self.raw[:, k] = np.clip(self.raw[:, k], float(score.mean) - reach, float(score.mean) + reach)

    def strata(self, population: NDArray[np.int64]) -> NDArray[np.int64]:
        """The study's subgroups: ancestries where it names them, else drawn at random."""
        name, values = self._study.cohort.subgroup, self._study.cohort.subgroup_values
        if name is None:
            return np.zeros(self._n, dtype=np.int64)
        if name not in self.cells:
            drawn = self._rng.choice(len(values), self._n, p=_falling(len(values)))
            labels = [POPULATIONS[p] if POPULATIONS[p] in values else values[k]
                      for p, k in zip(population, drawn, strict=True)]  # fmt: skip
            self.cells[name] = labels
        order = {value: g for g, value in enumerate(values)}
        return np.array([order.get(cell, len(order)) for cell in self.cells[name]])

    def outcome(self, sure: Vector, liability: Vector) -> tuple[Vector, Vector | None]:
        """The phenotype from what is known of each person and from the whole liability: (y, event of a time)."""
        column, rng = self._study.phenotype, self._rng
        share = next((float(p.prevalence) for p in self._study.analyses if hasattr(p, "prevalence")), 0.1)
        if column.kind == "binary":
            y = (liability > np.quantile(liability, 1 - min(max(share, 0.001), 0.999))).astype(np.float64)
            names = column.values or ("0", "1")
            self.cells[column.name] = [names[int(k)] for k in y]
            return y, None
        if column.kind == "time":
            end = float(column.upper or 1)
            years, event = survival(rng, sure)
            time = years * end / FOLLOW_UP_YEARS
            self.cells[column.name] = [f"{t:.4f}" for t in time]
            self.cells[str(column.event)] = [str(int(e)) for e in event]
            return np.minimum(np.array([float(f"{t:.4f}") for t in time]), end), event.astype(np.float64)
        low, high = float(column.lower or 0), float(column.upper or 1)
        if any(getattr(plan, "family", "") == "poisson" for plan in self._study.analyses):
            values = np.clip(rng.poisson(share * np.exp(sure - sure.var() / 2)), low, high).astype(np.float64)
        else:
            centre, scale = standardisation(column)
            ends = (transformed(column, low), transformed(column, high))
            middle = sum(ends) / 2 if column.transform == "none" else centre
            values = _untransformed(column, np.clip(middle + scale * OUTCOME_SD * liability, *ends))
        self.cells[column.name] = [f"{v:.6g}" for v in values]
        centre, scale = standardisation(column)
        return (np.array([transformed(column, float(f"{v:.6g}")) for v in values]) - centre) / scale, None


def _falling(count: int) -> Vector:
    """Probabilities of so many values, each half as likely again as the next."""
    weight: Vector = 1.5 ** -np.arange(count, dtype=np.float64)
    return np.asarray(weight / weight.sum())


def _meeting(sign: str, value: str) -> str:
    """A cell that meets a condition."""
    match sign:
        case "!=":
            return "other"
        case ">":
            return f"{float(value) + 1:g}"
        case "<":
            return f"{float(value) - 1:g}"
        case _:
            return value


def _untransformed(column: Column, values: Vector) -> Vector:
    match column.transform:
        case "sqrt":
            return np.asarray(np.square(values))
        case "log":
            return np.asarray(np.exp(values))
        case "none":
            return values
