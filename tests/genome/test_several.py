"""A rehearsal's check for people at more than one hospital: it finds the real ones, and runs in a rehearsal only."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from genome.files import DATA, needs_data
from sequester.client.compute.genome.bands import pairs
from sequester.client.compute.genome.plink import PlinkFiles
from sequester.client.config import Home
from sequester.client.ingest.several import REHEARSAL, main, of_hospital, several
from sequester.protocols.errors import SiteError
from sequester.simulate.plink import Line, write_bed

PANELS = {
    "NCBI36": DATA / "hapmap3_1kg/HM3_thinned_autosomal_overlap",
    "GRCh37": DATA / "hapmap3_1kg/1kg.ref.phase1_release_v3.20101123_thinned_autosomal_overlap",
}


def home(folder: Path, site: str, genotypes: Path, build: str, consortium: str = REHEARSAL) -> Path:
    """A hospital as a rehearsal leaves it: settings, and one consortium."""
    (folder / "consortia" / consortium).mkdir(parents=True)
    text = f'[site]\nid = "{site}"\n[data]\nbuild = "{build}"\ngenotypes = "{genotypes}"\n'
    (folder / "site.toml").write_text(text, "utf-8")
    return folder


@needs_data
def test_a_rehearsal_finds_all_564_people_who_are_in_both_panels_and_no_false_pair(tmp_path: Path) -> None:
    found, people = {}, {}
    for build, prefix in PANELS.items():  # another order and another build: the bundled panel's rows are the same
        place = Home(home(tmp_path / build, build.lower(), prefix, build))
        found[build], people[build] = (
            of_hospital(place, place.config(), b"thrown away"),
            PlinkFiles(str(prefix)).samples,
        )
    named = {(people["NCBI36"][a], people["GRCh37"][b]) for a, b in pairs(found["NCBI36"], found["GRCh37"])}
    both = set(people["NCBI36"]) & set(people["GRCh37"])
    assert len(both) == 564 and named == {(name, name) for name in both}
    assert several(found) == {"people": 564, "pairs": {"GRCh37, NCBI36": 564}}


@pytest.mark.parametrize("consortium", ["heart", "rehearsal-2"])
def test_a_hospital_of_a_real_consortium_is_refused_before_its_files_are_read(tmp_path: Path, consortium: str) -> None:
    place = home(tmp_path / "north", "north", tmp_path / "nothing", "GRCh38", consortium)
    with pytest.raises(SiteError, match=f"belongs to {consortium}, a rehearsal was expected"):
        main([place])
    (place / "consortia" / REHEARSAL).mkdir()
    with pytest.raises(SiteError, match="a rehearsal was expected"):
        main([place])


def test_files_without_the_variants_of_the_check_are_refused_by_their_number(tmp_path: Path) -> None:
    write_bed(tmp_path / "g", ["a", "b"], [Line("1", "rs1", 5, "A", "G")], np.zeros((2, 1), dtype=np.int8))
    with pytest.raises(SiteError, match="256 of the 256 variants of the check"):
        main([home(tmp_path / "north", "north", tmp_path / "g", "GRCh37")])


def test_a_person_at_three_hospitals_is_one_person_and_three_pairs() -> None:
    def person(letter: str) -> list[bytes | None]:
        return [letter.encode() + bytes([band]) for band in range(8)]

    found = {
        "north": [person("a"), person("b"), person("c")],
        "lake": [person("x"), person("a")],
        "metro": [person("a"), person("b"), [None] * 8],
    }
    assert several(found) == {"people": 2, "pairs": {"lake, metro": 1, "lake, north": 1, "metro, north": 2}}
    assert several({"north": [person("a")], "lake": [person("b")]}) == {"people": 0, "pairs": {"lake, north": 0}}
