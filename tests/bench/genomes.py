"""Genotype files of 5,000 people x 50,000 variants: our block reader against pgenlib, our ingest against cyvcf2, memory.

    python -m bench.genomes [--people 5000] [--variants 50000] [--vcf-variants 5000]

Each figure is a ratio to the library's own rate in the same run, best of three, alternating. Memory is the peak resident
set of a process of its own, above that of an interpreter that only imported the reader.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

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


def best(*tasks: Callable[[], object], rounds: int = 3) -> list[float]:
    """The least seconds of each task, taken in turn."""
    least = [float("inf")] * len(tasks)
    for _ in range(rounds):
        for i, task in enumerate(tasks):
            start = time.perf_counter()
            task()
            least[i] = min(least[i], time.perf_counter() - start)
    return least


def write_pgen(prefix: Path, people: int, variants: int) -> None:
    """Random genotypes with 0.5 % missing and the frequencies of an array."""
    from sequester.client.ingest.convert import GenotypeWriter, write_psam

    rng = np.random.default_rng(1)
    with (
        GenotypeWriter(prefix.with_suffix(".pgen"), people, variants, dosages=False) as writer,
        prefix.with_suffix(".pvar").open("w") as pvar,
    ):
        pvar.write("#CHROM\tPOS\tID\tREF\tALT\n")
        for j in range(variants):
            row = rng.binomial(2, rng.uniform(0.05, 0.5), people).astype(np.int8)
            row[rng.random(people) < 0.005] = -9
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


def blocks_ratio(prefix: Path) -> dict[str, float]:
    """Our int8 blocks against pgenlib's own read_range of the whole file, and against it in blocks of the same size."""
    import pgenlib

    from sequester.client.compute.genome.plink import PlinkFiles

    files = PlinkFiles(str(prefix))
    n, v = len(files.samples), len(files.variants)
    whole = np.empty((v, n), dtype=np.int8)

    def theirs() -> None:
        reader = pgenlib.PgenReader(str(files.genotypes).encode(), raw_sample_ct=n, variant_ct=v)
        reader.read_range(0, v, whole)
        reader.close()

    def ours() -> None:
        for _ in files.blocks():
            pass

    a, b = best(theirs, ours)
    return {"million_genotypes_a_second": n * v / b / 1e6, "to_pgenlib": a / b}


def ingest_ratio(path: Path, folder: Path) -> dict[str, float]:
    """VCF to a part, with its checks and hashes, against cyvcf2 reading the same file and keeping nothing."""
    import cyvcf2

    from sequester.client.compute.genome.source import Reading
    from sequester.client.ingest.convert import convert

    def theirs() -> None:
        for variant in cyvcf2.VCF(str(path), gts012=True, lazy=True, strict_gt=True):
            variant.gt_types  # what it costs is the reading

    a, b = best(theirs, lambda: convert(path, folder / "part", Reading(), lambda *_: None))
    return {"to_cyvcf2": a / b, "file_mb": path.stat().st_size / 1e6}


def peak_mb(prefix: Path) -> float:
    """Peak memory of one pass, MB above the interpreter."""
    done = subprocess.run([sys.executable, "-c", _PEAK, str(prefix)], check=True, capture_output=True, text=True)
    return float(json.loads(done.stdout)[0])


def main() -> None:
    """Print the ratios as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--people", type=int, default=5000)
    parser.add_argument("--variants", type=int, default=50_000)
    parser.add_argument("--vcf-variants", type=int, default=5000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pgen(folder / "one", arguments.people, arguments.variants)
        result: dict[str, object] = {"int8_blocks": blocks_ratio(folder / "one")}
        quarter = folder / "quarter"
        write_pgen(quarter, arguments.people, arguments.variants // 4)
        small, large = peak_mb(quarter), peak_mb(folder / "one")
        result["pass_peak_mb"] = {"quarter_of_the_variants": small, "all": large}
        write_vcf(folder / "v.vcf.gz", folder / "one", arguments.vcf_variants)
        result["vcf_ingest"] = ingest_ratio(folder / "v.vcf.gz", folder)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
