"""A hospital of 120 patients with files on disk, and a study that fits them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import contracts
from sequester.client.config import Home
from sequester.protocols.study import Study
from sequester.simulate.plink import Line, write_bed

N = 120


def study(**changed: object) -> Study:
    return contracts.study(
        **{
            "covariates": [
                {"name": "age", "kind": "quantitative", "unit": "years", "lower": "20", "upper": "90"},
                {"name": "smoke", "kind": "category", "values": ["never", "now", "other"]},
            ],
            "cohort": {"where": ["age >= 20"]},
            **changed,
        }
    )


def hospital(folder: Path, policy: str = "") -> Home:
    """120 patients with an age, a case status and two variants; the second is stored with its alleles swapped."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(1)
    counts = rng.integers(0, 3, (N, 2)).astype(np.int8)
    counts[0, 0] = -1
    people = [f"p{i:03d}" for i in range(N)]
    write_bed(folder / "g", people, [Line("chr1", "a", 1000, "A", "G"), Line("22", "b", 2000, "C", "T")], counts)
    smoke = ["never", "now", "pipe", "NA"]
    lines = ["patient,case,age,smoke"] + [f"{p},{i % 2},{20 + i % 60},{smoke[i % 4]}" for i, p in enumerate(people)]
    (folder / "phenotypes.csv").write_text("\n".join(lines) + "\n", "utf-8")
    home = Home(folder / "home")
    home.root.mkdir(exist_ok=True)
    home.site_toml.write_text(
        f'[site]\nid = "north"\n[data]\ngenotypes = "{folder / "g"}"\nphenotypes = "{folder / "phenotypes.csv"}"\n'
        f"[policy]\n{policy}\n",
        "utf-8",
    )
    return home
