"""The contract of an analysis: a contribution at the site, a combination at the exchange, a secure sum between.

    contribution(plan, study, cohort, broadcast, step) -> named arrays              at the site, in compute
    combine(plan, study, state, sums, step)            -> Next | Finished           at the exchange

Both are pure, numpy only. The exchange owns the state (journalled after each closed round) and broadcasts what the
sites need; the SHA-256 of the broadcast stands in the task that every site signs for. A new analysis is a new file
with one `Analysis` object, an oracle test, and a line in `registry.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from sequester.protocols.errors import SiteError

if TYPE_CHECKING:
    from sequester.protocols.analyses.cohort import Cohort, Result
    from sequester.protocols.study import Study

State = dict[str, NDArray[Any]]
Broadcast = dict[str, NDArray[Any]]
Sums = dict[str, NDArray[np.float64]]


@dataclass(frozen=True, slots=True)
class Layout:
    """Names and shapes of one contribution, in order, followed by `padding` coordinates that are zero at every site.

    The padding carries noise and nothing else: the exchange checks the noise scale on it (spec/privacy.md, section 8).
    """

    fields: tuple[tuple[str, tuple[int, ...]], ...]
    padding: int = 0

    @property
    def coordinates(self) -> int:
        """Numbers that are computed from patients."""
        return sum(int(np.prod(shape)) for _, shape in self.fields)

    @property
    def length(self) -> int:
        """Coordinates and padding together."""
        return self.coordinates + self.padding

    def digest(self) -> bytes:
        """SHA-256 over names, shapes, order and padding."""
        text = ";".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in self.fields) + f"|{self.padding}"
        return hashlib.sha256(b"sequester-layout/v1/" + text.encode()).digest()

    def flatten(self, arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.float64]:
        """One float64 vector (length,), zeros at the end; other names, shapes or a value that is not finite: `SiteError`."""
        if set(arrays) != {name for name, _ in self.fields}:
            raise SiteError(f"the contribution names {sorted(arrays)}, the plan {[name for name, _ in self.fields]}")
        vector = np.zeros(self.length, dtype=np.float64)
        at = 0
        for name, shape in self.fields:
            part = np.asarray(arrays[name], dtype=np.float64)
            if part.shape != shape:
                raise SiteError(f"contribution {name} has shape {part.shape}, the plan says {shape}")
            vector[at : at + part.size] = part.reshape(-1)
            at += part.size
        if not np.isfinite(vector).all():
            raise SiteError("a contribution is not finite after clamping: a fault of the code, nothing was sent")
        return vector

    def split(self, vector: NDArray[np.float64]) -> Sums:
        """The named arrays of an opened sum; the padding is left out."""
        if vector.shape != (self.length,):
            raise ValueError(f"a sum of shape {vector.shape}, the layout has length {self.length}")
        sums: Sums = {}
        at = 0
        for name, shape in self.fields:
            size = int(np.prod(shape))
            sums[name] = vector[at : at + size].reshape(shape)
            at += size
        return sums


@dataclass(frozen=True, slots=True)
class Next:
    """Go on: the state to journal and what the sites get for the next step."""

    state: State
    broadcast: Broadcast


@dataclass(frozen=True, slots=True)
class Finished:
    """Done: what the report prints (JSON values only) and what later analyses of the study may build on."""

    result: Result
    state: State


class Analysis(Protocol):
    """One kind of analysis. `plan` is its pydantic model, one of the study's `analyses`."""

    kind: str

    def rounds(self, plan: Any, study: Study) -> int:
        """The most rounds it takes, T: what the sites reserve is T + R charges."""
        ...

    def layout(self, plan: Any, study: Study, step: int) -> Layout:
        """Names and shapes of the contribution of this step."""
        ...

    def sensitivity(self, plan: Any, study: Study) -> float:
        """L2 bound on what one patient, added or removed, changes in one contribution, in real units."""
        ...

    def is_iterative(self, plan: Any, study: Study) -> bool:
        """True where the contribution depends on what the exchange broadcast (spec/genomics.md, two modes, rule 3)."""
        ...

    def start(self, plan: Any, study: Study, earlier: Mapping[str, Finished]) -> Next:
        """State and broadcast of step 0; `earlier` are the study's finished analyses by name."""
        ...

    def contribution(self, plan: Any, study: Study, cohort: Cohort, broadcast: Broadcast, step: int) -> Sums:
        """This site's share of the sum, float64, clipped per patient in private mode."""
        ...

    def combine(self, plan: Any, study: Study, state: State, sums: Sums, step: int) -> Next | Finished:
        """The next step or the result, from the opened sums."""
        ...


@runtime_checkable
class Changing(Protocol):
    """An exact analysis whose broadcast has other names or shapes after step 0."""

    def later(self, plan: Any, study: Study, step: int) -> list[Broadcast]:
        """Zeros of the names and shapes that the broadcast of step `step` > 0 may have: one of these."""
        ...
