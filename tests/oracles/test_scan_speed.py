"""5,000 people by 50,000 variants over five hospitals: at most three times PLINK 2's pooled scan, in bounded memory."""

from __future__ import annotations

import shutil
import subprocess
import time
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

import plain_loop
from oracles import table
from oracles.test_association import study_of
from sequester.protocols.analyses.cohort import Columns, Dosages
from sequester.simulate.plink import Line, write_bed

N, V, SITES = 5000, 50_000, 5
pytestmark = [pytest.mark.nightly, pytest.mark.skipif(shutil.which("plink2") is None, reason="no plink2")]


class OnDisk:
    """A hospital's genotypes as a frozen store keeps them: int8, mapped, read a block at a time."""

    def __init__(self, folder: Path, rows: slice, x: np.ndarray, y: np.ndarray) -> None:
        self.counts = np.load(folder / "counts.npy", mmap_mode="r")
        self.rows, self.x, self.y = rows, x[rows], y[rows]

    def columns(self, part: str) -> Columns:
        zeros = np.zeros(len(self.y), dtype=np.int64)
        return Columns(self.x, self.y, zeros, zeros)

    def dosages(self, part: str) -> Iterator[Dosages]:
        for first in range(0, V, 4000):
            yield Dosages(first, self.counts[self.rows, first : first + 4000].astype(np.float64))

    def some(self, part: str, variants: Sequence[int]) -> np.ndarray:
        return self.counts[self.rows][:, list(variants)].astype(np.float64)


def test_a_scan_of_50_000_variants_takes_at_most_three_times_as_long_as_plink2_pooled(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    f = rng.uniform(0.01, 0.5, V)
    counts = np.empty((N, V), dtype=np.int8)
    for first in range(0, V, 1000):
        counts[:, first : first + 1000] = rng.binomial(2, f[first : first + 1000], (N, 1000))
    x = rng.standard_normal((N, 2))
    y = (rng.random(N) < 1 / (1 + np.exp(2 - x @ [0.4, -0.3] - 0.3 * counts[:, 0]))).astype(float)
    write_bed(
        tmp_path / "g", [f"p{i}" for i in range(N)], [Line("1", f"v{j}", 1000 + j, "A", "G") for j in range(V)], counts
    )
    np.save(tmp_path / "counts.npy", counts)
    del counts
    (tmp_path / "y.txt").write_text("#IID\ty\n" + "".join(f"p{i}\t{int(y[i]) + 1}\n" for i in range(N)))
    (tmp_path / "c.txt").write_text(
        "#IID\tc0\tc1\n" + "".join(f"p{i}\t{x[i, 0]:.17g}\t{x[i, 1]:.17g}\n" for i in range(N))
    )
    make = ["plink2", "--bfile", "g", "--make-pgen", "--out", "g", "--threads", "1"]
    subprocess.run(make, cwd=tmp_path, check=True, capture_output=True)
    scan = "plink2 --pfile g --pheno y.txt --covar c.txt --covar-variance-standardize --glm no-firth hide-covar --threads 1"
    began = time.perf_counter()
    subprocess.run([*scan.split(), "--out", "o"], cwd=tmp_path, check=True, capture_output=True)
    theirs = time.perf_counter() - began
    study = study_of(V)
    hospitals = [OnDisk(tmp_path, slice(a, a + N // SITES), x, y) for a in range(0, N, N // SITES)]
    tracemalloc.start()
    began = time.perf_counter()
    result = plain_loop.run(study, hospitals, fixed_point=True)["scan"].result
    ours = time.perf_counter() - began
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    print(f"federated {ours:.1f} s, {scan} {theirs:.1f} s, peak {peak / 2**20:.0f} MB")
    assert result["tested"] == V and result["null_converged"]
    table.within("association scan", "PLINK 2", "wall time, 5,000 x 50,000, over theirs", ours / theirs, 3.0)
    assert peak < 400 * 2**20  # all genotypes as float64 would be 2,000 MB
