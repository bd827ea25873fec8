"""The account of an ingest, for people (one HTML page) and machines (JSON), in the order of spec/genomics.md, section 3.

The page stays at the hospital. It loads nothing from anywhere and holds counts and names of local files only; the variants
of each category lie in lists beside it.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sequester.client.compute.genome.harmonise import KEPT, MATCHED, ROW_CATEGORIES, WANTED_CATEGORIES, Match
from sequester.client.compute.genome.panel import Build, Panel
from sequester.client.compute.genome.quality import LIMITS
from sequester.client.compute.genome.variants import Variants, chromosome_name
from sequester.client.ingest.durable import folder_in_place, write_json

MISMATCH, ABSENT, MIXED = 0.02, 0.25, (0.01, 0.99)
_PER_SAMPLE_ABSENT = 0.2

# name, whose rows are counted, what it means
CATEGORIES = (
    ("direct", "entry", "Same alleles as the panel, counted the same way."),
    ("swapped", "entry", "The file counts the panel's other allele; copies were turned round."),
    ("flipped", "entry", "The file is on the other strand here; alleles were complemented."),
    ("flipped_swapped", "entry", "The other strand and the other allele; both were undone."),
    ("palindromic", "entry", "A/T or C/G: the strand cannot be told from the alleles, so the variant is not used."),
    ("duplicate", "entry", "The same place and alleles as an earlier row; the first in the file is used."),
    ("indel", "entry", "An insertion or deletion that is not in the panel; kept for studies that name it."),
    ("allele_mismatch", "entry", "At a place of the panel, with other alleles; not used."),
    ("other_contig", "entry", "Not on chromosomes 1 to 22 or X; left out."),
    ("absent", "panel", "In the panel, not in the files; missing for everybody here."),
    ("not_in_list", "entry", "Not in the panel; kept for studies that name it, unless only the panel was asked for."),
    ("chromosome_x", "entry", "On X; used to check sex, not in analyses."),
    ("filtered", "entry", "Failed a filter of the file; left out."),
    ("no_genotypes", "entry", "A row without genotypes; left out."),
    ("undecodable_genotypes", "entry", "Its GT is not of the type that genotypes have; left out: write the file anew."),
    ("low_imputation_quality", "entry", "Below the floor on imputation quality; left out."),
    ("multiallelic_bgen", "entry", "A BGEN row of more than two alleles; split it before ingest to use it."),
    ("symbolic", "entry", "A structural allele such as <DEL>; left out."),
    ("spanning_deletion", "entry", "The allele `*`; left out."),
    ("monomorphic_coding", "entry", "No second allele is written, or it equals the first; left out."),
    ("unreadable_alleles", "entry", "Alleles that are not sequences of A, C, G, T; left out."),
    ("bad_position", "entry", "A position of 0 or less; left out."),
)
_QUALITY = {
    "low_call_rate": f"called at fewer than {LIMITS.sample_call_rate:.0%} of variants",
    "heterozygosity": f"heterozygosity far from expected (|F| above {LIMITS.heterozygosity:g})",
    "sex_mismatch": "sex of the genotypes is not the recorded one",
    "duplicate": "the same person, or a twin, as an earlier row",
    "relative": "a close relative of another person here",
}


def account(found: dict[str, Any], problem: tuple[str, str] | None) -> dict[str, Any]:
    """The report's content: verdict first, then what was counted, last what to do."""
    matched = sum(found["panel_categories"][c] for c in MATCHED)
    rows = found["panel"]["rows"]
    advice = _advice(found, matched)
    if problem is not None:
        sentence = f"Not ready: {problem[0]}."
        advice = [problem[1], *advice]
    else:
        sentence = f"Ready: {matched:,} of {rows:,} panel variants usable, {matched / rows:.0%}."
        sentence += " Nothing needs your attention." if not advice else " See what to do next, below."
    verdict = {"ready": problem is None, "sentence": sentence, "usable": matched, "of": rows}
    return {"verdict": verdict, **found, "next": advice}


