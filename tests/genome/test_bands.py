"""The bands of the check for people at two hospitals; on real people: test_several.py."""

from __future__ import annotations

import numpy as np

from sequester.client.compute.genome.bands import BANDS, WIDTH, band_rows, digests, pairs
from sequester.client.compute.genome.panel import load


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
