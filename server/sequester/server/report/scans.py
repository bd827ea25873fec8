"""Scans as a reader sees them: Manhattan and QQ plots with lambda, the strongest variants, genes, and plink-like tables.

A scan may hold a million variants: what is drawn is one dot for each small cell of the plane that holds any, so that the
page stays small and no dot that could be seen is missing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sequester.protocols.analyses import null_model
from sequester.protocols.analyses.association import glm_lines
from sequester.protocols.study import Study
from sequester.server.report import plots, prs_rs
from sequester.server.report.findings import GENOME_WIDE
from sequester.server.report.pieces import Figure, Pairs, Part, Result, Table, digits, p_value, scalars, sentence

Vector = NDArray[np.float64]

TOP = 20
SUGGESTIVE = 1e-5
LEAST_P = 1e-300
CHANCE_BAND = (0.025, 0.975)
LAMBDA_SD = (
    2.333  # times 1/sqrt(variants): 1 / (2 f m) with m the median of chi-squared of one degree and f its density there
)


def association(study: Study, name: str, result: Result) -> Part:
    """Manhattan and QQ plots of one scan, its strongest variants, lambda and what was followed."""
    words = [sentence(prs_rs.method(study, name))]
    if "table" not in result:
        return Part(name, (*words, f"Not fitted: {result.get('not_fitted', 'no reason given')}."))
    rows = _tested(study, result)
    shown = {"table", "saddlepoint", "lambda", "tested"}
    if not result.get("null_converged", True):
        words.append("The model of the covariates did not converge: read the tests with care.")
    hits = int((rows["p"] < GENOME_WIDE).sum())
    words.append(
        f"{len(rows['p']):,} variants tested in {result['people']:,} people; {hits or 'none'} below {_small(GENOME_WIDE)}, the "
        f"usual limit of a genome-wide scan."
    )
    if not len(rows["p"]):
        return Part(name, tuple(words), ((None, scalars(result, shown)),))
    manhattan = Figure(
        plots.manhattan(name, rows["chromosome"], rows["position"], -np.log10(rows["p"])),
        f"Each variant's p value along the genome; lines at {_small(GENOME_WIDE)} (dashed) and {_small(SUGGESTIVE)} (dotted)."
        + (
            f" Triangles lie above the plot, below 10⁻{_raised(plots.MOST_SCORE)}."
            if rows["p"].min() < 10.0**-plots.MOST_SCORE
            else ""
        ),
        wide=True,
    )
    inflation, n = result["lambda"], len(rows["p"])
    chance = 1.96 * LAMBDA_SD / np.sqrt(n)
    qq = Figure(
        plots.quantiles(name, *_quantiles(rows["p"])),
        "Observed p values against those of no association at all; the band holds 95\u00a0% of chance.",
    )
    judged = (
        "too small for chance alone: the tests are too cautious, as with few cases or rare variants"
        if inflation < 1 - max(chance, 0.05)
        else "above what chance explains: many true effects, or confounding by ancestry or relatedness"
        if inflation > 1 + max(chance, 0.05)
        else "no sign of confounding by ancestry or relatedness"
    )
    quality = Table(
        "Calibration of the tests", ("Measure", "Value"),
        (("Lambda (median χ² over its value by chance)", f"{inflation:.3f}"),
         (f"Lambda by chance, {n:,} independent variants", f"{1 - chance:.2f} to {1 + chance:.2f}"),
         ("Variants tested", f"{n:,}"), ("Variants not tested", f"{len(result['table']['id']) - n:,}")),
        sentence(judged),
    )  # fmt: skip
    pairs: list[tuple[Figure | None, Table | None]] = [(manhattan, _strongest(study, result, rows)), (qq, quality)]
    if (rest := scalars(result, shown)) is not None:
        pairs.append((None, rest))
    return Part(name, tuple(words), tuple(pairs))


def burden(study: Study, name: str, result: Result) -> Part:
    """The genes of one test, smallest p first, with every p value that the analysis gives."""
    words = [sentence(prs_rs.method(study, name))]
    if "genes" not in result:
        return Part(name, (*words, f"Not fitted: {result.get('not_fitted', 'no reason given')}."))
    if not result.get("null_converged", True):
        words.append("The model of the covariates did not converge: read the tests with care.")
    rows = sorted(result["genes"], key=lambda row: min(_p_values(row).values(), default=2.0))
    named = list(dict.fromkeys(key for row in rows for key in _p_values(row)))
    body = [
        (
            row["gene"],
            str(row["variants"]),
            str(row["carriers"]),
            digits(row["burden_z"], 3) if "burden_z" in row else "—",
            *(p_value(_p_values(row)[key]) if key in _p_values(row) else "—" for key in named),
            row.get("not_tested", ""),
        )
        for row in rows[: 2 * TOP]
    ]
    head = (
        "Gene",
        "Variants",
        "Carriers",
        "burden z",
        *(key.replace("_", " ") for key in named),
        "Not tested, because",
    )
    tested = sum(1 for row in rows if _p_values(row))
    note = f"{tested:,} of {len(rows):,} genes tested; the usual limit for {tested:,} tests is {_small(0.05 / max(tested, 1))}."
    note += f" p combines burden and SKAT by {'SKAT-O' if result.get('combined') else 'the Cauchy rule'}."
    if len(rows) > len(body):
        note += f" The {len(body)} smallest p values; all are in the gene table and in results.json."
    table = Table("Genes", head, tuple(body), note, words=(len(head) - 1,))
    pairs: Pairs = [(None, table)]
    if reasons := Counter(row["not_tested"] for row in rows if "not_tested" in row):
        counted = tuple((sentence(why).rstrip("."), f"{count:,}") for why, count in reasons.most_common())
        pairs.append((None, Table("Genes not tested", ("Because", "Genes"), counted)))
    rest = scalars(result, {"genes", "combined"})
    return Part(name, tuple(words), (*pairs, *(((None, rest),) if rest is not None else ())))


def tables(study: Study, analyses: Mapping[str, Any]) -> dict[str, bytes]:
    """File name -> table: PLINK 2's `.glm` columns for each scan, tab-separated rows for each gene test."""
    found = {}
    for plan in study.analyses:
        result = analyses[plan.name]["result"]
        if plan.kind == "association" and "table" in result:
            test = "linear" if null_model.is_linear(study) else "logistic.hybrid"
            text = "\n".join(glm_lines(study, result))
            found[f"{plan.name}.{study.phenotype.name}.glm.{test}"] = text.encode() + b"\n"
        if plan.kind == "burden" and "genes" in result:
            columns = list(dict.fromkeys(key for row in result["genes"] for key in row))
            lines = ["\t".join(columns), *("\t".join(_cell(row.get(c)) for c in columns) for row in result["genes"])]
            found[f"{plan.name}.{study.phenotype.name}.genes.tsv"] = "\n".join(lines).encode() + b"\n"
    return found


