"""The public reference: people whose genotypes anyone may have, with the population each is counted to.

Components are those of the marker panel's loadings, for reference and hospital over the same variants. People outside the
panel's own come out too small, so theirs are divided by the panel's shrinkage; components below 0.8 of it are not used.
"""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sequester.client.compute.genome.harmonise import Wanted, match, oriented
from sequester.client.compute.genome.panel import Build, Panel
from sequester.client.compute.genome.plink import PlinkFiles
from sequester.client.config import ScoringSection
from sequester.protocols.errors import SiteError

SHRINKAGE, LOADINGS, NEIGHBOURS, CERTAIN = 0.8, 0.75, 10, 0.9
MOST_COMPONENTS = 4


@dataclass(frozen=True, slots=True)
class Reference:
    """Files of the reference, its build, and each person's population, empty where unlabelled."""

    files: PlinkFiles
    build: Build
    population: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Ancestry:
    """float64 (people, components) of hospital and reference; `similar`: most similar population, and its probability."""

    pcs: NDArray[np.float64]
    reference_pcs: NDArray[np.float64]
    similar: tuple[str, ...]
    probability: NDArray[np.float64]


def open_reference(settings: ScoringSection) -> Reference | None:
    """The reference that site.toml names, None where it names none."""
    if settings.reference is None:
        return None
    if settings.reference_labels is None:
        raise SiteError(
            "the scoring reference has no labels", hint="`reference_labels` under [scoring]: CSV iid,superpopulation"
        )
    files = PlinkFiles(settings.reference)
    path = Path(settings.reference_labels)
    try:
        reader = csv.DictReader(io.StringIO(path.read_text("utf-8-sig")))
    except (OSError, UnicodeDecodeError):
        raise SiteError(f"{path} cannot be read", hint="CSV with columns iid and superpopulation") from None
    if not {"iid", "superpopulation"} <= set(reader.fieldnames or ()):
        raise SiteError(f"{path.name} has no columns iid and superpopulation", hint="one row for each reference person")
    label = {line["iid"]: line["superpopulation"] for line in reader}
    population = tuple(label.get(sample, "") for sample in files.samples)
    if sum(map(bool, population)) < 100:
        raise SiteError("fewer than 100 people of the reference have a label", hint="do the two files belong together?")
    return Reference(files, settings.reference_build, population)


def ancestry(files: PlinkFiles, build: Build, reference: Reference, panel: Panel) -> Ancestry:
    """Components of both, and each patient's most similar population by the 10 nearest labelled reference people."""
    used = [k for k, s in enumerate(panel.shrinkage[:MOST_COMPONENTS]) if s >= SHRINKAGE]
    if not used:
        raise SiteError("the panel has no components that hold outside it", hint="a panel with `pc_shrinkage`")
    rows = np.flatnonzero(~np.isnan(panel.loadings).any(axis=1) & ~np.isnan(panel.mean_frequency))
    here, there = _entries(files, build, panel, rows), _entries(reference.files, reference.build, panel, rows)
    both = (here[0] >= 0) & (there[0] >= 0)
    if both.sum() < LOADINGS * len(rows):
        raise SiteError(
            f"{int(both.sum())} of {len(rows)} variants with loadings are in both the files and the reference",
            hint=f"{LOADINGS:.0%} were expected; a panel with loadings in this build (`--panel` at ingest) helps",
        )
    chosen = rows[both]
    own = _project(files, here[0][both], here[1][both], panel, chosen)[:, used]
    others = _project(reference.files, there[0][both], there[1][both], panel, chosen)[:, used]
    own = own / np.array([panel.shrinkage[k] for k in used])
    labelled = np.array([j for j, p in enumerate(reference.population) if p])
    scale = others.std(axis=0)
    similar, probability = [], []
    for person in own:
        distance = (((others[labelled] - person) / scale) ** 2).sum(axis=1)
        near = [reference.population[labelled[i]] for i in np.argsort(distance, kind="stable")[:NEIGHBOURS]]
        best = max(sorted(set(near)), key=near.count)
        similar.append(best)
        probability.append(near.count(best) / NEIGHBOURS)
    return Ancestry(own, others, tuple(similar), np.array(probability))


def _entries(
    files: PlinkFiles, build: Build, panel: Panel, rows: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    wanted = Wanted(
        panel.code[rows], panel.position[build][rows], [panel.alt[r] for r in rows], [panel.ref[r] for r in rows]
    )
    found = match(wanted, files.variants)
    return np.array(found.row, dtype=np.int64), np.array(found.swapped, dtype=bool)


def _project(
    files: PlinkFiles, entry: NDArray[np.int64], swapped: NDArray[np.bool_], panel: Panel, rows: NDArray[np.int64]
) -> NDArray[np.float64]:
    """(people, components): sum of loading (g - 2f) / sqrt(2f(1 - f)), missing 0."""
    order = np.argsort(entry, kind="stable")
    out = np.zeros((len(files.samples), panel.loadings.shape[1]))
    start = 0
    for _, block in files.blocks(entry[order], hard_calls=not files.has_dosages):
        of = order[start : start + len(block)]
        start += len(block)
        f = panel.mean_frequency[rows[of]].astype(np.float64)
        x = np.array([oriented(g, bool(swapped[j])) for g, j in zip(block, of, strict=True)], dtype=np.float64)
        missing = x < 0
        spread = np.sqrt(2 * f * (1 - f))
        x = np.where(
            missing | (spread == 0)[:, None], 0.0, (x - 2 * f[:, None]) / np.where(spread == 0, 1, spread)[:, None]
        )
        out += x.T @ panel.loadings[rows[of]].astype(np.float64)
    return out
