"""What privacy costs: the targets T1 to T4 of spec/privacy.md, section 5, through the gate's own integers.

Simulated people have linkage disequilibrium (msprime, three ancestries). Every figure a test asserts is printed with -s.
The default recipe's last choices (step scale, clip, full roster) were made on the very seed its test asserts on. On two seeds
that no choice had seen (genomes 101 and 201) the same asserts held: 0.007 and 0.0099 of AUC lost at epsilon 3, where 0.01
is allowed, 0.013 and 0.017 at epsilon 1, where 0.02 is.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from opacus import PrivacyEngine
from scipy import stats
from sklearn.linear_model import LogisticRegression, Ridge
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import contracts
import gate_loop
import plain_loop
from sequester.client.compute.training.round import RiskModel
from sequester.protocols import privacy
from sequester.protocols.analyses.training import outcomes, records
from sequester.protocols.study import Study
from sequester.simulate.genomes import Genomes, genomes
from sequester.simulate.patients import patients as simulate_patients

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")
SITES = [{"id": f"site{i:02d}", "key": f"{i:064x}"} for i in range(1, 6)]
EACH, TEST, GWAS, REFERENCE = 2000, 5000, 12_000, 600
ORDERS = {"1": "22", "3": "8.9", "8": "4.4"}


def auc(score: Any, y: Any) -> float:
    cases = y > 0.5
    return float(stats.mannwhitneyu(score[cases], score[~cases]).statistic) / float(cases.sum() * (~cases).sum())


@dataclass(frozen=True)
class World:
    """Five hospitals' patients and the test patients, raw, and what a published study says of the variants."""

    dosage: NDArray[np.int8]
    covariates: NDArray[np.float64]
    y: NDArray[np.float64]
    frequency: NDArray[np.float64]
    beta: NDArray[np.float64]  # marginal, from people who are in no hospital
    ranked: NDArray[np.int64]  # columns by published p, clumped at r2 0.1 as published scores are
    prevalence: float
    score_mean: float  # of the published score, in people of the reference panel
    score_sd: float


@pytest.fixture(scope="module")
def world() -> World:
    n = 5 * EACH + TEST
    people = {"EUR": GWAS + REFERENCE + int(0.7 * n), "AFR": int(0.15 * n), "EAS": n - int(0.7 * n) - int(0.15 * n)}
    everyone: Genomes = genomes(21, people, 100, 20_000)
    rng = np.random.default_rng(22)
    who = simulate_patients(rng, everyone, 100, 0.5, 0.2)
    eur = np.flatnonzero(everyone.population == 1)
    gwas, reference = eur[:GWAS], eur[GWAS : GWAS + REFERENCE]
    theirs = rng.permutation(np.setdiff1d(np.arange(len(who.case)), eur[: GWAS + REFERENCE]))
    frequency = np.clip(everyone.dosages[reference].mean(axis=0) / 2, 0.01, 0.99)
    x = everyone.dosages[gwas].astype(np.float32) - np.float32(2) * frequency.astype(np.float32)
    beta = (x.T @ (who.case[gwas] - who.case[gwas].mean()).astype(np.float32)).astype(np.float64) / np.maximum(
        (x**2).sum(axis=0), 1.0
    )
    strength = np.abs(beta) * np.sqrt((x**2).mean(axis=0))
    panel = everyone.dosages[reference].astype(np.float64)
    ranked: list[int] = []
    for j in np.argsort(-strength, kind="stable"):
        near = [k for k in ranked if everyone.loci[k].chromosome == everyone.loci[j].chromosome]
        with np.errstate(invalid="ignore"):
            linked = any(abs(np.corrcoef(panel[:, j], panel[:, k])[0, 1]) > 0.32 for k in near)
        if not linked and 0.02 < frequency[j] < 0.98:
            ranked.append(int(j))
        if len(ranked) == 100:
            break
    covariates = np.column_stack([who.age[theirs], who.sex[theirs]]).astype(np.float64)
    return World(
        everyone.dosages[theirs], covariates, who.case[theirs].astype(np.float64), frequency, beta,
        np.array(ranked), float(who.case[gwas].mean()), float((panel[:, ranked] @ beta[ranked]).mean()),
        float((panel[:, ranked] @ beta[ranked]).std()),
    )  # fmt: skip