def _cell(value: object) -> str:
    return "NA" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def _p_values(row: Result) -> dict[str, float]:
    """The p values in a row of genes, by the name of their test."""
    return {key: value for key, value in row.items() if isinstance(value, float) and (key == "p" or key.endswith("_p"))}


def _tested(study: Study, result: Result) -> dict[str, Any]:
    """Place, chromosome, position and p of the variants with a test, in the order of the genome."""
    table = result["table"]
    of = {v.id: v for v in study.variants}
    keep = [j for j, error in enumerate(table["error"]) if error in ("", "UNFINISHED")]
    variants = [of[table["id"][j]] for j in keep]
    chromosome = np.array([int(v.chromosome) for v in variants], dtype=np.int64)
    position = np.array([v.position for v in variants], dtype=np.int64)
    order = np.lexsort((position, chromosome))
    return {
        "place": np.array(keep, dtype=np.int64)[order],
        "chromosome": chromosome[order],
        "position": position[order],
        "p": np.clip(np.array([table["p"][j] for j in keep], dtype=np.float64)[order], LEAST_P, 1.0),
    }


def _strongest(study: Study, result: Result, rows: Mapping[str, Any]) -> Table:
    table, of = result["table"], {v.id: v for v in study.variants}
    linear = null_model.is_linear(study)
    body = []
    for j in rows["place"][np.argsort(rows["p"], kind="stable")[:TOP]]:
        v, effect, se = of[table["id"][j]], table["effect"][j], table["se"][j]
        low, value, high = (effect + z * se for z in (-1.959964, 0.0, 1.959964))
        if not linear:
            low, value, high = (float(np.exp(np.clip(b, -700, 700))) for b in (low, value, high))
        body.append(
            (
                v.id, f"{v.chromosome}:{v.position:,}", f"{v.effect}/{v.other}", f"{table['frequency'][j]:.3f}",
                f"{digits(value, 3)} ({digits(low, 3)} to {digits(high, 3)})", p_value(table["p"][j]), table["test"][j],
            )
        )  # fmt: skip
    head = (
        "Variant",
        "Place",
        "Effect/other",
        "Frequency",
        f"{'Effect' if linear else 'Odds ratio'} (95\u00a0%)",
        "p",
        "Test",
    )
    note = "Per copy of the effect allele. All variants are in the table beside this page, with PLINK 2's columns."
    return Table(f"The {len(body)} smallest p values", head, tuple(body), note, words=(1, 2, 6))


def _quantiles(p: Vector) -> tuple[Vector, Vector, Vector, Vector]:
    """-log10 of expected and observed p, and the ends of what chance holds of the observed, largest first."""
    from scipy.special import betaincinv  # heavy: loaded where it is used

    n = len(p)
    rank = np.arange(1, n + 1)
    low, high = (-np.log10(np.maximum(betaincinv(rank, n - rank + 1, q), LEAST_P)) for q in reversed(CHANCE_BAND))
    return -np.log10((rank - 0.5) / n), -np.log10(np.sort(p)), low, high


def _small(value: float) -> str:
    mantissa, exponent = f"{value:.0e}".split("e")
    return f"{mantissa}\u00a0×\u00a010⁻{_raised(abs(int(exponent)))}"


def _raised(exponent: int) -> str:
    return str(exponent).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))
