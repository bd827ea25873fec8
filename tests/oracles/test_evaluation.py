"""Evaluation from histograms: the same AUC as from the scores, and an interval that covers what it says."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from scipy.special import ndtri
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

import contracts
import plain_loop
from oracles import table
from sequester.protocols.analyses.analysis import Finished
from sequester.protocols.analyses.auc import AUCS, NORMAL, coverage, departure, edges, interval, simulated
from sequester.protocols.analyses.auc import shares as cell_shares
from sequester.protocols.analyses.counts import noise_sd as noise_of_a_cell
from sequester.protocols.analyses.evaluation import EVALUATION, EvaluationPlan, discrimination, verified
from sequester.protocols.study import Study

VARIANTS = [
    {"id": f"v{j}", "chromosome": "1", "position": 1000 + j, "effect": "A", "other": "G", "frequency": "0.3"}
    for j in range(4)
]
DEMO = [
    {"kind": "glm", "name": "score", "rounds": 10, "budget": "0.9", "prevalence": "0.15"},
    {"kind": "evaluation", "name": "held_out", "of": "score", "budget": "0.1"},
]


def binned(rng: np.random.Generator, n: int, prevalence: float, auc: float, bins: int) -> np.ndarray:
    """(2, bins) counts of standard normal scores, cases shifted so that the AUC is `auc`."""
    y = rng.random(n) < prevalence
    score = rng.standard_normal(n) + y * np.sqrt(2) * ndtri(auc)
    cells = np.zeros((2, bins))
    np.add.at(cells, (y.astype(int), np.searchsorted(edges(bins)[1:-1], score, side="right")), 1.0)
    return cells


def demo() -> tuple[Study, EvaluationPlan, float]:
    """The study of these tests, its evaluation, and the standard deviation of the noise in a cell."""
    study = contracts.study(covariates=[], cohort={}, variants=VARIANTS, analyses=DEMO)
    plan = study.analyses[1]
    assert isinstance(plan, EvaluationPlan)
    return study, plan, noise_of_a_cell(plan, study)


def test_auc_from_a_thousand_bins_is_the_auc_of_the_scores() -> None:
    study = contracts.study(
        covariates=[], cohort={}, variants=VARIANTS,
        analyses=[
            {"kind": "glm", "name": "score", "mode": "exact", "solver": "newton", "rounds": 20},
            {"kind": "evaluation", "name": "held_out", "of": "score", "mode": "exact", "bins": 1000},
        ],
        aggregation={"mode": "strict", "ring_bits": 64, "fraction_bits": 28},
    )  # fmt: skip
    rng = np.random.default_rng(1)
    cohorts = []
    for site in range(3):
        x = rng.standard_normal((2000, 4))
        y = (rng.random(2000) < 1 / (1 + np.exp(-(x @ [0.8, -0.5, 0.3, 0.0] - 1.5)))).astype(float)
        cohorts.append(plain_loop.rows(x, y, site))
    finished = plain_loop.run(study, cohorts)
    w = finished["score"].state["w"]
    x, y = np.vstack([c.x[c.test] for c in cohorts]), np.concatenate([c.y[c.test] for c in cohorts])
    auc = finished["held_out"].result["auc"]["value"]
    assert auc == pytest.approx(roc_auc_score(y, x @ w), abs=5e-4)  # genomics.md, section 7: 5e-4 at 1,000 bins
    roc = np.array(finished["held_out"].result["roc"])
    assert (np.diff(roc, axis=0) >= 0).all() and roc[0].tolist() == [0, 0] and roc[-1].tolist() == [1, 1]


@pytest.mark.parametrize("auc", [0.7, 0.8])
def test_the_printed_interval_covers_the_truth_in_93_to_97_of_100_simulations(auc: float) -> None:
    # spec/privacy.md, section 6: else no interval may be printed. A study of 10,000 people, a fifth held out, epsilon 3, a
    # tenth of it for this histogram. 5,000 simulations of scores: at a true coverage of 95 % the estimate's sd is .3 %
    study, plan, noise_sd = demo()
    assert verified(plan, study).honest
    rng = np.random.default_rng(11)
    cells = np.stack([binned(rng, 2000, 0.165, auc, plan.bins) for _ in range(5000)])
    cells += rng.normal(0, noise_sd, cells.shape)
    _, low, high = interval(cells, noise_sd)
    printed = discrimination(cells[0], noise_sd, 10)["auc"]
    assert (printed["low"], printed["high"]) == (low[0], high[0])
    covers = float(((low <= auc) & (auc <= high)).mean())
    table.within("evaluation", "5,000 simulations", "coverage of the 95 % interval, from .95", abs(covers - 0.95), 0.02)


def test_a_worthless_score_is_called_better_or_worse_than_chance_in_4_to_6_of_100_simulations() -> None:
    _, plan, noise_sd = demo()
    cells = simulated(np.random.default_rng(12), 2000, 0.165, cell_shares(plan.bins, 0.5), noise_sd, 10_000)
    rejected = float((np.abs(departure(cells, noise_sd, np.full(10_000, 0.5))) > NORMAL).mean())  # its sd is .22 %
    table.within("evaluation", "10,000 null simulations", "type I error at 5 %, from .05", abs(rejected - 0.05), 0.01)


def test_the_interval_is_every_auc_that_the_cells_do_not_contradict() -> None:
    rng = np.random.default_rng(5)
    cells = simulated(rng, 1500, 0.2, cell_shares(20, 0.75), 4.0, 30)
    value, low, high = interval(cells, 4.0)
    for at, z in ((value, 0.0), (low, NORMAL), (high, -NORMAL)):
        assert np.abs(departure(cells, 4.0, at) - z).max() < 1e-6
    assert (low < value).all() and (value < high).all()
    # cases and controls exchanged, scores turned round: the same question
    turned = interval(cells[:, ::-1, ::-1].copy(), 4.0)
    assert np.allclose(np.stack(turned), np.stack([value, low, high]), atol=1e-12)


def test_whether_an_interval_is_printed_follows_from_the_study_and_never_from_what_was_opened() -> None:
    def printed(study: Study, plan: EvaluationPlan, noise_sd: float, people: int) -> set[bool]:
        rng = np.random.default_rng(3)
        seen = set()
        for auc in (0.5, 0.9):
            for cells in simulated(rng, people, 0.165, cell_shares(plan.bins, auc), noise_sd, 12):
                done = EVALUATION.combine(
                    plan, study, {"w": np.ones((1, 4)), "b": np.zeros(1)}, {"cells": cells[None]}, 0
                )
                assert isinstance(done, Finished)
                if "auc" in done.result:
                    seen.add("low" in done.result["auc"])
                    assert ("no_interval" in done.result["auc"]) == ("low" not in done.result["auc"])
        return seen

    study, plan, noise_sd = demo()
    assert printed(study, plan, noise_sd, 2000) == {True}
    # a hospital's worth of patients at the same noise: the lucky draws look like a study that may print, and do not
    small = study.model_copy(update={"n0": 2500})
    assert printed(small, plan, noise_sd, 500) == {False}
    # far more patients than were declared do not change it either
    assert printed(small, plan, noise_sd, 5000) == {False}
    assert "stand out of the noise" in verified(plan, small).why
    # bins too coarse for so large a study would cover what they hide, not the score
    assert "it covers in" in coverage((30000.0, 40000.0), 0.3, 10, noise_sd, 10).why


def test_a_group_has_an_interval_where_the_study_declares_its_share() -> None:
    cohort = {"subgroup": "ancestry", "subgroup_values": ["AFR", "EUR"]}
    rng = np.random.default_rng(6)
    for shares, groups in (({}, set()), ({"subgroup_shares": ["0.45", "0.5"]}, {"AFR", "EUR"})):
        study = contracts.study(
            covariates=[], variants=VARIANTS, analyses=DEMO, cohort=cohort | shares, n0=40000, n_max=50000
        )
        plan = study.analyses[1]
        of = cell_shares(20, 0.7)
        cells = np.concatenate([simulated(rng, n, 0.15, of, 9.0, 1) for n in (3600, 4000, 1000)])
        done = EVALUATION.combine(plan, study, {"w": np.ones((1, 4)), "b": np.zeros(1)}, {"cells": cells}, 0)
        assert isinstance(done, Finished) and "low" in done.result["auc"]
        assert {name for name, g in done.result["groups"].items() if "low" in g.get("auc", {})} == groups


def test_an_exact_interval_is_printed_from_a_hundred_cases_and_controls_on() -> None:
    study = contracts.study(
        covariates=[], cohort={}, variants=VARIANTS,
        analyses=[
            {"kind": "glm", "name": "score", "mode": "exact", "solver": "newton", "rounds": 20},
            {"kind": "evaluation", "name": "held_out", "of": "score", "mode": "exact"},
        ],
        aggregation={"mode": "strict", "ring_bits": 64, "fraction_bits": 28},
    )  # fmt: skip
    rng = np.random.default_rng(8)
    for cases, shown in ((99, False), (100, True)):
        cells = np.stack([rng.multinomial(n, of) for n, of in zip((400, cases), cell_shares(20, 0.7), strict=True)])
        sums = {
            "cells": cells[None].astype(float),
            "sums": np.array([[400.0, 100.0, 90.0, 70.0, -210.0, 0.0, 400.0, 60.0]]),
        }
        done = EVALUATION.combine(study.analyses[1], study, {"w": np.ones((1, 4)), "b": np.zeros(1)}, sums, 0)
        assert isinstance(done, Finished) and ("low" in done.result["auc"]) is shown


# Declared (people, share of cases, bins, noise sd of a cell): what of it prints an interval, and what must not.
GRID = [
    (people, share, bins, noise)
    for people in (500, 2000, 8000)
    for share in (0.05, 0.15, 0.5)
    for bins in (10, 20, 40)
    for noise in (1.0, 3.0, 9.0, 25.0)
]
PRINTED = 0.4  # of the grid at least: a rule that prints nothing would keep every bound


def outside(people: int, share: float, bins: int, noise: float, times: int, aucs: Sequence[float]) -> list[str]:
    """Cases of a declared plan whose simulated coverage is not within 93 to 97 %, the declared size being the true one."""
    rng = np.random.default_rng([people, round(share * 100), bins, round(noise)])
    found = []
    for auc in aucs:
        cells = simulated(rng, people, share, cell_shares(bins, auc), noise, times)
        covers = float((np.abs(departure(cells, noise, np.full(times, auc))) <= NORMAL).mean())
        if not 0.93 <= covers <= 0.97:
            found.append(f"{people} {share} {bins} {noise} {auc}: {covers:.4f}")
    return found


def test_what_may_print_covers_93_to_97_on_other_draws_in_a_part_of_the_grid() -> None:
    # 2,000 simulations each, sd .5 % at a coverage of 95 %; none of these has a true coverage beyond 94 to 96 %
    for case in ((2000, 0.15, 10, 3.0), (2000, 0.15, 20, 9.0), (8000, 0.05, 20, 9.0)):
        people, share, bins, noise = case
        assert coverage((float(people), float(people)), share, bins, noise, 10).honest
        assert outside(people, share, bins, noise, 2000, (0.55, 0.7, 0.85)) == []


@pytest.mark.nightly
@pytest.mark.timeout(7200)
def test_what_may_print_covers_93_to_97_over_the_whole_grid() -> None:
    # 20,000 simulations each: sd .15 % at 95 %, .12 % at the bounds. No allowance for it: the bounds are the page's own
    printed, wrong = 0, []
    for people, share, bins, noise in GRID:
        if coverage((float(people), float(people)), share, bins, noise, 10).honest:
            printed += 1
            wrong += outside(people, share, bins, noise, 20_000, AUCS)
    assert wrong == []
    assert printed >= PRINTED * len(GRID), printed


def binned_auc(auc: float, bins: int) -> float:
    """The AUC of the binned score itself, ties half; at 20 bins it is .002 below the score's own."""
    shift = np.sqrt(2) * ndtri(auc)
    controls, cases = np.diff(norm.cdf(edges(bins))), np.diff(norm.cdf(edges(bins) - shift))
    return float((cases * (np.cumsum(controls) - controls / 2)).sum())