def _advice(found: dict[str, Any], matched: int) -> list[str]:
    out = []
    entries, panel = found["entry_categories"], found["panel_categories"]
    at_panel = matched + entries["allele_mismatch"]
    if at_panel and entries["allele_mismatch"] > MISMATCH * at_panel:
        out.append(
            f"{entries['allele_mismatch']:,} variants at places of the panel have other alleles, more than {MISMATCH:.0%}: "
            "ask who made the files which array and build they are."
        )
    carried = found["panel"]["rows"]
    if panel["absent"] > ABSENT * carried:
        out.append(
            f"{panel['absent']:,} of {carried:,} panel variants are not in the files, more than {ABSENT:.0%}. An array "
            "holds only part of the panel; a study says which variants it needs."
        )
    flipped = entries["flipped"] + entries["flipped_swapped"]
    if matched and MIXED[0] < flipped / matched < MIXED[1]:
        out.append(
            f"{flipped / matched:.0%} of matched variants are on the other strand: a mixed strand file. They were turned; "
            "A/T and C/G variants cannot be."
        )
    if found.get("quality", {}).get("variants_informed", {}).get("monomorphic") == 0 and _per_sample(found):
        out.append(
            "Many panel variants are absent and none is the same in everybody: this looks like per-sample variant calls. "
            "Use joint calls, or force-call the panel."
        )
    people = found["people"]
    if people["in_both"] is not None and people["in_both"] < 0.5 * min(people["in_files"], people["in_table"]):
        out.append("Few people of the genotypes are in the phenotype table: is `id_column` the sample id of the files?")
    return out


def _per_sample(found: dict[str, Any]) -> bool:
    from_vcf = any(name.endswith((".vcf", ".gz", ".bcf")) for s in found["sources"] for name in s["files"])
    return from_vcf and found["covered"]["absent"] > _PER_SAMPLE_ABSENT * found["covered"]["rows"]


@dataclass(frozen=True, slots=True)
class Listed:
    """Variants of one category: rows of a table."""

    variants: Variants
    rows: NDArray[np.int64]

    def lines(self) -> Iterator[str]:
        """Label, place and alleles of each."""
        v = self.variants
        for row in self.rows.tolist():
            place = f"{chromosome_name(int(v.code[row]))}:{v.position[row]}"
            yield f"{v.id[row]}\t{place}\t{v.counted[row]}\t{v.other[row]}\n"


def lists(rows: Variants, matched: Match, panel: Panel, build: Build) -> dict[str, Listed]:
    """What is in each category that is not empty: entries of the files, and panel rows that are absent."""
    out = {name: Listed(rows, np.flatnonzero(matched.row_category == code)) for code, name in enumerate(ROW_CATEGORIES)}
    of_panel = Variants(
        panel.code, panel.position[build], panel.alt, panel.ref, np.array(panel.id, dtype=np.dtypes.StringDType())
    )
    out["absent"] = Listed(of_panel, np.flatnonzero(matched.wanted_category == WANTED_CATEGORIES.index("absent")))
    return {name: listed for name, listed in out.items() if len(listed.rows)}


def write(folder: Path, content: dict[str, Any], listed: Mapping[str, Listed]) -> None:
    """Put report.json, report.html and one list for each category into `folder`, whole or not at all."""
    with folder_in_place(folder) as new:
        write_json(new / "report.json", content)
        (new / "report.html").write_text(page(content, listed), "utf-8")
        (new / "variants").mkdir()
        for name, variants in listed.items():
            with (new / "variants" / f"{name}.txt").open("w", encoding="utf-8", newline="\n") as file:
                file.write("id\tplace\tcounted\tother\n")
                file.writelines(variants.lines())


