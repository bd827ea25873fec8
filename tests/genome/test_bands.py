"""The banded keyed check finds the real people who are in two data sets, and nobody else."""

from __future__ import annotations

import numpy as np

from genome.files import DATA, needs_data
from sequester.client.compute.genome.bands import BANDS, WIDTH, band_rows, digests, pairs
from sequester.client.compute.genome.harmonise import match, of_panel
from sequester.client.compute.genome.panel import load
from sequester.client.compute.genome.plink import PlinkFiles

FILES = {
    "NCBI36": DATA / "hapmap3_1kg/HM3_thinned_autosomal_overlap",
    "GRCh37": DATA / "hapmap3_1kg/1kg.ref.phase1_release_v3.20101123_thinned_autosomal_overlap",
}


@needs_data
def test_all_564_people_who_are_in_both_panels_are_found_and_no_false_pair() -> None:
    panel = load()
    rows = band_rows(panel).ravel()
    people, found = {}, {}
    for build, prefix in FILES.items():  # another order and another build: the panel's rows are the same
        files = PlinkFiles(str(prefix))
        matched = match(of_panel(panel, build), files.variants)
        entries = [matched.row[r] for r in rows]
        assert min(entries) >= 0
        counts = files.counts(entries)
        turned = np.array([matched.swapped[r] for r in rows])
        genotypes = np.where(turned & (counts >= 0), 2 - counts, counts).astype(np.int8)
        people[build], found[build] = files.samples, digests(genotypes, b"thrown away")
    same = pairs(found["NCBI36"], found["GRCh37"])
    named = {(people["NCBI36"][a], people["GRCh37"][b]) for a, b in same}
    both = set(people["NCBI36"]) & set(people["GRCh37"])
    assert len(both) == 564 and named == {(name, name) for name in both}


def test_the_bands_are_common_variants_that_no_strand_confuses_and_a_missing_genotype_drops_its_band() -> None:
    panel = load()
    rows = band_rows(panel)
    assert rows.shape == (BANDS, WIDTH) and len(set(rows.ravel().tolist())) == BANDS * WIDTH
    assert not panel.palindromic[rows.ravel()].any()
    genotypes = np.random.default_rng(1).integers(0, 3, (2, BANDS * WIDTH)).astype(np.int8)
    genotypes[1] = genotypes[0]
    genotypes[0, 0] = -9
    one, two = digests(genotypes, b"k")
    assert one[0] is None and one[1:] == two[1:]
    assert pairs([one], [two]) == {(0, 0)}
    other = digests(genotypes, b"another key")[1]
    assert pairs([two], [other]) == set()
