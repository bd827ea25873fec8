"""Opacus with its noise taken out: `add_noise()` is the trip through the gate, and back with the opened sum, or without.

Opacus computes and clips the gradient of each patient. Where it would draw noise from torch, the step's vector leaves
for the gate, which quantises, adds exact integer noise and masks. Only flat clipping of a sum, in modes hooks and ghost,
passes (spec/privacy.md, 3.3).
"""

from __future__ import annotations

import threading
import warnings
from queue import Queue
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from opacus import PrivacyEngine
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.optimizers.optimizer import _check_processed_flag, _mark_as_processed

from sequester.protocols.errors import RoundAbandoned, SiteError, StudyError

Vector = NDArray[np.float64]


class Trip:
    """One round's vector on its way out of the worker thread, and the answer on its way back in."""

    def __init__(self) -> None:
        self._out: Queue[Vector | BaseException] = Queue(1)
        self._back: Queue[Vector | RoundAbandoned | None] = Queue(1)
        self.made = 0

    def go(self, vector: Vector) -> Vector | None:
        """From the worker thread: hand the vector out and wait; the opened noisy sum, or None to skip the step."""
        self.made += 1
        self._out.put(vector)
        answer = self._back.get()
        if isinstance(answer, RoundAbandoned):
            raise answer
        return answer

    def fail(self, error: BaseException) -> None:
        """From the worker thread: it ended before it came here."""
        self._out.put(error)

    def vector(self) -> Vector:
        """The vector, once the worker thread has it; raises what the thread raised."""
        arrived = self._out.get()
        if isinstance(arrived, BaseException):
            raise arrived
        return arrived

    def check(self) -> None:
        """Raise what went wrong after the trip, if anything did."""
        if not self._out.empty():
            self.vector()

    def answer(self, noisy: Vector | RoundAbandoned | None) -> None:
        """Let the worker thread go on."""
        self._back.put(noisy)


class _ThroughTheGate:
    """For an Opacus optimizer: no noise of its own."""

    trip: Trip
    params: list[Any]  # torch parameters; Opacus hangs `summed_grad` on each

    def add_noise(self) -> None:
        """Send the clipped sum on its trip; what comes back becomes `p.grad`, or nothing does."""
        parts = []
        for p in self.params:
            _check_processed_flag(p.summed_grad)
            parts.append(p.summed_grad.detach().to("cpu", torch.float64).reshape(-1).numpy())
        vector = np.concatenate(parts)
        if not np.isfinite(vector).all():
            raise SiteError("a gradient is not finite after clamping: a fault of the code, nothing was sent")
        try:
            noisy = self.trip.go(vector)
        except RoundAbandoned:
            for p in self.params:  # no un-noised sum outlives its round
                p.grad = p.summed_grad = None
            raise
        at = 0
        for p in self.params:
            p.grad = None  # ghost left the sum without noise here
            if noisy is not None:
                p.grad = torch.from_numpy(noisy[at : at + p.numel()].copy()).reshape(p.shape).to(p)
            at += p.numel()
            _mark_as_processed(p.summed_grad)


class HooksOptimizer(_ThroughTheGate, DPOptimizer):  # type: ignore[misc]  # Opacus ships no types
    """Per-patient gradients held one by one, clipped, added."""


class GhostOptimizer(_ThroughTheGate, DPOptimizerFastGradientClipping):  # type: ignore[misc]
    """Norms of per-patient gradients first, the clipped sum in a second backward pass."""


OPTIMIZERS = {"hooks": HooksOptimizer, "ghost": GhostOptimizer}


class GateEngine(PrivacyEngine):  # type: ignore[misc]
    """Opacus' engine whose optimizers release through the gate alone."""

    def __init__(self, trip: Trip) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Secure RNG turned off")  # torch draws nothing here
            super().__init__(accountant="rdp")
        self._trip = trip

    def _prepare_optimizer(
        self,
        *,
        optimizer: torch.optim.Optimizer,
        noise_multiplier: float,
        max_grad_norm: float | list[float],
        expected_batch_size: int | None,
        loss_reduction: str = "mean",
        distributed: bool = False,
        clipping: str = "flat",
        noise_generator: Any = None,
        grad_sample_mode: str = "hooks",
        **other: Any,
    ) -> DPOptimizer:
        if clipping != "flat" or isinstance(max_grad_norm, list):
            raise StudyError(f"clipping {clipping} is refused", hint="one flat clipping norm was expected")
        if distributed or loss_reduction != "sum" or noise_generator is not None or other:
            raise StudyError(
                f"loss reduction {loss_reduction}, distributed {distributed}",
                hint="one process and a sum were expected",
            )
        if grad_sample_mode not in OPTIMIZERS:
            raise StudyError(f"gradients by {grad_sample_mode}", hint=f"{' or '.join(OPTIMIZERS)} was expected")
        private = OPTIMIZERS[grad_sample_mode](
            optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            expected_batch_size=None,  # the true number of patients divides nothing
            loss_reduction="sum",
        )
        private.trip = self._trip
        return private


def in_thread(work: Any, trip: Trip) -> threading.Thread:
    """Start `work` in a thread of its own; what it raises on the way arrives where the vector was awaited."""

    def run() -> None:
        try:
            work()
        except RoundAbandoned:
            return
        except BaseException as error:  # handed over, not swallowed: the round's side raises it
            trip.fail(error)

    thread = threading.Thread(target=run, name="training-step", daemon=True)
    thread.start()
    return thread