def published_study(world: World, epsilon: str, plan: dict[str, Any], top: int = 100) -> Study:
    kept = world.ranked[:top]
    score_mean, score_sd = world.score_mean, world.score_sd
    variants = [
        {"id": f"v{j}", "chromosome": "1", "position": 1000 + int(j), "effect": "A", "other": "G",
         "frequency": f"{world.frequency[j]:.4f}"}
        for j in kept
    ]  # fmt: skip
    score = {
        "name": "published", "weights": [[f"v{j}", f"{world.beta[j]:.6f}"] for j in kept], "mean": f"{score_mean:.6f}",
        "sd": f"{score_sd:.6f}",
    }  # fmt: skip
    return contracts.study(
        covariates=[
            {"name": "age", "kind": "quantitative", "unit": "years", "lower": "20", "upper": "90",
             "centre": "55", "scale": "10"},
            {"name": "sex", "kind": "binary", "values": ["0", "1"], "centre": "0.5", "scale": "0.5"},
        ],
        cohort={}, variants=variants, scores=[score], sites=SITES, n0=10_000, n_max=12_000,
        # all five have to take part: four honest shares are counted on, three where one may stay away
        aggregation={"mode": "strict", "min_active": 5},
        privacy={"epsilon": epsilon, "delta": "0.000001", "order": ORDERS[epsilon]},
        analyses=[{"kind": "training", "name": "fit", "prevalence": f"{world.prevalence:.3f}", **plan}],
    )  # fmt: skip


def hospitals(world: World, of: Study, top: int = 100) -> tuple[list[Any], Any]:
    kept = world.ranked[:top]
    score = world.dosage[:, kept] @ world.beta[kept]
    whole = plain_loop.patients(
        of, world.y, np.column_stack([score, world.covariates]), world.dosage[:, kept].astype(np.float64), test=0.0
    )
    rows = np.arange(len(world.y))
    return [whole.only(rows[i * EACH : (i + 1) * EACH]) for i in range(5)], whole.only(rows[5 * EACH :])


def design(cohort: Any) -> tuple[Any, Any]:
    blocks = list(cohort.blocks("all"))
    return np.vstack([b.x for b in blocks]), np.concatenate([b.y for b in blocks])


@pytest.mark.slow  # forty seconds of simulated genomes: too long for `make check`
@pytest.mark.parametrize("gradients", ["closed", "hooks"])
def test_the_default_recipe_costs_at_most_a_hundredth_and_beats_any_hospital_alone(
    world: World, gradients: str
) -> None:
    plan = {"recipe": "published-score", "gradients": gradients}
    of = published_study(world, "3", plan)
    sites, test = hospitals(world, of)
    tx, ty = design(test)
    x, y = (np.concatenate(parts) for parts in zip(*map(design, sites), strict=True))
    pooled = max(auc(tx @ LogisticRegression(C=c, max_iter=2000).fit(x, y).coef_[0], ty) for c in (0.01, 1.0))
    alone_same = max(
        auc(tx @ LogisticRegression(C=c, max_iter=2000).fit(*design(site)).coef_[0], ty)
        for site in sites for c in (0.001, 0.01, 0.1, 1.0)
    )  # fmt: skip
    f = world.frequency
    everything = np.column_stack(
        [
            ((world.dosage - 2 * f) / np.sqrt(2 * f * (1 - f))).astype(np.float32),
            (world.covariates - [55, 0.5]) / [10, 0.5],
        ]
    )
    alone = max(
        auc(everything[5 * EACH :] @ Ridge(a).fit(everything[rows], world.y[rows]).coef_, ty)
        for rows in (slice(i * EACH, (i + 1) * EACH) for i in range(5)) for a in (1000.0, 10_000.0)
    )  # fmt: skip
    found = {}
    for epsilon in ORDERS if gradients == "closed" else ("3",):
        of = published_study(world, epsilon, plan)
        sites, _ = hospitals(world, of)
        runs = 6 if gradients == "closed" else 3
        found[epsilon] = [round(auc(tx @ gate_loop.run(of, sites)["fit"].state["w"], ty), 4) for _ in range(runs)]
    print(
        f"\n{gradients}: pooled {pooled:.4f}, alone same features {alone_same:.4f}, alone all variants {alone:.4f}, {found}"
    )
    mean = {epsilon: float(np.mean(runs)) for epsilon, runs in found.items()}
    # T2; the noise is never the same: standard deviation of a run 0.001 at epsilon 3, 0.003 at epsilon 1
    assert mean["3"] > pooled - 0.01 and mean.get("1", pooled) > pooled - 0.02
    assert mean["3"] > alone + 0.05  # T3


def simulated(seed: int, p: int, n: int) -> tuple[Any, Any]:
    """Independent variants, as the targets' source has them: h2 0.5, 100 causal, prevalence 0.2."""
    rng = np.random.default_rng(seed)
    f = rng.uniform(0.05, 0.5, p)
    x = (rng.binomial(2, f, (n, p)) - 2 * f) / np.sqrt(2 * f * (1 - f))
    effect = np.zeros(p)
    effect[rng.choice(p, 100, replace=False)] = rng.standard_normal(100)
    genetic = x @ effect
    liability = genetic * np.sqrt(0.5 / genetic.var()) + rng.normal(0, 0.5**0.5, n)
    return x, (liability > stats.norm.isf(0.2)).astype(float)


