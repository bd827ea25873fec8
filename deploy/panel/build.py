"""The bundled marker panel: which public variants lie where in three builds, how frequent they are, and their loadings.

    python deploy/panel/build.py MARKER_PANEL_FOLDER HAPMAP3_1KG_FOLDER client/sequester/client/compute/genome/panel.tsv.gz

Two tables become one of 37,551 rows. From `marker_panel`: 23,532 variants in GRCh37 and GRCh38 with REF and ALT. From
`hapmap3_1kg`: 14,079 variants in NCBI36 and GRCh37 (its two .bim files joined by rs id, here and nowhere else), ALT
frequencies of the labelled people of 1000 Genomes phase 1 and of the HapMap 3 people who are not among them, and
principal component loadings of the 1,092 people of phase 1. The same input writes the same bytes.
"""

from __future__ import annotations

import argparse
import csv
import gzip
from pathlib import Path

import numpy as np

from sequester.client.compute.genome.plink import PlinkFiles

OLD = "HM3_thinned_autosomal_overlap"
NEW = "1kg.ref.phase1_release_v3.20101123_thinned_autosomal_overlap"
POPULATIONS = ("AFR", "AMR", "EAS", "EUR", "SAS")
COMPONENTS = 4
HEADER = """\
# Sequester marker panel, version 1. Positions, alleles and frequencies are public facts.
# Positions in GRCh37 and GRCh38 with REF and ALT: from the site lists of peddy 0.4.8, (c) 2016 Brent Pedersen, MIT licence.
# Positions in NCBI36, frequencies and loadings: computed from open-access genotypes of the International HapMap Project
# (HapMap 3) and the 1000 Genomes Project (phase 1), as thinned by the authors of flashpca. Cite: International HapMap 3
# Consortium, Nature 467:52-58 (2010); 1000 Genomes Project Consortium, Nature 491:56-65 (2012).
# ref_known: 1 where REF is the reference genome's base; 0 where it is A2 of a PLINK file, by convention.
# af_*: frequency of ALT among labelled people. af: among the 1,092, the one the loadings are standardised by.
# A person's component k: sum over rows of pc_k (dosage - 2 af) / sqrt(2 af (1 - af)), missing 0, over pc_shrinkage_k.
"""


