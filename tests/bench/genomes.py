"""Genotypes: a clipped-gradient pass and a score vector against pgenlib's own read, a scan against PLINK 2, readers, memory.

Figures: genotype_pass_limit, scan_vs_plink2; and reported: our block reader to pgenlib, our VCF ingest to cyvcf2. The peers
are libraries of the product (pgenlib, cyvcf2) and the plink2 of the path. A pass is a frozen store's round as compute
answers it: int8 dosages from disk once, forward and transposed product in float64, missing calls at the public mean.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from bench import store
from bench.frame import Bench, interleaved, timed
from sequester.client.compute.cohort import StoredCohort

_PEAK = """
import json, sys
import numpy as np, pgenlib
from sequester.client.compute.genome.plink import PlinkFiles
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak()
total = 0
for _, block in PlinkFiles(sys.argv[1]).blocks():
    total += int((block == 1).sum())
print(json.dumps([(peak() - before) / 1024, total]))
"""


def write_pgen(prefix: Path, dosage: Any) -> None:
    """The genotypes of a store, int8 (patients, variants), as PLINK 2 files."""
    from sequester.client.ingest.convert import GenotypeWriter, write_psam

    people, variants = dosage.shape
    with (
        GenotypeWriter(prefix.with_suffix(".pgen"), people, variants, dosages=False) as writer,
        prefix.with_suffix(".pvar").open("w") as pvar,
    ):
        pvar.write("#CHROM\tPOS\tID\tREF\tALT\n")
        for first in range(0, variants, 1000):
            for j, row in enumerate(np.ascontiguousarray(dosage[:, first : first + 1000].T), first):
                writer.add(row)
                pvar.write(f"{1 + j * 22 // variants}\t{1000 + j}\tv{j}\tA\tG\n")
    write_psam(prefix.with_suffix(".psam"), [f"p{i}" for i in range(people)], [0] * people)


def write_vcf(path: Path, prefix: Path, variants: int) -> None:
    """The first variants of a .pgen as VCF, bgzip-compressed."""
    from genome.files import HEADER, bgzip
    from sequester.client.compute.genome.plink import PlinkFiles

    files = PlinkFiles(str(prefix))
    calls = np.array(["0/0", "0/1", "1/1", "./."])
    lines = [HEADER + "#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\tFORMAT\t" + "\t".join(files.samples) + "\n"]
    for entries, block in files.blocks(np.arange(variants), 512):
        for j, row in zip(entries.tolist(), block, strict=True):
            v = files.variants[j]
            cells = "\t".join(calls[np.where(row < 0, 3, row)])
            lines.append(f"{v.chromosome}\t{v.position}\t{v.id}\tA\tG\t.\tPASS\t.\tGT\t{cells}\n")
    path.write_bytes(bgzip("".join(lines).encode(), 65_000))


class Pgenlib:
    """pgenlib's read of a whole file as int8, into an array it is given."""

    def __init__(self, prefix: Path, people: int, variants: int) -> None:
        self.path, self.people, self.variants = str(prefix.with_suffix(".pgen")).encode(), people, variants
        self.whole = np.empty((variants, people), dtype=np.int8)

    def read(self) -> None:
        """Every genotype."""
        import pgenlib

        reader = pgenlib.PgenReader(self.path, raw_sample_ct=self.people, variant_ct=self.variants)
        reader.read_range(0, self.variants, self.whole)
        reader.close()


def passes(bench: Bench, folder: Path, prefix: Path, people: int, variants: int) -> None:
    """A later round of a model (forward and transpose), and a one-shot score vector; the norms were frozen before."""
    peer = Pgenlib(prefix, people, variants)
    tasks = {"pgenlib": lambda: timed(peer.read)}
    for recipe in ("gradient", "one-shot"):
        study = store.study(variants, {"gradients": "closed", "recipe": recipe, "clip": "0.3"})
        if recipe == "gradient":  # once a cohort, when it is frozen
            frozen_s = timed(lambda of=study: store.with_constants(folder, of))  # type: ignore[misc]
        plan: Any = study.analyses[0]
        cohort = StoredCohort(folder, study)
        weights = {"head.weight": np.zeros((1, variants + 1))}
        if recipe == "gradient":
            weights["head.weight"][:] = np.random.default_rng(3).standard_normal(variants + 1) * 0.1
        cohort.gradient(plan, weights)

        tasks[recipe] = lambda cohort=cohort, plan=plan, weights=weights: timed(lambda: cohort.gradient(plan, weights))
    taken = interleaved(tasks, 3 if bench.quick else 7)
    cell = f"{people} x {variants}"
    for recipe, least in (("gradient", 0.3), ("one-shot", 0.6)):
        bench.compared("genotype_pass_limit", f"{cell} {recipe}", taken[recipe], taken["pgenlib"], at_least=least)
    note = "reported: once, when a cohort is frozen; norms and missing calls, written and hashed"
    bench.reported("record_constants", cell, frozen_s, unit="s", note=note)


