"""The genotype store of a data set: every usable entry of the hospital's files in one .pgen.

HOME/datasets/<id>/genotypes/
    genotypes.pgen .pvar .psam   panel rows first, in the panel's order and with its alleles, whatever the build; then
                                 all other entries in genome order, with the file's own alleles
    panel_row.npy                int32 (entries,): row of the panel, -1 for an entry outside it
    removed.json                 rows of people who leave, by reason
    panel.tsv[.gz]               where it is not the bundled one
    manifest.json                sources, hashes, build, every count of the report

`assemble` runs in a process of its own (isolated.py). The same files write the same bytes.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sequester.client.compute.genome import build as build_of
from sequester.client.compute.genome.frequencies import on_strand
from sequester.client.compute.genome.harmonise import (
    EXCLUDED,
    MATCHED,
    WANTED_CATEGORIES,
    Match,
    Palindromic,
    match,
    of_panel,
    oriented,
)
from sequester.client.compute.genome.panel import Build, Panel, load
from sequester.client.compute.genome.plink import MISSING, PlinkFiles
from sequester.client.compute.genome.quality import LIMITS
from sequester.client.compute.genome.variants import Variants, chromosome_name, join
from sequester.client.ingest import report
from sequester.client.ingest.convert import GenotypeWriter, versions, write_psam
from sequester.client.ingest.durable import folder_in_place, sha256_of, write_json
from sequester.client.ingest.inspection import Inspection, inspect
from sequester.client.ingest.isolated import Progress
from sequester.protocols.analyses.quality import HARD_CALL
from sequester.protocols.errors import SiteError

FORMAT = 1
_BLOCK = 1024


@dataclass(frozen=True, slots=True)
class Given:
    """One source as PLINK files: its own, or those a part was converted to. `part` is the content of part.json."""

    prefix: str
    part: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Order:
    """What a store is made from and how; plain values, since it crosses to another process."""

    given: tuple[Given, ...]
    genotypes: str  # as site.toml names them
    build: Build
    panel: Path | None = None
    only_panel: bool = False
    palindromic: Palindromic = "drop"
    table: tuple[str, ...] | None = None  # ids of the phenotype table
    case: dict[str, int] | None = None  # by sample id: 1 case, 0 control


@dataclass(slots=True)
class Assembled:
    """The content of the report. `problem`: message and hint of what makes the files unusable, if anything does."""

    content: dict[str, Any]
    problem: tuple[str, str] | None = None


def assemble(order: Order, folder: Path, progress: Progress) -> Assembled:
    """Harmonise the sources to the panel, write the store below `folder`, read it back, check it, and report.

    The report is written whatever comes out; the store is put in place only if it is usable, and is gone if not.
    """
    panel = load(order.panel)
    progress("reading variants", 0, 1)
    sources = [PlinkFiles(given.prefix) for given in order.given]
    people = _same_people(sources)
    rows = join([source.variants for source in sources])
    found = build_of.evidence(rows, panel)
    reasons = np.concatenate([_reasons(given, len(s.variants)) for given, s in zip(order.given, sources, strict=True)])
    wanted = of_panel(panel, order.build)
    matched = match(wanted, rows, order.palindromic, reasons)
    if order.palindromic == "frequency":
        told = on_strand(panel, matched, lambda entries: _hard_calls(sources, people, entries))
        matched = match(wanted, rows, order.palindromic, reasons, told)
    account = _account(order, sources, rows, panel, found, matched)
    lists = report.lists(rows, matched, panel, order.build)
    target, problem = folder / "genotypes", None
    headers: set[Build | None] = {given.part["header_build"] for given in order.given if given.part}
    try:
        build_of.confirm(found, order.build, headers)
        with folder_in_place(target) as new:
            store, panel_row = _write(new, order, sources, people, rows, matched, panel, progress)
            case = None
            if order.case is not None:
                case = np.array([order.case.get(sample, -9) for sample in store.samples], dtype=np.int8)
            inspection = inspect(store, panel, panel_row, order.build, case, progress)
            account["quality"] = inspection.as_json()
            lists |= {
                f"marked_{rule}": report.Listed(store.variants, entries)
                for rule, entries in inspection.marks.items()
                if len(entries)
            }
            _check_marks(inspection)
            write_json(new / "removed.json", inspection.removed)
            if order.panel is not None:
                shutil.copyfile(order.panel, new / ("panel.tsv.gz" if order.panel.suffix == ".gz" else "panel.tsv"))
            files = {path.name: sha256_of(path) for path in sorted(new.iterdir())}
            write_json(new / "manifest.json", {"format": FORMAT, **account, "files": files, "versions": versions()})
    except SiteError as error:
        problem = (error.message, error.hint)
        shutil.rmtree(target, ignore_errors=True)  # a store of older files would be taken for that of these
    content = report.account(account, problem)
    report.write(folder / "report", content, lists)
    return Assembled(content, problem)


def _same_people(sources: list[PlinkFiles]) -> list[NDArray[np.int64]]:
    """For each source, the column of each person of the first; sources of other people are refused."""
    first = sources[0].samples
    columns = []
    for number, source in enumerate(sources, 1):
        place = {sample: i for i, sample in enumerate(source.samples)}
        if place.keys() != set(first):
            both = len(place.keys() & set(first))
            raise SiteError(
                f"file {number} of {len(sources)} holds {len(place)} people, the first {len(first)}; {both} are in both",
                hint="all files of a data set hold the same people: merge or split them before ingest",
            )
        columns.append(np.array([place[sample] for sample in first], dtype=np.int64))
    return columns


def _reasons(given: Given, entries: int) -> NDArray[np.uint8]:
    if given.part is None:
        return np.zeros(entries, dtype=np.uint8)
    return np.asarray(np.load(Path(given.prefix).with_name("reasons.npy")), dtype=np.uint8)


def _write(
    folder: Path,
    order: Order,
    sources: list[PlinkFiles],
    people: list[NDArray[np.int64]],
    rows: Variants,
    matched: Match,
    panel: Panel,
    progress: Progress,
) -> tuple[PlinkFiles, NDArray[np.int64]]:
    """Write the .pgen set and panel_row.npy; what is written comes back as read from there."""
    source_of = np.repeat(np.arange(len(sources)), [len(s.variants) for s in sources])
    chosen, panel_row, swapped = _chosen(order, rows, matched, _counts_ref(order, rows, panel, matched, source_of))
    if not len(chosen):
        raise SiteError("no variant of these files can be kept", hint="`sequester-client data report` says why")
    n = len(sources[0].samples)
    dosages = any(source.has_dosages for source in sources)
    with GenotypeWriter(folder / "genotypes.pgen", n, len(chosen), dosages=dosages) as writer:
        for start in range(0, len(chosen), _BLOCK):
            progress("writing the store", start, len(chosen))
            entries = chosen[start : start + _BLOCK]
            block = _genotypes(sources, people, entries)
            for place, genotypes in enumerate(block, start):
                writer.add(_plain(oriented(genotypes, bool(swapped[place]))))
    write_psam(folder / "genotypes.psam", sources[0].samples, sources[0].sex.tolist())
    with (folder / "genotypes.pvar").open("w", encoding="utf-8", newline="\n") as pvar:
        pvar.write("#CHROM\tPOS\tID\tREF\tALT\n")
        for entry, row, turned in zip(chosen.tolist(), panel_row.tolist(), swapped.tolist(), strict=True):
            ref, alt = (
                (rows.other[entry], rows.counted[entry]) if not turned else (rows.counted[entry], rows.other[entry])
            )
            if row >= 0:
                ref, alt = panel.ref[row], panel.alt[row]
            name = chromosome_name(int(rows.code[entry]))
            pvar.write(f"{name}\t{rows.position[entry]}\t{rows.id[entry]}\t{ref}\t{alt}\n")
    np.save(folder / "panel_row.npy", panel_row.astype(np.int32))
    return PlinkFiles(str(folder / "genotypes")), panel_row


def _genotypes(
    sources: list[PlinkFiles], people: list[NDArray[np.int64]], entries: NDArray[np.int64]
) -> list[NDArray[Any]]:
    """Genotypes of entries over all sources, each (people,) in the first source's order of people."""
    first_of = np.concatenate([[0], np.cumsum([len(source.variants) for source in sources])])
    source_of = np.searchsorted(first_of, entries, side="right") - 1
    block: list[NDArray[Any]] = [np.zeros(0)] * len(entries)
    for index in np.unique(source_of).tolist():
        here = np.flatnonzero(source_of == index)
        read = sources[index].dosages((entries[here] - first_of[index]).tolist())[people[index]]
        for column, place in enumerate(here.tolist()):
            block[place] = read[:, column]
    return block


