"""Heterogeneous-stock mice as five hospitals, each a group of families: real genotypes, real phenotypes.

    python deploy/examples/mice/prepare.py mouse_hs1940 OUT

Writes OUT/<hospital>/genotypes.* and phenotypes.csv (share of CD8+ cells, quantile-normalised; mean corpuscular
haemoglobin, MCH), OUT/study.yaml and OUT/panel.json: autosomal variants that are not palindromic, have two alleles and a
frequency of 0.01 or more in the stock, whose frequencies stand for the public ones. Families go to the smallest hospital
so far, largest first. Cite Valdar et al., Nature Genetics 2006;38:879, and GEMMA, whose example data these are (GPL-3+).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from sequester.client.compute.genome.plink import PlinkFiles
from sequester.simulate.plink import Line, write_bed

HOSPITALS = ("ash", "birch", "cedar", "elm", "fir")
LEAST = 0.01


def main() -> None:
    """Write the hospitals."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder with mouse_hs1940.{bed,bim,fam,pheno.txt}")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    prefix = arguments.source / "mouse_hs1940"
    files = PlinkFiles(str(prefix))
    fam = [line.split() for line in prefix.with_suffix(".fam").read_text("utf-8").splitlines()]
    traits = [line.split() for line in Path(f"{prefix}.pheno.txt").read_text("utf-8").splitlines()]
    ids = [line.split()[1] for line in prefix.with_suffix(".bim").read_text("utf-8").splitlines()]
    counts = files.counts(range(len(ids)))
    lines = [
        Line(v.chromosome, name, v.position, v.counted, v.other) for v, name in zip(files.variants, ids, strict=True)
    ]

    families = [row[0] for row in fam]
    sizes = {name: families.count(name) for name in set(families)}
    members: dict[str, list[str]] = {name: [] for name in HOSPITALS}
    for family in sorted(sizes, key=lambda name: (-sizes[name], name)):
        smallest = min(HOSPITALS, key=lambda name: sum(sizes[f] for f in members[name]))
        members[smallest].append(family)
    for hospital, own in members.items():
        rows = [i for i, family in enumerate(families) if family in own]
        folder = arguments.out / hospital
        folder.mkdir(parents=True, exist_ok=True)
        write_bed(folder / "genotypes", [fam[i][1] for i in rows], lines, counts[rows])
        table = ["patient,family,sex,cd8,mch"]
        for i in rows:
            sex = {"1": "male", "2": "female"}.get(fam[i][4], "NA")
            table.append(f"{fam[i][1]},{families[i]},{sex},{traits[i][0]},{traits[i][5]}")
        (folder / "phenotypes.csv").write_text("\n".join(table) + "\n", "utf-8")
        print(f"{hospital}: {len(rows)} mice of {len(own)} families")
    (arguments.out / "panel.json").write_text(json.dumps(_panel(lines, counts)), "utf-8")
    skeleton = Path(__file__).with_name("study.yaml").read_text("utf-8")
    (arguments.out / "study.yaml").write_text(skeleton, "utf-8")


def _panel(lines: list[Line], counts: np.ndarray) -> list[dict[str, str | int]]:
    copies = counts.astype(np.float32)
    copies[copies < 0] = np.nan
    with np.errstate(invalid="ignore"):
        frequency = np.nanmean(copies, axis=0) / 2
    listed, seen = [], set()
    for line, f in zip(lines, frequency, strict=True):
        pair = frozenset((line.counted, line.other))
        here = (line.chromosome, line.position, pair)
        single = all(allele in ("A", "C", "G", "T") for allele in pair) and len(pair) == 2
        if not single or pair in ({"A", "T"}, {"C", "G"}) or not line.chromosome.isdigit() or here in seen:
            continue
        if LEAST <= f <= 1 - LEAST and int(line.chromosome) <= 19 and line.position > 0:
            seen.add(here)
            listed.append({"id": line.id, "chromosome": line.chromosome, "position": line.position,
                           "effect": line.counted, "other": line.other, "frequency": f"{f:.4f}"})  # fmt: skip
    return listed


if __name__ == "__main__":
    main()