def bim(path: Path) -> list[list[str]]:
    """Chromosome, id, position, A1, A2 of each row."""
    fields = (line.split() for line in path.read_text("utf-8").splitlines())
    return [[f[0], f[1], f[3], f[4], f[5]] for f in fields]


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("markers", type=Path)
    parser.add_argument("genotypes", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    rows = markers(arguments.markers / "panel.tsv")
    shrinkage = genotyped(arguments.genotypes, rows)
    names = ["chromosome", "NCBI36", "GRCh37", "GRCh38", "ref", "alt", "ref_known", "id", "af"]
    names += [f"af_{p}" for p in POPULATIONS] + [f"pc{k + 1}" for k in range(COMPONENTS)]
    text = HEADER + "# pc_shrinkage=" + ",".join(f"{s:.3f}" for s in shrinkage) + "\n"
    text += "\t".join(names) + "\n"
    order = sorted(rows, key=lambda key: (int(key[0]), key[1], rows[key]["alt"]))
    text += "".join("\t".join(rows[key].get(name, "") for name in names) + "\n" for key in order)
    with arguments.out.open("wb") as raw, gzip.GzipFile("", "wb", 9, raw, mtime=0) as file:
        file.write(text.encode())
    print(f"{len(rows)} rows, {arguments.out.stat().st_size} bytes")


def markers(path: Path) -> dict[tuple[str, int], dict[str, str]]:
    """The rows of `marker_panel` by chromosome and GRCh37 position."""
    with path.open(encoding="utf-8", newline="") as file:
        return {
            (line["chromosome"], int(line["position_grch37"])): {
                "chromosome": line["chromosome"], "GRCh37": line["position_grch37"], "GRCh38": line["position_grch38"],
                "ref": line["ref"], "alt": line["alt"], "ref_known": "1",
            }
            for line in csv.DictReader(file, delimiter="\t")
        }  # fmt: skip


def genotyped(folder: Path, rows: dict[tuple[str, int], dict[str, str]]) -> np.ndarray:
    """Add the 14,079 with their NCBI36 positions, frequencies and loadings; the shrinkage of each component comes back."""
    new, old = bim(folder / f"{NEW}.bim"), bim(folder / f"{OLD}.bim")
    place = {line[1]: i for i, line in enumerate(old)}
    people_new, people_old = PlinkFiles(str(folder / NEW)), PlinkFiles(str(folder / OLD))
    g_new = people_new.counts(range(len(new)))  # (people, variants), copies of A1
    g_old = people_old.counts([place[line[1]] for line in new])
    with (folder / "sample_labels.csv").open(encoding="utf-8", newline="") as file:
        label = {(line["dataset"], line["iid"]): line["superpopulation"] for line in csv.DictReader(file)}
    known = set(people_new.samples)
    group = [label.get(("1kg", s), "") for s in people_new.samples]
    group += [label[("HM3", s)] if s not in known else "" for s in people_old.samples]
    both = np.vstack([g_new, g_old])
    frequency = {p: mean(both[[g == p for g in group]]) for p in POPULATIONS}
    af = mean(g_new)
    x = standardised(g_new, af)
    loadings = components(x)
    half = np.random.default_rng(1).permutation(len(x)) < len(x) // 2
    of_half = components(x[half])
    shrinkage = (x[~half] @ of_half).std(axis=0) / (x[half] @ of_half).std(axis=0)
    for j, (chromosome, name, position, a1, a2) in enumerate(new):
        key = (chromosome, int(position))
        before = old[place[name]]
        if (before[0], before[3:]) != (chromosome, [a1, a2]):
            raise SystemExit(f"{name}: the two .bim files disagree about its chromosome or alleles")
        row = rows.setdefault(
            key, {"chromosome": chromosome, "GRCh37": position, "ref": a2, "alt": a1, "ref_known": "0"}
        )
        if {row["ref"], row["alt"]} != {a1, a2}:
            raise SystemExit(f"{name}: alleles {a1}/{a2} here, {row['ref']}/{row['alt']} in the marker panel")
        turned = row["alt"] != a1
        row["NCBI36"], row["id"] = before[2], name
        row["af"] = f"{1 - af[j] if turned else af[j]:.4f}"
        for p in POPULATIONS:
            row[f"af_{p}"] = f"{1 - frequency[p][j] if turned else frequency[p][j]:.4f}"
        for k in range(COMPONENTS):
            row[f"pc{k + 1}"] = f"{-loadings[j, k] if turned else loadings[j, k]:.4g}"
    return shrinkage


def mean(counts: np.ndarray) -> np.ndarray:
    """Frequency of the counted allele, missing left out."""
    called = counts >= 0
    return np.where(called, counts, 0).sum(axis=0) / (2 * called.sum(axis=0))


def standardised(counts: np.ndarray, af: np.ndarray) -> np.ndarray:
    """(g - 2 f) / sqrt(2 f (1 - f)), 0 where missing or monomorphic."""
    spread = np.sqrt(2 * af * (1 - af))
    x = np.where(counts < 0, 0.0, counts - 2 * af)
    return np.divide(x, spread, out=np.zeros_like(x), where=spread > 0)


def components(x: np.ndarray) -> np.ndarray:
    """Unit loadings (variants, COMPONENTS) of the largest components; the largest loading of each is positive."""
    _, vectors = np.linalg.eigh(x @ x.T)
    loadings = x.T @ vectors[:, ::-1][:, :COMPONENTS]
    loadings /= np.linalg.norm(loadings, axis=0)
    return loadings * np.sign(loadings[np.abs(loadings).argmax(axis=0), range(COMPONENTS)])


if __name__ == "__main__":
    main()