def _hard_calls(sources: list[PlinkFiles], people: list[NDArray[np.int64]], entries: list[int]) -> NDArray[np.int8]:
    """int8 (entries, people); a dosage further than 0.1 from a whole number is no call."""
    out = np.empty((len(entries), len(sources[0].samples)), dtype=np.int8)
    for i, genotypes in enumerate(_genotypes(sources, people, np.array(entries, dtype=np.int64))):
        whole = np.rint(genotypes)
        out[i] = np.where(np.abs(genotypes - whole) <= HARD_CALL, whole, MISSING)
    return out


def _plain(genotypes: NDArray[Any]) -> NDArray[Any]:
    """Dosages that are whole for everybody, as hard calls."""
    if genotypes.dtype == np.float32 and (genotypes == np.rint(genotypes)).all():
        return genotypes.astype(np.int8)
    return genotypes


def _counts_ref(
    order: Order, rows: Variants, panel: Panel, matched: Match, source_of: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """For each entry, whether its file counts REF: a BGEN file does not say, so the panel's known reference bases do."""
    out = np.zeros(len(rows), dtype=bool)
    found = np.array(matched.row, dtype=np.int64)
    known = np.flatnonzero((found >= 0) & panel.ref_known)
    turned = np.array(matched.swapped, dtype=bool)[known]
    for index, given in enumerate(order.given):
        here = source_of[found[known]] == index
        if (
            given.part is not None
            and given.part["source"].endswith(".bgen")
            and int(turned[here].sum()) > int(here.sum()) / 2
        ):
            out |= source_of == index
    return out


def _chosen(
    order: Order, rows: Variants, matched: Match, counts_ref: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """Entries to keep in the store's order, the panel row of each or -1, and whether its copies are to be turned."""
    panel_row = np.full(len(rows), -1, dtype=np.int64)
    turned = counts_ref.copy()
    found = np.array(matched.row, dtype=np.int64)
    panel_row[found[found >= 0]] = np.flatnonzero(found >= 0)
    turned[found[found >= 0]] = np.array(matched.swapped, dtype=bool)[found >= 0]
    keep = panel_row >= 0
    if not order.only_panel:
        keep |= matched.row_category >= len(MATCHED) + len(EXCLUDED)
    chosen = np.flatnonzero(keep)
    rank = np.where(panel_row[chosen] >= 0, panel_row[chosen], len(found))
    chosen = chosen[np.lexsort((chosen, rows.position[chosen], rows.code[chosen], rank))]
    return chosen, panel_row[chosen], turned[chosen]


def _check_marks(found: Inspection) -> None:
    if found.marked > LIMITS.marked_share * max(1, found.autosomal):
        worst = ", ".join(f"{len(entries)} {rule.replace('_', ' ')}" for rule, entries in found.marks.items())
        raise SiteError(
            f"{found.marked} of {found.autosomal} variants are marked ({worst}); at most {LIMITS.marked_share:.0%} "
            "were expected",
            hint="these are signs of a failed batch: ask who made the files; `sequester-client data report` lists them",
        )


def _account(
    order: Order, sources: list[PlinkFiles], rows: Variants, panel: Panel, found: build_of.Evidence, matched: Match
) -> dict[str, Any]:
    """Everything the report says, in its order; counts, file names and hashes."""
    split = sum(
        int(np.load(Path(given.prefix).with_name("split.npy")).sum())
        if given.part
        else int(source.is_multiallelic.sum())
        for given, source in zip(order.given, sources, strict=True)
    )
    calls: dict[str, int] = {}
    for given in order.given:
        for name, count in (given.part or {}).get("calls", {}).items():
            calls[name] = calls.get(name, 0) + count
    row_of = np.array(matched.row)
    other_id = sum(
        1
        for j in np.flatnonzero(row_of >= 0).tolist()
        if panel.id[j].startswith("rs")
        and str(rows.id[row_of[j]]).startswith("rs")
        and panel.id[j] != rows.id[row_of[j]]
    )
    return {
        "genotypes": order.genotypes,
        "build": order.build,
        "build_found": found.build,
        "build_match": {
            b: {"matched": found.matched[b], "carried": found.carried[b], "share": round(found.share(b), 6)}
            for b in found.matched
        },
        "panel": {"sha256": panel.sha256, "rows": len(panel), "bundled": order.panel is None},
        "only_panel": order.only_panel,
        "palindromic": order.palindromic,
        "people": {
            "in_files": len(sources[0].samples),
            "in_table": None if order.table is None else len(order.table),
            "in_both": None if order.table is None else len(set(order.table) & set(sources[0].samples)),
        },
        "rows": sum(
            (given.part or {}).get("rows", source.rows) for given, source in zip(order.given, sources, strict=True)
        ),
        "entries": len(rows),
        "split": split,
        "entry_categories": matched.rows,
        "panel_categories": matched.categories,
        "covered": _covered(panel, matched),
        "other_id": other_id,
        "calls": calls,
        "sources": [_source(given, source) for given, source in zip(order.given, sources, strict=True)],
    }


def _covered(panel: Panel, matched: Match) -> dict[str, int]:
    """Panel rows on chromosomes of which the files hold anything, and those of them that are absent."""
    found = np.array(matched.row) >= 0
    on = np.isin(panel.code, np.unique(panel.code[found]))
    return {
        "rows": int(on.sum()),
        "absent": int((on & (matched.wanted_category == WANTED_CATEGORIES.index("absent"))).sum()),
    }


def _source(given: Given, source: PlinkFiles) -> dict[str, Any]:
    if given.part is not None:
        return {"files": {given.part["source"]: given.part["sha256"]}, "reading": given.part["reading"]}
    return {"files": {path.name: sha256_of(path) for path in source.files}}
