"""Writes the demo's hospitals: about 10,000 made-up people of three ancestries, as PLINK files and tables.

    python deploy/demo/simulation.py FOLDER [--people 10000] [--seed 7]

A process of its own, so that its memory is not the demo's and it can run while the hospitals enrol. The last line it prints
is JSON: people by hospital.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from sequester.simulate.hospitals import Hospital, hospitals

# People by ancestry (AFR, EUR, EAS) in relative numbers; how much likelier cases come; array; missing calls; file habits.
FOUR = (
    Hospital("harbor", (50, 150, 1150), 1.0, 0.80, 0.020, "chr"),
    Hospital("lake", (300, 700, 100), 1.0, 0.90, 0.010, "swapped"),
    Hospital("metro", (1050, 500, 150), 3.0, 0.85, 0.015, "flipped"),
    Hospital("north", (50, 1100, 50), 1.0, 1.00, 0.002),
)
PUBLISHED = 16  # with age and sex 18 features


def main() -> None:
    """Write the folder; the same arguments write the same bytes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--people", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()
    simulated = hospitals(
        arguments.seed, arguments.folder, FOUR, arguments.people, published=PUBLISHED, prevalence=0.15
    )
    print(json.dumps(simulated.people))


if __name__ == "__main__":
    main()