def test_binning_at_normal_quantiles_costs_less_than_0_003_of_auc() -> None:
    for auc in (0.6, 0.7, 0.8):
        assert auc - 0.003 < binned_auc(auc, 20) <= auc


def test_a_histogram_of_too_few_people_prints_the_floor_and_nothing_else() -> None:
    cells = np.zeros((2, 20))
    cells[0, 3] = 500
    cells[1, 5] = 4
    assert discrimination(cells, 0.0, 10) == {"suppressed": "<10"}


def test_one_patient_is_one_cell_of_one_group() -> None:
    study = contracts.study(
        covariates=[], variants=VARIANTS, analyses=DEMO,
        cohort={"subgroup": "ancestry", "subgroup_values": ["AFR", "EUR"]},
    )  # fmt: skip
    plan = study.analyses[1]
    rng = np.random.default_rng(2)
    n = 50
    whole = plain_loop.Rows(
        rng.standard_normal((n, 4)), rng.integers(0, 2, n).astype(float), np.ones(n, bool),
        np.zeros(n, np.int64), rng.integers(0, 3, n),
    )  # fmt: skip
    fewer = plain_loop.Rows(whole.x[1:], whole.y[1:], whole.test[1:], whole.fold[1:], whole.strata[1:])
    broadcast = {"w": np.array([[np.inf, 1.0, -1.0, 0.5]]), "b": np.zeros(1)}
    a = EVALUATION.contribution(plan, study, whole, broadcast, 0)["cells"]
    b = EVALUATION.contribution(plan, study, fewer, broadcast, 0)["cells"]
    assert np.abs(a - b).sum() == 1 and a.shape == (3, 2, 20)


def test_no_group_can_be_solved_for_from_the_total_and_the_others() -> None:
    study = contracts.study(
        covariates=[], variants=VARIANTS, analyses=DEMO,
        cohort={"subgroup": "ancestry", "subgroup_values": ["AFR", "EUR"]},
    )  # fmt: skip
    plan = study.analyses[1]
    rng = np.random.default_rng(4)
    cells = np.stack([binned(rng, n, 0.3, 0.75, 20) for n in (3000, 3000, 12)])  # AFR, EUR, and a few others
    state = {"w": np.ones((1, 4)), "b": np.zeros(1)}
    done = EVALUATION.combine(plan, study, state, {"cells": cells}, 0)
    assert isinstance(done, Finished)
    suppressed = [name for name, group in done.result["groups"].items() if "suppressed" in group]
    assert len(suppressed) != 1 and "other" in suppressed  # with one alone, total minus the shown gives it away