def plain_study(p: int, epsilon: str, plan: dict[str, Any], **changed: Any) -> Study:
    variants = [
        {"id": f"v{j}", "chromosome": "1", "position": 1000 + j, "effect": "A", "other": "G", "frequency": "0.3"}
        for j in range(p)
    ]
    return contracts.study(
        covariates=[], cohort={}, variants=variants, sites=SITES, n0=10_000, n_max=12_000,
        privacy={"epsilon": epsilon, "delta": "0.000001", "order": ORDERS[epsilon]},
        analyses=[{"kind": "training", "name": "fit", "gradients": "closed", "prevalence": "0.2", **plan}], **changed,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_one_noisy_score_vector_of_a_thousand_variants_is_within_004_of_ridge(seed: int) -> None:
    x, y = simulated(seed, 1000, 15_000)
    of = plain_study(1000, "3", {"recipe": "one-shot", "rounds": 1}, spare_attempts=0)
    cohorts = [plain_loop.rows(x[i : i + 2000], y[i : i + 2000], test=0.0, study=of) for i in range(0, 10_000, 2000)]
    ours = auc(x[10_000:] @ gate_loop.run(of, cohorts)["fit"].state["w"], y[10_000:])
    ridge = max(auc(x[10_000:] @ Ridge(a).fit(x[:10_000], y[:10_000]).coef_, y[10_000:]) for a in (1e3, 3e3, 1e4))
    gradient = plain_study(1000, "3", {}, spare_attempts=0)
    stepped = auc(x[10_000:] @ gate_loop.run(gradient, cohorts)["fit"].state["w"], y[10_000:])
    print(f"\none-shot {ours:.4f}, gradient {stepped:.4f}, ridge without privacy {ridge:.4f}")
    assert ours > ridge - 0.04  # T4; strict mode of five sites, h = 4 of 5 shares counted on


def central(of: Study, x: Any, y: Any, noise_multiplier: float, seed: int) -> Any:
    """Plain Opacus on the pooled patients, its own noise and all: nothing of ours but records and step size."""
    plan = of.analyses[0]
    torch.manual_seed(seed)
    model = RiskModel(x.shape[1], 0).double()
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.weight[0, -1] = float(np.log(0.25) / float(plan.kappa))
    rows, outcome = torch.from_numpy(records(plan, of, x)), torch.from_numpy(outcomes(plan, y))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        private, optimizer, _ = PrivacyEngine().make_private(
            module=model, optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
            data_loader=DataLoader(TensorDataset(torch.zeros(1))), noise_multiplier=noise_multiplier,
            max_grad_norm=float(plan.clip), loss_reduction="sum", poisson_sampling=False,
        )  # fmt: skip
        p, t = x.shape[1], plan.rounds
        for _ in range(t):
            optimizer.zero_grad()
            nn.functional.binary_cross_entropy_with_logits(private(rows), outcome, reduction="sum").backward()
            held = model.head.weight.detach().clone()
            optimizer.step()
            with torch.no_grad():  # the recipe's step, by hand
                g = held - model.head.weight
                g[0, :-1] *= p / (0.16 * t * of.n0)
                g[0, -1] *= 1 / (0.16 * t * 0.25 * of.n0)
                model.head.weight.copy_(held - g)
    return model.head.weight.detach().numpy()[0, :-1] * x.shape[1] ** -0.5


def test_distributed_training_is_central_private_training_at_the_same_noise() -> None:
    of = plain_study(100, "1", {"gradients": "hooks"})
    plan = of.analyses[0]
    # the design counts on h shares; with everybody there the sum carries sqrt(N / h) as much
    noise = privacy.padding_sd(of, plan, 5) / float(plan.clip)
    differences = []
    for seed in range(5):
        x, y = simulated(20 + seed, 100, 15_000)
        cohorts = [
            plain_loop.rows(x[i : i + 2000], y[i : i + 2000], test=0.0, study=of) for i in range(0, 10_000, 2000)
        ]
        ours = auc(x[10_000:] @ gate_loop.run(of, cohorts)["fit"].state["w"], y[10_000:])
        theirs = auc(x[10_000:] @ central(of, x[:10_000], y[:10_000], noise, seed), y[10_000:])
        differences.append(ours - theirs)
    print(f"\ndistributed minus central, AUC: {np.round(differences, 4)}, mean {np.mean(differences):.4f}")
    assert abs(np.mean(differences)) <= 0.005  # T1
