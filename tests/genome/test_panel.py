"""The bundled panel: rebuilt byte for byte, with the numbers of its sources, and tables that are no panel refused."""

from __future__ import annotations

import gzip
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from genome.files import DATA, ROOT, needs_data
from sequester.client.compute.genome.panel import BUNDLED, load
from sequester.client.compute.genome.plink import PlinkFiles
from sequester.protocols.errors import SiteError


@pytest.mark.slow
@needs_data
def test_the_bundled_panel_is_what_its_builder_writes_from_the_public_tables(tmp_path: Path) -> None:
    out = tmp_path / "panel.tsv.gz"
    subprocess.run(
        [sys.executable, ROOT / "deploy/panel/build.py", DATA / "marker_panel", DATA / "hapmap3_1kg", out],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    assert out.read_bytes() == BUNDLED.read_bytes()


def test_the_bundled_panel_has_the_rows_and_the_attribution_of_its_sources() -> None:
    panel = load()
    assert len(panel) == 37_551
    carried = {build: int((position > 0).sum()) for build, position in panel.position.items()}
    assert carried == {"NCBI36": 14_079, "GRCh37": 37_551, "GRCh38": 23_532}
    with_frequency = ~np.isnan(panel.frequency).any(axis=1)
    assert int(with_frequency.sum()) == 14_079 == int((~np.isnan(panel.loadings).any(axis=1)).sum())
    assert int(panel.ref_known.sum()) == 23_532
    # the sources' counts: 1,015 of the 14,079, 2,805 of the 23,532; a row in both is counted in both
    assert int((panel.palindromic & with_frequency).sum()) == 1015
    assert int((panel.palindromic & (panel.position["GRCh38"] > 0)).sum()) == 2805
    head = gzip.decompress(BUNDLED.read_bytes())[:2000].decode()
    assert "peddy" in head and "MIT" in head and "1000 Genomes" in head and "HapMap" in head
    key = list(zip(panel.code.tolist(), panel.position["GRCh37"].tolist(), strict=True))
    assert key == sorted(key)


@needs_data
def test_projection_on_the_shipped_loadings_separates_real_continents() -> None:
    panel = load()
    files = PlinkFiles(str(DATA / "hapmap3_1kg/HM3_thinned_autosomal_overlap"))
    place = {
        (int(c), int(p)): r for r, (c, p) in enumerate(zip(panel.code, panel.position["NCBI36"], strict=True)) if p
    }
    rows = np.array([place[int(c), int(p)] for c, p in zip(files.variants.code, files.variants.position, strict=True)])
    g = files.counts(range(len(rows))).astype(float)  # (people, variants)
    turned = np.array([files.variants.counted[e] != panel.alt[r] for e, r in enumerate(rows)])
    g[:, turned] = np.where(g[:, turned] < 0, g[:, turned], 2 - g[:, turned])
    f = panel.mean_frequency[rows].astype(float)
    x = np.where(g < 0, 0.0, (g - 2 * f) / np.sqrt(2 * f * (1 - f)))
    components = x @ panel.loadings[rows] / np.array(panel.shrinkage)
    labels = [line.split(",") for line in (DATA / "hapmap3_1kg/sample_labels.csv").read_text().splitlines()[1:]]
    continent = {iid: group for data, _, iid, _, group in labels if data == "HM3"}
    groups = np.array([continent[s] for s in files.samples])
    centres = {name: components[groups == name][:, :2].mean(axis=0) for name in ("AFR", "EUR", "EAS")}
    for name, centre in centres.items():
        near = np.argmin(
            [np.linalg.norm(components[groups == name][:, :2] - c, axis=1) for c in centres.values()], axis=0
        )
        assert np.mean(near == list(centres).index(name)) > 0.95, (name, centre)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("chromosome\tGRCh37\n1\t5\n", "has no column"),
        ("chromosome\tNCBI36\tGRCh37\tGRCh38\tref\talt\n", "has no rows"),
        ("chromosome\tNCBI36\tGRCh37\tGRCh38\tref\talt\n1\tx\t5\t\tA\tG\n", "line 2: a field that is not a number"),
        ("chromosome\tNCBI36\tGRCh37\tGRCh38\tref\talt\n1\t\t5\t\tA\t<DEL>\n", "line 2: chromosomes 1-22 and alleles"),
    ],
)
def test_a_table_that_is_no_panel_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "p.tsv").write_text(text)
    with pytest.raises(SiteError, match=said):
        load(tmp_path / "p.tsv")


def test_a_damaged_panel_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.tsv.gz").write_bytes(BUNDLED.read_bytes()[:1000])
    with pytest.raises(SiteError, match="cannot be read as a panel"):
        load(tmp_path / "p.tsv.gz")
