"""One training round in torch: the broadcast weights in, the clipped sum of this hospital's patients out.

The optimizer step that follows is skipped, or, in tests, made with the opened noisy sum: its weights must then be the
next broadcast, which shows that Opacus and the exchange mean the same step (spec/privacy.md, 3.3).
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from opacus.validators import ModuleValidator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sequester.client.compute.training.engine import GateEngine, Trip, in_thread
from sequester.protocols.analyses.analysis import Layout
from sequester.protocols.analyses.training import TrainingPlan, parameters
from sequester.protocols.errors import RoundAbandoned, SiteError, StudyError

Vector = NDArray[np.float64]

# Opacus' hooks need no gradient of the inputs, and torch says so at every batch
warnings.filterwarnings("ignore", message="Full backward hook is firing")


class RiskModel(nn.Module):
    """A linear head, or a network of one tanh layer; the output has shape (B,): trap 1 lives in (B, 1)."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(features, hidden) if hidden else None
        self.head = nn.Linear(hidden or features + 1, 1, bias=bool(hidden))
        self.flat = nn.Flatten(0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.hidden is not None:
            x = torch.tanh(self.hidden(x))  # (B, hidden)
        scores: torch.Tensor = self.flat(self.head(x))  # (B,)
        return scores


class HalfSquare(nn.Module):
    """(prediction - outcome)^2 / 2, whose gradient is the residual."""

    def __init__(self, reduction: str = "sum") -> None:
        super().__init__()
        self.reduction = reduction

    def forward(self, prediction: torch.Tensor, outcome: torch.Tensor) -> torch.Tensor:
        each = (prediction - outcome) ** 2 / 2
        return each.sum() if self.reduction == "sum" else each


def require_layout(model: nn.Module, expected: Layout) -> None:
    """`StudyError` unless names, shapes and order of the model's trainable weights are the plan's."""
    found = Layout(tuple((name, tuple(p.shape)) for name, p in model.named_parameters() if p.requires_grad))
    if found.digest() != expected.digest():
        raise StudyError(
            f"the model's weights are {[n for n, _ in found.fields]}, the plan's {[n for n, _ in expected.fields]}",
            hint="names, shapes and order must agree: nothing was sent",
        )


class Round:
    """The worker's side of one round: `begin`, `vector`, then `skip`, `finish` or `abandon`."""

    def __init__(
        self,
        plan: TrainingPlan,
        features: int,
        weights: Mapping[str, Vector],
        device: str = "cpu",
        model: nn.Module | None = None,
        learning_rate: float = 1.0,
    ) -> None:
        self._plan = plan
        self._device = torch.device(device)
        self.model = (model if model is not None else RiskModel(features, plan.hidden)).double().to(self._device)
        ModuleValidator.validate(self.model, strict=True)
        self._layout = Layout(parameters(plan, features))
        require_layout(self.model, self._layout)
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                p.copy_(torch.from_numpy(np.array(weights[name], dtype=np.float64)))
        self.trip = Trip()
        self.engine = GateEngine(self.trip)
        criterion = nn.BCEWithLogitsLoss(reduction="sum") if plan.family == "logistic" else HalfSquare()
        # make_private reads a rate off a loader; a loader of one row of nothing says 1, whoever the patients are
        loader = DataLoader(TensorDataset(torch.zeros(1)), batch_size=1)
        made = self.engine.make_private(
            module=self.model,
            optimizer=torch.optim.SGD(self.model.parameters(), lr=learning_rate),
            criterion=criterion,
            data_loader=loader,
            noise_multiplier=float(plan.noise_multiplier or 0),
            max_grad_norm=float(plan.clip),
            loss_reduction="sum",
            poisson_sampling=False,  # sampled before, by secret bytes
            grad_sample_mode=plan.gradients,
        )
        self._module, self.optimizer = made[0], made[1]
        # in ghost mode only the returned criterion clips (trap 2): nobody outside this class can call another
        self._criterion = made[2] if plan.gradients == "ghost" else criterion
        self.optimizer.attach_step_hook(self.engine.accountant.get_optimizer_hook_fn(sample_rate=float(plan.rate)))
        held = {id(p) for p in self.optimizer.params}
        if held != {id(p) for p in self.model.parameters() if p.requires_grad}:
            raise SiteError("the optimizer does not hold every weight that is trained: nothing was sent")
        self._thread: threading.Thread | None = None

    def begin(self, chunks: Sequence[tuple[Vector, Vector]]) -> None:
        """Start the step in a thread of its own; `chunks` are (records, outcomes) of one logical batch."""
        self._thread = in_thread(lambda: self._step(chunks), self.trip)

    def vector(self) -> Vector:
        """The clipped sum, float64, in the plan's order; raises what went wrong on the way to it."""
        return self.trip.vector()

    def named(self, vector: Vector) -> dict[str, Vector]:
        """The vector as the plan names it."""
        return dict(self._layout.split(vector))

    def skip(self) -> None:
        """Let the step end without moving a weight."""
        self._end(None)

    def finish(self, noisy_sum: Vector) -> None:
        """Make the step with the opened sum: the cross-check."""
        self._end(noisy_sum)

    def abandon(self) -> None:
        """The round is over without a sum; weights and optimizer state stay as they were."""
        self._end(RoundAbandoned("the round was abandoned"))

    def _end(self, answer: Vector | RoundAbandoned | None) -> None:
        self.trip.answer(answer)
        assert self._thread is not None
        self._thread.join()
        self.trip.check()

    def _step(self, chunks: Sequence[tuple[Vector, Vector]]) -> None:
        self._module.train()
        self.optimizer.zero_grad()
        for i, (records, outcomes) in enumerate(chunks):
            x = torch.from_numpy(records).to(self._device)  # (B, features)
            y = torch.from_numpy(outcomes).to(self._device)  # (B,)
            prediction = self._module(x)
            if prediction.shape != y.shape:
                raise StudyError(
                    f"the model's output has shape {tuple(prediction.shape)}", hint="one number a patient was expected"
                )
            self._criterion(prediction, y).backward()
            self.optimizer.signal_skip_step(do_skip=i + 1 < len(chunks))
            self.optimizer.step()
            if i + 1 < len(chunks):
                self.optimizer.zero_grad()
