"""The AUC of a score from a noisy histogram by outcome, its 95 % interval, and whether that interval may be printed.

The interval holds every AUC that the opened cells do not contradict: the difference between the pairs that the case wins
(ties half) and what the bins would show of that AUC, over its standard deviation, is within 1.96. The bins' view of an AUC
comes from a normal model of the ROC at the controls' own edges (binormal: Dorfman and Alf 1969; its slope fitted), so
what bins hide is given back whatever monotone scale the score has and wherever the edges lie. The variance adds the
sampling of cases and controls under that model and the noise of every cell; the noise enters it without a logarithm and
without a division by a difference, so that close to the noise the interval grows wide instead of wrong.

spec/privacy.md, section 6, allows an interval only where it covers in 93 to 97 of 100 simulations of the plan and a test at
5 % rejects 4 to 6 % of null cases. `coverage` simulates the plan: sizes, bins and noise, all public. What was opened has
no say: intervals that appear where the draw was lucky cover less than they claim.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]

NORMAL = 1.959963984540054
PRIOR = (
    100.0  # weight of a slope of 1 beside the cells' own: they decide once some hundred cases stand out of the noise
)
HALVINGS = 30

SIMULATIONS = 2000  # studies a case: at a true coverage of 95 % the estimate has a standard deviation of .5 %
NULL_SIMULATIONS = 10_000  # of AUC 1/2: .2 %
COVERS, REJECTS = (0.93, 0.97), (0.04, 0.06)
LEAST_PRINTED = 0.95  # share of the simulated studies that reach the floor: else the floor would be the choice
AUCS = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9)
PEOPLE, CASES = (
    (0.8, 1.25),
    (0.75, 4 / 3),
)  # a declared size is a guess: by how much people and share of cases may be off


@dataclass(frozen=True, slots=True)
class Shape:
    """Scores in units of the edges: controls around `place`, cases higher, both normal, or two such halves `apart`."""

    scale: float = 1.0
    spread: float = 1.0  # of cases over that of controls
    place: float = 0.0
    apart: float = 0.0  # a strong factor of two values, as sex


SHAPES = (Shape(), Shape(0.7, 0.85), Shape(1.4, 1.2), Shape(place=0.5), Shape(0.7, apart=1.4))


def edges(bins: int) -> Vector:
    """bins + 1 public edges: normal quantiles, the outer two infinite."""
    from scipy.special import ndtri  # heavy: loaded where it is used

    return np.asarray(ndtri(np.linspace(0.0, 1.0, bins + 1)), dtype=np.float64)


def is_shown(cells: Vector, noise_sd: float, floor: int) -> NDArray[np.bool_]:
    """Whether cases and controls both reach the publication floor, twice their noise allowed for; cells (..., 2, bins)."""
    return np.asarray(cells.sum(-1).min(-1) >= floor + 2 * noise_sd * math.sqrt(cells.shape[-1]))


def interval(cells: Vector, noise_sd: float) -> tuple[Vector, Vector, Vector]:
    """AUC and the ends of its 95 % interval, each (...), in 0..1; cells (..., 2, bins) of controls and cases, noisy.

    `noise_sd` is the standard deviation of the noise in a cell. Both rows must add up to more than 0.
    """

    def solved(z: float) -> Vector:
        low, high = np.zeros(cells.shape[:-2]), np.ones(cells.shape[:-2])
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            more = departure(cells, noise_sd, middle) > z
            low, high = np.where(more, middle, low), np.where(more, high, middle)
        return (low + high) / 2

    return solved(0.0), solved(NORMAL), solved(-NORMAL)


def departure(cells: Vector, noise_sd: float, auc: Vector) -> Vector:
    """How many standard deviations the opened cells show more than scores of this AUC (...) would; falls as it rises."""
    from scipy.special import ndtr, ndtri  # heavy: loaded where it is used

    outside = cells.sum(-1) - cells.max(-1)  # whose bins tell more: patients outside the fullest one
    turn = (outside[..., 0] < outside[..., 1])[..., None, None]
    turned = np.where(turn, cells[..., ::-1, :], cells[..., ::-1])  # cases that score low are controls that score high
    controls, cases = turned[..., 0, :], turned[..., 1, :]  # from the highest score down
    n0, n1, s2 = controls.sum(-1)[..., None], cases.sum(-1)[..., None], noise_sd**2
    at, slope, leverage = _curve(controls, cases, noise_sd)
    normal: Vector = ndtri(np.clip(auc, 1e-12, 1 - 1e-12))[..., None]
    gap = normal * np.sqrt(1 + slope**2)
    flagged, found = ndtr(at), ndtr(gap + slope * at)  # of controls and of cases, at the lower edge of each bin
    at_edges = np.concatenate([np.zeros_like(found[..., :1]), found], -1)
    p0, p1 = np.diff(flagged, axis=-1, prepend=0.0), np.diff(at_edges, axis=-1)
    expected = (p0 * (at_edges[..., 1:] + at_edges[..., :-1]) / 2).sum(-1, keepdims=True)
    won = (n0 - np.cumsum(controls, -1) + controls / 2) / n0 - expected  # by a case of the bin, against the mean
    shown = (cases * won).sum(-1, keepdims=True) / n1
    # an edge moves what is expected along the curve, the curve's slope moves it at every edge
    inner, width = np.clip(at[..., :-1], -6.0, 6.0), (p0[..., :-1] + p0[..., 1:]) / 2
    density = np.exp(-((gap + slope * inner) ** 2) / 2) / math.sqrt(2 * math.pi)
    along = slope * density * math.sqrt(2 * math.pi) * np.exp(inner**2 / 2) * width
    along = np.minimum(along, at_edges[..., 2:] - at_edges[..., :-2])
    bend = (density * width * (normal * slope / np.sqrt(1 + slope**2) + inner)).sum(-1, keepdims=True)
    case = won - _centred(_above(bend * leverage), p1)
    control = _centred(_above(along), p0)
    variance = ((p1 * case**2).sum(-1, keepdims=True) * n1 + s2 * (case**2).sum(-1, keepdims=True)) / n1**2
    variance += ((p0 * control**2).sum(-1, keepdims=True) * n0 + s2 * (control**2).sum(-1, keepdims=True)) / n0**2
    return np.asarray((shown / np.sqrt(np.maximum(variance, 1e-300)))[..., 0])


def _above(of_edges: Vector) -> Vector:
    """What one patient of each bin adds to all edges that they are above."""
    return np.concatenate([np.cumsum(of_edges[..., ::-1], -1)[..., ::-1], np.zeros_like(of_edges[..., :1])], -1)


def _centred(of_bins: Vector, shares: Vector) -> Vector:
    return np.asarray(of_bins - (shares * of_bins).sum(-1, keepdims=True))


def _curve(controls: Vector, cases: Vector, noise_sd: float) -> tuple[Vector, Vector, Vector]:
    """The ROC as a line between normal quantiles, bins from the highest score down, by weighted least squares.

    Quantiles of the controls flagged at each lower edge (..., bins), the slope (..., 1), which is the spread of controls
    over that of cases, and what the share of cases found at each inner edge adds to it (..., bins - 1).
    """
    from scipy.special import ndtri  # heavy: loaded where it is used

    flagged = np.maximum(controls, 0.0).cumsum(-1)
    at = ndtri(flagged / np.maximum(flagged[..., -1:], 1e-300))
    n1 = np.maximum(cases.sum(-1, keepdims=True), 1.0)
    found = np.clip(cases.cumsum(-1)[..., :-1] / n1, 0.5 / n1, 1 - 0.5 / n1)
    x, z = np.clip(at[..., :-1], -4.0, 4.0), ndtri(found)
    density = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    weight = density**2 / (found * (1 - found) / n1 + noise_sd**2 * np.arange(1, cases.shape[-1]) / n1**2)
    x = x - (weight * x).sum(-1, keepdims=True) / weight.sum(-1, keepdims=True)
    known = (weight * x * x).sum(-1, keepdims=True) + PRIOR
    slope = ((weight * x * z).sum(-1, keepdims=True) + PRIOR) / known
    return np.asarray(at), np.maximum(slope, 0.1), weight * x / density / known


# ---- whether it may be printed --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Coverage:
    """What the simulated intervals did: least and largest coverage of a case, and how often a null case was rejected.

    `honest` where all of it keeps the bounds; a simulation ends at the first case that does not, `why` says which.
    """

    least: float
    most: float
    rejected: float
    why: str = ""

    @property
    def honest(self) -> bool:
        """Whether the interval may be printed."""
        return not self.why


@lru_cache(maxsize=256)
def coverage(people: tuple[float, float], cases: float, bins: int, noise_sd: float, floor: int) -> Coverage:
    """Simulates studies of the declared sizes: AUC .5 to .9, sizes around the declared ones, scores of several shapes.

    `people` are the least and the largest number declared, `cases` their share. A case of `SIMULATIONS` studies passes
    where the estimated coverage is within 93 to 97 %, at AUC 1/2 where the test rejects 4 to 6 % of `NULL_SIMULATIONS`, and
    where at least 95 % of its studies reach the publication floor. The seed is fixed. Takes a second or two.
    """
    rng = np.random.default_rng([bins, round(people[0]), floor])
    least, most, rejected = 1.0, 0.0, 0.05
    for n, share, shape, auc in _conditions(people, cases):
        times = NULL_SIMULATIONS if auc == 0.5 else SIMULATIONS
        cells = simulated(rng, n, share, shares(bins, auc, shape), noise_sd, times)
        cells = cells[is_shown(cells, noise_sd, floor)]
        where = f"{n:,} people, {n * share:,.0f} cases, AUC {auc:g}"
        if len(cells) < LEAST_PRINTED * times:
            return Coverage(least, most, rejected, f"{where}: cases or controls do not stand out of the noise")
        covered = float((np.abs(departure(cells, noise_sd, np.full(len(cells), auc))) <= NORMAL).mean())
        least, most = min(least, covered), max(most, covered)
        if auc == 0.5 and abs(0.95 - covered) > abs(rejected - 0.05):
            rejected = 1 - covered
        low, high = (1 - REJECTS[1], 1 - REJECTS[0]) if auc == 0.5 else COVERS
        if not low <= covered <= high:
            return Coverage(least, most, rejected, f"{where}: it covers in {covered:.1%} of {len(cells):,} simulations")
    return Coverage(least, most, rejected)


def shares(bins: int, auc: float, shape: Shape = SHAPES[0]) -> Vector:
    """(2, bins): how controls and cases of this AUC fall into the bins."""
    from scipy.optimize import brentq  # heavy: loaded where it is used
    from scipy.special import ndtr

    halves = np.array([-shape.apart, shape.apart]) / 2
    between = np.subtract.outer(halves, halves)
    wide = shape.scale * math.sqrt(1 + shape.spread**2)
    gap = brentq(lambda gap: float(ndtr((gap + between) / wide).mean()) - auc, -20.0, 20.0)
    at = edges(bins)[:, None] - shape.place - halves
    below = [ndtr(at / shape.scale), ndtr((at - gap) / (shape.scale * shape.spread))]
    return np.asarray(np.diff(np.stack(below).mean(-1), axis=-1))


def simulated(rng: np.random.Generator, people: int, cases: float, of: Vector, noise_sd: float, times: int) -> Vector:
    """(times, 2, bins): opened histograms of studies of so many people whose rows fall into the bins by `of`."""
    n1 = rng.binomial(people, cases, times)
    drawn = np.stack([rng.multinomial(people - n1, of[0]), rng.multinomial(n1, of[1])], 1)
    return drawn + noise_sd * rng.standard_normal(drawn.shape)


def _conditions(people: tuple[float, float], cases: float) -> Iterator[tuple[int, float, Shape, float]]:
    """Few and many patients, then the declared number with scores of every shape; strongest score first.

    Plain scores at every AUC, the others at every second; at AUC 1/2 the shape makes no difference.
    """
    fewer = (round(people[0] * PEOPLE[0]), cases * CASES[0])
    more = (round(people[1] * PEOPLE[1]), min(cases * CASES[1], (1 + cases) / 2))
    between = (round((people[0] + people[1]) / 2), cases)
    for size in (fewer, more):
        for auc in reversed(AUCS[::2]):
            yield *size, SHAPES[0], auc
    for shape in SHAPES[1:]:
        for auc in reversed(AUCS[2::2]):
            yield *between, shape, auc
    for auc in reversed(AUCS):
        yield *between, SHAPES[0], auc
