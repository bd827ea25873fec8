"""The 1000 Genomes phase 1 people as five hospitals by region, with simulated traits: real genotypes, real ancestry.

    python deploy/examples/hapmap/prepare.py hapmap3_1kg OUT [--panel 940]

Writes OUT/<hospital>/genotypes.* and phenotypes.csv, OUT/study.yaml with twelve known loci, OUT/panel.json with those and
`--panel` more variants, and OUT/truth/effects.csv, which no hospital reads. A trait (`case`), a time to an event
(`years`, `died`) and a count (`visits`) follow from the loci, age and sex. Public frequencies are those of HapMap 3,
matched by name and alleles.
Cite the International HapMap Consortium and the 1000 Genomes Project.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

import numpy as np

from sequester.client.compute.genome.plink import PlinkFiles
from sequester.simulate.plink import Line, write_bed

PANEL = "HM3_thinned_autosomal_overlap"
PEOPLE = "1kg.ref.phase1_release_v3.20101123_thinned_autosomal_overlap"
HOSPITALS = {
    "africa": ("YRI", "LWK", "ASW"),
    "america": ("MXL", "CLM", "PUR"),
    "east-asia": ("CHB", "CHS", "JPT"),
    "europe-north": ("CEU", "GBR", "FIN"),
    "europe-south": ("TSI", "IBS"),
}
LOCI, EFFECT, PREVALENCE = 12, 0.35, 0.3
AGE, AGE_SD, PER_YEAR, WOMEN = 57.0, 8.0, 0.03, 0.3  # what age and sex do to the liability
VISITS = 2.0  # mean of a Poisson count at no risk
RATE, SHAPE, END = 0.03, 1.5, 12.0  # of a Weibull time to the event, in years


def names(prefix: Path) -> list[str]:
    """The variant ids of a .bim file, in order."""
    return [line.split()[1] for line in prefix.with_name(prefix.name + ".bim").read_text("utf-8").splitlines()]


def main() -> None:
    """Write the hospitals; the seed is fixed, so the trait is the same each time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder with the .bed/.bim/.fam files and sample_labels.csv")
    parser.add_argument("out", type=Path)
    parser.add_argument("--panel", type=int, default=940, help="variants beside the known loci")
    arguments = parser.parse_args()
    rng = np.random.default_rng(1)
    panel, people = (PlinkFiles(str(arguments.source / name)) for name in (PANEL, PEOPLE))
    ids = names(arguments.source / PEOPLE)
    panel_row = {name: i for i, name in enumerate(names(arguments.source / PANEL))}
    with (arguments.source / "sample_labels.csv").open(encoding="utf-8", newline="") as file:
        label = {row["iid"]: row["population"] for row in csv.DictReader(file) if row["dataset"] == "1kg"}

    counts = people.counts(range(len(people.variants)))
    frequency = np.full(len(ids), np.nan)
    of_panel = panel.counts(range(len(panel.variants))).astype(np.float32)
    of_panel[of_panel < 0] = np.nan
    panel_frequency = np.nanmean(of_panel, axis=0) / 2
    for j, name in enumerate(ids):
        there = panel.variants[panel_row[name]] if name in panel_row else None
        if there is not None and (there.counted, there.other) == (people.variants[j].counted, people.variants[j].other):
            frequency[j] = panel_frequency[panel_row[name]]
    palindromic = np.array([{v.counted, v.other} in ({"A", "T"}, {"C", "G"}) for v in people.variants])
    fit = np.flatnonzero((frequency > 0.2) & (frequency < 0.8) & ~palindromic)
    chosen = np.sort(rng.choice(fit, LOCI, replace=False))
    effects = rng.choice((-1.0, 1.0), LOCI) * EFFECT
    dosage = np.where(counts[:, chosen] < 0, 2 * frequency[chosen], counts[:, chosen])
    n = len(people.samples)
    noise = rng.standard_normal(n)
    age, sex = np.clip(np.rint(rng.normal(AGE, AGE_SD, n)), 40, 75).astype(int), rng.integers(0, 2, n)
    risk = (dosage - 2 * frequency[chosen]) @ effects + PER_YEAR * (age - AGE) + WOMEN * (sex - 0.5)
    case = (risk + noise > np.quantile(risk + noise, 1 - PREVALENCE)).astype(int)
    time = (rng.exponential(size=n) / (RATE * np.exp(risk))) ** (1 / SHAPE)
    until = np.minimum(rng.uniform(2, 15, n), END)
    years, died = np.minimum(time, until), (time <= until).astype(int)
    visits = np.random.default_rng(2).poisson(VISITS * np.exp(0.5 * risk))
    common = np.flatnonzero((frequency > 0.05) & (frequency < 0.95) & ~palindromic)
    others = np.setdiff1d(common, chosen)
    panel_rows = np.sort(np.append(chosen, rng.choice(others, min(arguments.panel, len(others)), replace=False)))

    lines = [Line(v.chromosome, ids[j], v.position, v.counted, v.other) for j, v in enumerate(people.variants)]
    for hospital, populations in HOSPITALS.items():
        rows = [i for i, sample in enumerate(people.samples) if label.get(sample) in populations]
        folder = arguments.out / hospital
        folder.mkdir(parents=True, exist_ok=True)
        write_bed(folder / "genotypes", [people.samples[i] for i in rows], lines, counts[rows])
        table = ["patient,case,age,sex,years,died,visits,population"]
        for i in rows:
            cells = (
                people.samples[i],
                case[i],
                age[i],
                ("men", "women")[sex[i]],
                f"{years[i]:.2f}",
                died[i],
                visits[i],
            )
            table.append(",".join(str(cell) for cell in (*cells, label[people.samples[i]])))
        (folder / "phenotypes.csv").write_text("\n".join(table) + "\n", "utf-8")
        print(f"{hospital}: {len(rows)} people")
    listed = [_variant(lines[j], frequency[j]) for j in panel_rows]
    known = {ids[j] for j in chosen}
    (arguments.out / "panel.json").write_text(json.dumps(listed), "utf-8")
    text = Path(__file__).with_name("study.yaml").read_text("utf-8") + "variants:\n"
    for row in listed:
        text += f"  - {json.dumps(row)}\n" if row["id"] in known else ""  # JSON is YAML too
    (arguments.out / "study.yaml").write_text(text, "utf-8")
    (arguments.out / "truth").mkdir(exist_ok=True)
    truth = ["variant,effect"] + [f"{ids[j]},{effect}" for j, effect in zip(chosen, effects, strict=True)]
    (arguments.out / "truth/effects.csv").write_text("\n".join(truth) + "\n", "utf-8")


def _variant(line: Line, frequency: float) -> dict[str, str | int]:
    return {
        "id": line.id, "chromosome": line.chromosome, "position": line.position, "effect": line.counted,
        "other": line.other, "frequency": f"{frequency:.4f}",
    }  # fmt: skip


if __name__ == "__main__":
    main()
