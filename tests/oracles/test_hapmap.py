"""Real genotypes of 1000 Genomes through the reader: what bed-reader reads, in five hospitals that can be frozen."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import bed_reader
import numpy as np
import pytest

from sequester.client.compute.genome.plink import PlinkFiles

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(os.environ.get("SEQUESTER_DATA", str(ROOT.parent / "shared/data"))) / "hapmap3_1kg"
pytestmark = pytest.mark.skipif(not SOURCE.exists(), reason="SEQUESTER_DATA has no hapmap3_1kg")


def test_every_real_genotype_is_read_as_bed_reader_reads_it() -> None:
    prefix = SOURCE / "HM3_thinned_autosomal_overlap"
    counts = PlinkFiles(str(prefix)).counts(range(14079))
    with bed_reader.open_bed(f"{prefix}.bed", count_A1=True) as oracle:
        theirs = oracle.read(dtype="int8", order="F")
    np.testing.assert_array_equal(np.where(counts < 0, -127, counts), theirs)


def test_the_example_writes_five_hospitals_that_carry_every_variant_of_its_study(tmp_path: Path) -> None:
    script = ROOT / "deploy/examples/hapmap/prepare.py"
    subprocess.run([sys.executable, str(script), str(SOURCE), str(tmp_path)], check=True, timeout=60)
    hospitals = sorted(p.parent.name for p in tmp_path.glob("*/genotypes.bed"))
    assert hospitals == ["africa", "america", "east-asia", "europe-north", "europe-south"]
    people = [PlinkFiles(str(tmp_path / name / "genotypes")).samples for name in hospitals]
    assert sum(map(len, people)) == len(set().union(*people)) == 1033