def page(content: dict[str, Any], listed: Container[str]) -> str:
    """One self-contained HTML page."""
    parts = [f'<p class="verdict">{escape(content["verdict"]["sentence"])}</p>']
    people = content["people"]
    rows = [("people in the genotype files", people["in_files"])]
    if people["in_table"] is not None:
        rows += [("people in the phenotype table", people["in_table"]), ("people in both", people["in_both"])]
    parts.append("<h2>People</h2>" + _table((), [(what, _number(n)) for what, n in rows]))
    build = [
        (name, f"{m['share']:.1%}", f"{m['matched']:,} of {m['carried']:,}")
        for name, m in content["build_match"].items()
    ]
    told = content["build_found"] or "not told"
    parts.append(
        f"<h2>Reference build</h2><p>Declared: {escape(content['build'])}. Found: {escape(told)}.</p>"
        + _table(("build", "match", "panel variants"), build)
    )
    parts.append("<h2>Variants</h2>" + _variants(content, listed))
    if "quality" in content:
        parts.append("<h2>Quality</h2>" + _quality(content["quality"]))
    parts.append("<h2>What to do next</h2>")
    advice = content["next"] or ["Nothing: freeze the cohort of a study with `sequester-client data freeze`."]
    parts.append("<ul>" + "".join(f"<li>{escape(sentence)}</li>" for sentence in advice) + "</ul>")
    files = [(name, digest) for source in content["sources"] for name, digest in source["files"].items()]
    parts.append("<h2>Files</h2>" + _table(("file", "SHA-256"), files))
    return _PAGE.replace("BODY", "\n".join(parts))


def _variants(content: dict[str, Any], listed: Container[str]) -> str:
    counts = {**content["entry_categories"], "absent": content["panel_categories"]["absent"]}
    rows = []
    for name, _, sentence in CATEGORIES:
        if counts.get(name) or name in (*MATCHED, "absent", "palindromic", "allele_mismatch", *KEPT):
            file = f"variants/{name}.txt" if name in listed else ""
            rows.append((name.replace("_", " "), _number(counts.get(name, 0)), sentence, file))
    lead = (
        f"<p>{content['rows']:,} rows in the files gave {content['entries']:,} variants ({content['split']:,} of them from "
        f"rows with several alternative alleles). Each is in one line of this table; the panel has "
        f"{content['panel']['rows']:,} variants.</p>"
    )
    more = ""
    if content["other_id"]:
        more = f"<p>{content['other_id']:,} variants carry another rs id than the panel's at that place; places decide.</p>"
    calls = [(name.replace("_", " "), _number(n)) for name, n in content["calls"].items() if n]
    if calls:
        more += "<p>Calls that were read as missing:</p>" + _table((), calls)
    return lead + _table(("variants", "count", "meaning", "list"), rows) + more


def _quality(quality: dict[str, Any]) -> str:
    parts = [f"<p>{quality['missing_rate']:.2%} of genotypes are missing.</p>"]
    people = [(_QUALITY.get(r, r), _number(n)) for r, n in quality["people_removed"].items()]
    parts.append(_table(("people left out", "count"), people))
    marks = [(rule.replace("_", " "), _number(n)) for rule, n in quality["variants_marked"].items()]
    marks += [
        (f"for information: {rule.replace('_', ' ')}", _number(n)) for rule, n in quality["variants_informed"].items()
    ]
    parts.append(_table((f"of {quality['variants_checked']:,} variants, marked by", "count"), marks))
    for name in ("ancestry", "sex"):
        if quality[name]:
            parts.append(
                _table((name, "people"), [(k.replace("_", " "), _number(n)) for k, n in quality[name].items()])
            )
    if quality["not_done"]:
        parts.append(
            _table(("not done", "because"), [(k.replace("_", " "), why) for k, why in quality["not_done"].items()])
        )
    return "".join(parts)


def _number(n: int) -> str:
    return f"{n:,}"


def _table(head: tuple[str, ...], rows: list[Any]) -> str:
    top = "<tr>" + "".join(f"<th>{escape(h)}</th>" for h in head) + "</tr>" if head else ""
    body = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table>{top}{body}</table>"


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Genotypes of this site</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; }
.verdict { font-size: 1.25rem; border-left: 4px solid #555; padding-left: 1rem; }
table { border-collapse: collapse; margin: 0.5rem 0 1rem; } td, th { padding: 0.25rem 0.75rem; text-align: left; }
tr { border-bottom: 1px solid #ddd; } td:nth-child(2) { font-variant-numeric: tabular-nums; }
</style></head><body>
<h1>Genotypes of this site</h1>
<p>This page stays here. It was made on this machine from this machine's files, and no number of it leaves.</p>
BODY
</body></html>
"""
