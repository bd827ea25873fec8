"""A hospital with scoring switched on, scoring files as text, and plink2 as the second opinion."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sequester.client.config import Home
from sequester.client.scoring.apply import Wish, apply

NOW = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)


def hospital(root: Path, genotypes: object, build: str, data: str = "", **scoring: str) -> Home:
    """A home whose site.toml names these files and has scoring on."""
    root.mkdir(parents=True, exist_ok=True)
    more = "".join(f'{name} = "{value}"\n' for name, value in scoring.items())
    (root / "site.toml").write_text(
        f'[site]\nid = "north"\n[data]\ngenotypes = "{genotypes}"\nbuild = "{build}"\n{data}'
        f'[scoring]\nenabled = true\nsigner = "Dr A. Keeper"\n{more}',
        "utf-8",
    )
    return Home(root)


def applied(home: Home, score: Path, out: Path, **wish: Any) -> tuple[dict[str, Any], dict[str, dict[str, str]]]:
    """The account, and the rows of scores.tsv by id."""
    account = apply(home, home.config(), Wish(score, out, **wish), NOW)
    lines = [line.split("\t") for line in (out / "scores.tsv").read_text().splitlines()]
    return account, {row[0]: dict(zip(lines[0], row, strict=True)) for row in lines[1:]}


def scoring_text(rows: Sequence[Sequence[object]], build: str = "GRCh37", more: Sequence[str] = ()) -> str:
    """A PGS Catalog file of rows: chromosome, position, effect, other, weight, and the columns of `more`."""
    columns = ["chr_name", "chr_position", "effect_allele", "other_allele", "effect_weight", *more]
    lines = [
        "###PGS CATALOG SCORING FILE",
        "#pgs_id=PGS999999",
        "#trait_reported=A condition",
        f"#genome_build={build}",
    ]
    return "\n".join([*lines, "\t".join(columns), *("\t".join(map(str, row)) for row in rows), ""])


def plink_sums(prefix: Path, rows: Path, out: Path, *more: str) -> dict[str, str]:
    """SCORE1_SUM of `plink2 --score` as printed, by sample."""
    command = ["plink2", "--pfile", str(prefix), "--score", str(rows), "1", "2", "3", "header", "cols=+scoresums",
               *(w for w in more if not w.startswith("--")), "--out", str(out)]  # fmt: skip
    for option in more:
        if option.startswith("--"):
            command += option.split("=", 1)
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    lines = out.with_name(out.name + ".sscore").read_text().splitlines()
    column = lines[0].split("\t").index("SCORE1_SUM")
    return {line.split("\t")[0]: line.split("\t")[column] for line in lines[1:]}


def last_digit(printed: str) -> float:
    """The value of one unit in the last place that plink2 prints: six significant digits."""
    from decimal import Decimal

    number = Decimal(printed)
    return 0.0 if number == 0 else float(Decimal(1).scaleb(number.adjusted() - 5))