def scan(bench: Bench, folder: Path, people: int, variants: int, sites: int = 5) -> None:
    """Wall time of a whole exact scan over five hospitals in one process, and of plink2 over all of them pooled."""
    if shutil.which("plink2") is None:
        bench.absent("scan_vs_plink2", "", "no plink2 on the path")
        return
    import plain_loop
    from oracles.test_association import study_of
    from sequester.simulate.plink import Line, write_bed

    rng = np.random.default_rng(1)
    frequency = rng.uniform(0.01, 0.5, variants)
    counts = np.empty((people, variants), dtype=np.int8)
    for first in range(0, variants, 1000):
        counts[:, first : first + 1000] = rng.binomial(
            2, frequency[first : first + 1000], (people, min(1000, variants - first))
        )
    x = rng.standard_normal((people, 2))
    y = (rng.random(people) < 1 / (1 + np.exp(2 - x @ [0.4, -0.3] - 0.3 * counts[:, 0]))).astype(float)
    names = [f"p{i}" for i in range(people)]
    write_bed(folder / "g", names, [Line("1", f"v{j}", 1000 + j, "A", "G") for j in range(variants)], counts)
    (folder / "y.txt").write_text("#IID\ty\n" + "".join(f"p{i}\t{int(y[i]) + 1}\n" for i in range(people)))
    rows = "".join(f"p{i}\t{x[i, 0]:.17g}\t{x[i, 1]:.17g}\n" for i in range(people))
    (folder / "c.txt").write_text("#IID\tc0\tc1\n" + rows)

    def plink2(command: str) -> None:
        words = [*command.split(), "--threads", "1"]
        subprocess.run(["plink2", *words], cwd=folder, check=True, capture_output=True)

    plink2("--bfile g --make-pgen --out g")
    study = study_of(variants)
    cohorts = []
    for site, part in enumerate(np.array_split(np.arange(people), sites)):
        place = store.written(folder / f"site{site}", counts[part], x[part], y[part])
        cohorts.append(StoredCohort(place, study))
    del counts
    glm = "--pfile g --pheno y.txt --covar c.txt --covar-variance-standardize --glm no-firth hide-covar --out o"
    tasks = {
        "plink2": lambda: timed(lambda: plink2(glm)),
        "ours": lambda: timed(lambda: plain_loop.run(study, cohorts, fixed_point=True)),
    }
    taken = interleaved(tasks, 1 if bench.quick else 3, 0.1)
    cell = f"{people} x {variants}, {sites} sites"
    bench.compared("scan_vs_plink2", cell, taken["ours"], taken["plink2"], at_least=0.33)


def readers(bench: Bench, prefix: Path, folder: Path, people: int, variants: int, vcf_variants: int) -> None:
    """Our int8 blocks against one whole read by pgenlib; VCF to a checked part against cyvcf2 that keeps nothing."""
    import cyvcf2

    from sequester.client.compute.genome.plink import PlinkFiles
    from sequester.client.compute.genome.source import Reading
    from sequester.client.ingest.convert import convert

    peer, files = Pgenlib(prefix, people, variants), PlinkFiles(str(prefix))
    tasks = {"pgenlib": lambda: timed(peer.read), "ours": lambda: timed(lambda: [None for _ in files.blocks()])}
    taken = interleaved(tasks, 3)
    cell = f"{people} x {variants}"
    bench.compared("int8_blocks_vs_pgenlib", cell, taken["ours"], taken["pgenlib"], note="reported: with our checks")
    path = folder / "v.vcf.gz"
    write_vcf(path, prefix, vcf_variants)
    tasks = {
        "cyvcf2": lambda: timed(
            lambda: [v.gt_types for v in cyvcf2.VCF(str(path), gts012=True, lazy=True, strict_gt=True)]
        ),
        "ours": lambda: timed(lambda: convert(path, folder / "part", Reading(), lambda *_: None)),
    }
    taken = interleaved(tasks, 3, 0.1)
    cell = f"{people} x {vcf_variants}"
    bench.compared(
        "vcf_ingest_vs_cyvcf2", cell, taken["ours"], taken["cyvcf2"], note="reported: checks, hashes, writing"
    )


def peak_mb(prefix: Path) -> float:
    """Peak memory of one pass, MB above the interpreter."""
    done = subprocess.run([sys.executable, "-c", _PEAK, str(prefix)], check=True, capture_output=True, text=True)
    return float(json.loads(done.stdout)[0])


def run(bench: Bench) -> None:
    """5,000 people by 50,000 variants; quick: 1,000 by 20,000."""
    people, variants = (1_000, 20_000) if bench.quick else (5_000, 50_000)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        place = store.frozen(folder / "store", people, variants)
        prefix = folder / "one"
        write_pgen(prefix, np.load(place / "dosage.npy", mmap_mode="r"))
        passes(bench, place, prefix, people, variants)
        if not bench.quick:
            readers(bench, prefix, folder, people, variants, 2_000)
            quarter = folder / "quarter"
            write_pgen(quarter, np.load(place / "dosage.npy", mmap_mode="r")[:, : variants // 4])
            for label, of in (("a quarter of the variants", quarter), ("all variants", prefix)):
                bench.reported("read_peak_memory", f"{people} people, {label}", peak_mb(of), unit="MB")
        (folder / "scan").mkdir()
        scan(bench, folder / "scan", people, variants if not bench.quick else 5_000)
