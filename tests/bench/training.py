"""clip_vs_opacus: the clipped gradient sum of a linear head over patients, against Opacus with hooks and with ghost.

Ours is a frozen store's round as compute answers it: from int8 dosages on disk, in float64 (spec/privacy.md, 2.3). Opacus
is as its users run it, in float32 from a tensor in memory that was standardised before; full batches go through it in
physical batches of 256, which is what its memory allows. Both are this environment's: Opacus is a part of the product.
"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from opacus import PrivacyEngine
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bench import store
from bench.frame import Bench, interleaved, timed
from sequester.client.compute.cohort import StoredCohort
from sequester.protocols.analyses.training import TrainingPlan, closed_form, outcomes, records
from sequester.protocols.study import Study

PHYSICAL = 256


class Head(nn.Module):
    """One weight a feature; the output has shape (B,)."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.head = nn.Linear(features, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.head(x).flatten()
        return scores


class Opacus:
    """One logical batch through PrivacyEngine, up to the clipped sum; no noise, no step."""

    def __init__(self, mode: str, rows: np.ndarray, y: np.ndarray, weights: np.ndarray, clip: float) -> None:
        self.x, self.y = torch.from_numpy(rows.astype(np.float32)), torch.from_numpy(y.astype(np.float32))
        model = Head(rows.shape[1])
        with torch.no_grad():
            model.head.weight.copy_(torch.from_numpy(weights[None, :].astype(np.float32)))
        made = PrivacyEngine().make_private(
            module=model, optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
            criterion=nn.BCEWithLogitsLoss(reduction="sum"), data_loader=DataLoader(TensorDataset(self.x), batch_size=1),
            noise_multiplier=0.0, max_grad_norm=clip, loss_reduction="sum", poisson_sampling=False, grad_sample_mode=mode,
        )  # fmt: skip
        self.module, self.optimizer = made[0], made[1]
        self.criterion = made[2] if mode == "ghost" else nn.BCEWithLogitsLoss(reduction="sum")
        self.sum = np.zeros(0)

    def run(self) -> None:
        """The clipped sum of every record, in physical batches."""
        self.optimizer.zero_grad()
        parameter = self.optimizer.params[0]
        parameter.summed_grad = None
        for at in range(0, len(self.y), PHYSICAL):
            part = slice(at, at + PHYSICAL)
            self.criterion(self.module(self.x[part]), self.y[part]).backward()
            self.optimizer.signal_skip_step(True)
            self.optimizer.pre_step()
            self.optimizer.zero_grad()
        self.sum = parameter.summed_grad.numpy().ravel()


def compare(bench: Bench, folder: Path, features: int, patients: int, cell: str, at_least: float | None) -> None:
    """One cell: ours, hooks and ghost in turn, and the three sums the same."""
    study = store.study(features, {"kind": "training", "name": "fit", "gradients": "closed", "clip": "0.3"})
    plan = study.analyses[0]
    assert isinstance(plan, TrainingPlan)
    place = store.frozen(folder / f"{features}-{patients}", patients, features)
    store.with_constants(place, study)
    cohort = StoredCohort(place, study)
    weights = {"head.weight": np.random.default_rng(3).standard_normal((1, features + 1)) * 0.1}
    ours: dict[str, Any] = {}

    def mine() -> None:
        ours.update(cohort.gradient(plan, weights))

    rows, y = _records(plan, study, cohort)
    peers = {mode: Opacus(mode, rows, y, weights["head.weight"][0], float(plan.clip)) for mode in ("hooks", "ghost")}
    tasks = {"ours": lambda: timed(mine)} | {mode: (lambda p=p: timed(p.run)) for mode, p in peers.items()}
    taken = interleaved(tasks, 3 if bench.quick else 5, 1.0)
    expected = closed_form(plan, rows, y, weights["head.weight"][0])
    assert np.abs(ours["head.weight"][0] - expected).max() < 1e-9, "ours is not the closed form"
    for mode, peer in peers.items():
        error = float(np.abs(peer.sum - expected).max())
        assert error < 1e-3 * float(np.abs(expected).max()), f"{mode} is another sum by {error}"
        note = f"largest difference of a weight's sum {error:.1g}: float32"
        bench.compared("clip_vs_opacus", f"{cell} {mode}", taken["ours"], taken[mode], at_least=at_least, note=note)


def _records(plan: TrainingPlan, study: Study, cohort: StoredCohort) -> tuple[np.ndarray, np.ndarray]:
    parts = [(records(plan, study, b.x), outcomes(plan, b.y)) for b in cohort.blocks(plan.part)]
    return np.vstack([x for x, _ in parts]), np.concatenate([y for _, y in parts])


def run(bench: Bench) -> None:
    """256 patients and a hospital's 1,024, at 10,000 and 100,000 features."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")  # Opacus': secure mode off, hooks of inputs without gradients
    with tempfile.TemporaryDirectory() as name:
        for features, least in ((10_000, None), (100_000, 2.5)):
            for patients, batch in ((PHYSICAL, "batch 256"), (1024, "full batch of 1,024")):
                if bench.quick and (patients > PHYSICAL or features > 10_000):
                    continue
                compare(bench, Path(name), features, patients, f"p={features // 1000}k {batch}", least)
