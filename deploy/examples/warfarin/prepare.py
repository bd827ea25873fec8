"""The IWPC warfarin file as sixteen hospitals: phenotypes.csv of each, and study.yaml with what a coordinator must add.

    python deploy/examples/warfarin/prepare.py iwpc_subject_data.csv OUT

Patients with a stable dose, age, height and weight, of the Project Sites with at least 50 of them: 4,267 people. VKORC1
-1639 is filled in from its neighbours by the rules of the paper's appendix (IWPC, NEJM 2009;360:753). The data are
CC BY-SA 4.0 by PharmGKB/ClinPGx and must never be bundled with anything that is sold.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Mapping
from pathlib import Path

LEAST = 50
RACES = {"White": "White", "Asian": "Asian", "Black or African American": "Black"}
CYP2C9 = ("*1/*1", "*1/*2", "*1/*3", "*2/*2", "*2/*3", "*3/*3")
COLUMNS = ("patient", "dose", "decade", "height", "weight", "vkorc1", "cyp2c9", "race", "inducer", "amiodarone")


def vkorc1(row: Mapping[str, str]) -> str:
    """The -1639 genotype, from 2255, 1173 or 1542 where it was not measured (the paper's appendix, section S4)."""
    if row["VKORC1 -1639 consensus"]:
        return row["VKORC1 -1639 consensus"]
    known_race = row["Race (OMB)"] not in ("Black or African American", "Unknown")
    for marker, codes, any_race in (
        ("2255", {"C/C": "G/G", "T/T": "A/A", "C/T": "A/G"}, False),
        ("1173", {"C/C": "G/G", "T/T": "A/A", "C/T": "A/G"}, True),
        ("1542", {"G/G": "G/G", "C/C": "A/A", "C/G": "A/G"}, False),
    ):
        found = codes.get(row[f"VKORC1 {marker} consensus"])
        if found is not None and (any_race or known_race):
            return found
    return "unknown"


def patient(row: Mapping[str, str]) -> dict[str, str] | None:
    """One row of phenotypes.csv; None where dose, age, height or weight are missing or the dose was not stable."""
    dose, age = row["Therapeutic Dose of Warfarin"], row["Age"]
    height, weight = row["Height (cm)"], row["Weight (kg)"]
    if row["Subject Reached Stable Dose of Warfarin"] != "1" or not (dose and age and height and weight):
        return None
    inducers = ("Carbamazepine (Tegretol)", "Phenytoin (Dilantin)", "Rifampin or Rifampicin")
    return {
        "patient": row["PharmGKB Subject ID"],
        "dose": dose,
        "decade": age[0],  # `90+` is decade 9
        "height": height,
        "weight": weight,
        "vkorc1": vkorc1(row),
        "cyp2c9": row["CYP2C9 consensus"] if row["CYP2C9 consensus"] in CYP2C9 else "unknown",
        "race": RACES.get(row["Race (OMB)"], "other"),
        "inducer": "1" if any(row[name] == "1" for name in inducers) else "0",
        "amiodarone": "1" if row["Amiodarone (Cordarone)"] == "1" else "0",
    }


def published_dose(p: Mapping[str, str]) -> float:
    """mg a week by the published pharmacogenetic coefficients: an answer to compare with."""
    root = 5.6044 - 0.2614 * float(p["decade"]) + 0.0087 * float(p["height"]) + 0.0128 * float(p["weight"])
    root += {"G/G": 0.0, "A/G": -0.8677, "A/A": -1.6974, "unknown": -0.4854}[p["vkorc1"]]
    root += dict(zip((*CYP2C9, "unknown"), (0, -0.5211, -0.9357, -1.0616, -1.9206, -2.3312, -0.2188), strict=True))[
        p["cyp2c9"]
    ]
    root += {"White": 0.0, "Asian": -0.1092, "Black": -0.2760, "other": -0.1032}[p["race"]]
    root += 1.1816 * float(p["inducer"]) - 0.5503 * float(p["amiodarone"])
    return root**2


def hospitals(source: Path) -> dict[str, list[dict[str, str]]]:
    """Patients by hospital, those with at least 50."""
    by_site: dict[str, list[dict[str, str]]] = {}
    with source.open(encoding="utf-8-sig", newline="") as file:
        for row in csv.DictReader(file):
            found = patient(row)
            if found is not None:
                by_site.setdefault(f"site-{int(row['Project Site']):02d}", []).append(found)
    return {name: by_site[name] for name in sorted(by_site) if len(by_site[name]) >= LEAST}


def main() -> None:
    """Write OUT/<site>/phenotypes.csv and OUT/study.yaml, and say how well the published dose does."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="iwpc_subject_data.csv")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    found = hospitals(arguments.source)
    errors = []
    for name, people in found.items():
        folder = arguments.out / name
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "phenotypes.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(people)
        errors += [abs(published_dose(p) - float(p["dose"])) for p in people]
    skeleton = Path(__file__).with_name("study.yaml").read_text("utf-8")
    (arguments.out / "study.yaml").write_text(skeleton, "utf-8")
    print(
        f"{len(errors)} patients in {len(found)} hospitals; published model: {sum(errors) / len(errors):.2f} mg/week off"
    )


if __name__ == "__main__":
    main()
