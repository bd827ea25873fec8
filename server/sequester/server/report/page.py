"""report.html: one file that a clinician, a coordinator and a data-protection officer read without asking anybody.

It fetches nothing and runs nothing; the same study, results and receipts give the same bytes. The first page says what
was asked, what was found, what it cost in privacy and which analyses were exact. No figure is about a single hospital
except bytes, charges and ledger counters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from sequester.protocols import privacy
from sequester.protocols.analyses.registry import analysis_of
from sequester.protocols.errors import StudyError
from sequester.protocols.release import Release
from sequester.protocols.signing import spoken
from sequester.protocols.study import Study
from sequester.server.report import findings, heads, models, outcomes, prs_rs, scans
from sequester.server.report.certificate import certificate
from sequester.server.report.findings import Headline
from sequester.server.report.pieces import Part, Result, Table, Tile, digits, percent, sentence
from sequester.server.report.receipts import Receipt, read

if TYPE_CHECKING:
    from jinja2 import Template


def report_html(study: Study, results: dict[str, Any], receipts: dict[str, dict[str, Any]], standing: Release) -> bytes:
    """The page, UTF-8. `receipts` are verified bodies by site; results of another study are a `StudyError`."""
    digest = privacy.study_digest(study)
    if results.get("study") != digest:
        raise StudyError(
            f"these results are of study {str(results.get('study'))[:12]}, the study given is {digest[:12]}",
            hint="a changed byte is another study: give the study that was run",
        )
    known = {site: read(study, digest, site, body) for site, body in receipts.items()}
    return render(study, digest, results, known, certificate(study, digest, results, known, standing))


def render(
    study: Study, digest: str, results: dict[str, Any], known: Mapping[str, Receipt], statement: Mapping[str, Any],
    outputs: Sequence[tuple[str, str]] = (),
) -> bytes:  # fmt: skip
    """The page from receipts that were read and a certificate that was made; `outputs` are the files beside it, in words."""
    analyses: dict[str, Any] = results["analyses"]
    found = findings.headline(study, analyses)
    text = _template().render(
        title=study.title.get("en") or next(iter(study.title.values())),
        summary=(study.summary.get("en") or next(iter(study.summary.values()), "")).strip().splitlines(),
        study=study,
        results=results,
        digest=digest,
        spoken_digest=spoken(digest),
        headline=found,
        tiles=(*found.tiles, *_privacy_tiles(study, statement)),
        notices=_notices(found, statement, known, study),
        privacy_words=_privacy_words(study, statement),
        parts=_parts(study, analyses),
        certificate=statement,
        group_words=_group_words(statement["groups"]),
        audit_words=_audit_words(statement["evidence"]["audit_lower_bound"]),
        certificate_tables=_certificate_tables(study, statement),
        federation=_federation(study, results),
        receipts=_receipts(study, known, statement),
        items=prs_rs.items(study, results),
        outputs=outputs,
        limits=LIMITS,
        style=_text("report.css"),
    )
    return text.encode()


LIMITS = (
    "Not for diagnosis. The model has no clearance as a medical device, and a figure about a group is not a risk of a person.",
    "The model was measured in this consortium's patients; in other populations, ages or laboratories it may do worse.",
    "A hospital that sends wrong numbers is not found out by the protocol.",
    "Associations are not causes.",
)


@cache
def _template() -> Template:
    from jinja2 import Environment, StrictUndefined  # slow to load: only where a report is made

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["sentence"] = sentence
    return environment.from_string(_text("report.html.jinja"))


def _text(name: str) -> str:
    return (files("sequester.server") / "report" / name).read_text("utf-8")


# What an analysis is called on the page, and what shows it.
PARTS: dict[str, tuple[str, Callable[[Study, str, Result], Part]]] = {
    "evaluation": ("How well it predicts", findings.evaluation),
    "association": ("Scan of variants", scans.association),
    "burden": ("Tests of genes", scans.burden),
    "calibration": ("Whether risks are right", outcomes.calibration),
    "reclassification": ("What changes for patients", outcomes.reclassification),
    "heterogeneity": ("Differences between hospitals", outcomes.heterogeneity),
    "counts": ("Patients in each cell", models.other),
    "quality": ("Quality of genotypes", models.other),
    "structure": ("Components of ancestry", models.other),
}


def _parts(study: Study, analyses: Mapping[str, Any]) -> list[Part]:
    parts = []
    for plan in study.analyses:
        if plan.name not in analyses:
            continue
        result = analyses[plan.name]["result"]
        if "weights" in result:
            title, part = "Model", models.model(study, plan.name, plan.mode, result)
        elif plan.kind == "heads":
            title, part = f"Heads by {study.cohort.subgroup}", heads.heads(study, plan.name, analyses)
        elif "curves" in result:
            title, part = "Survival curves", outcomes.survival(study, plan.name, result)
        else:
            title, of = PARTS.get(plan.kind, (sentence(plan.kind).rstrip("."), models.other))
            part = of(study, plan.name, result)
        parts.append(replace(part, title=f"{title}: {plan.name}"))
    return parts


# ---- the first page -------------------------------------------------------------------------------------------------


def _privacy_tiles(study: Study, statement: Mapping[str, Any]) -> list[Tile]:
    epsilon, delta = statement["epsilon"], statement["delta"]
    sites = Tile("Hospitals", str(len(study.sites)), f"declared size {study.n0:,} patients")
    if epsilon["reported"] is None:
        return [Tile("Privacy", "exact", "no differential privacy in this study"), sites]
    note = f"at delta {_small(delta['stated'])}; per patient, {study.privacy.adjacency}"
    return [Tile("Epsilon", f"{epsilon['reported']:.2f}", note), sites]


def _privacy_words(study: Study, statement: Mapping[str, Any]) -> list[str]:
    epsilon = statement["epsilon"]["reported"]
    if epsilon is None:
        return []
    neighbours = {
        "add-remove": "The promise compares the study with and without any one patient (add-remove).",
        "replace-one": "The promise compares the study with any one patient exchanged for another (replace-one).",
    }[study.privacy.adjacency]
    sure = 1 / (1 + math.exp(-epsilon))
    private = [plan.name for plan in study.analyses if plan.mode == "private"]
    return [
        f"For the private analyses ({', '.join(private)}): epsilon {epsilon:.2f} at delta "
        f"{_small(statement['delta']['stated'])}, within the contract's epsilon {study.privacy.epsilon}. "
        f"The unit is one patient's whole record at one hospital. {neighbours}",
        f"In words: whoever reads everything that this study published, and thought it even odds that a given patient took "
        f"part, can become at most {percent(sure)} sure, except with probability delta. A patient at two hospitals has epsilon "
        f"{statement['epsilon']['two_copies']:.2f}; if all other hospitals colluded, "
        f"{statement['epsilon']['all_others_collude']:.2f}.",
    ]


def _notices(
    found: Headline, statement: Mapping[str, Any], receipts: Mapping[str, Receipt], study: Study
) -> list[tuple[str, str]]:
    """(label, sentence) of what must not be overlooked."""
    rows: list[tuple[str, str]] = []
    alone = "; epsilon here is of the private releases alone" if statement["epsilon"]["reported"] is not None else ""
    if study.rehearsal:
        rows.append(("Rehearsal", "This study is a rehearsal: no real patient's data may have taken part."))
    if statement["exact"]:
        rows.append(
            (
                "Exact analyses",
                f"{', '.join(statement['exact'])}: the opened sums are not protected by differential privacy. No epsilon "
                f"for the life of these data can be stated any more{alone}.{_iterative(study)}",
            )
        )
    loose = [site for site, receipt in sorted(receipts.items()) if receipt.allow_unisolated]
    if loose:
        rows.append(
            (
                "Not isolated",
                f"{', '.join(loose)} allowed compute to run without a network namespace (allow_unisolated).",
            )
        )
    missing = [site for site in study.site_ids if site not in receipts]
    if missing:
        rows.append(
            ("Receipts missing", f"{', '.join(missing)}: epsilon is stated for everything that was reserved there.")
        )
    if waiver := statement["release_gate"]["waiver"]:
        stood = ", ".join(f"{site} {word}" for site, word in waiver["stood"].items())
        names = ", ".join(waiver["countersigned"]) or "nobody"
        rows.append(
            (
                "Release gate waived",
                f"No pass of the release gate: {stood}. The coordinator waived it at {waiver['time']}, countersigned by {names}: "
                f"{waiver['reason']}",
            )
        )
    padding = statement["evidence"]["noise_on_padding"]
    if padding["limits"] is not None and padding["ratio"] is not None and padding["ratio"] < padding["limits"][0]:
        rows.append(
            ("Noise", f"Measured on padding: {padding['ratio']:.3f} of what was promised. {padding['verdict']}.")
        )
    rows += [("Groups", sentence) for sentence in found.warnings]
    return rows


def _iterative(study: Study) -> str:
    """The sentence about exact analyses that depend on what the exchange broadcast (spec/genomics.md, two modes)."""
    names = [p.name for p in study.analyses if p.mode == "exact" and analysis_of(p).is_iterative(p, study)]
    if not names:
        return ""
    return f" {', '.join(names)} trusted the exchange to broadcast honestly: a dishonest exchange can read single patients."


# ---- the certificate ------------------------------------------------------------------------------------------------


def _certificate_tables(study: Study, statement: Mapping[str, Any]) -> list[Table]:
    epsilon, delta, trust = statement["epsilon"], statement["delta"], statement["trust"]
    letters = {
        "N": "hospitals in the roster", "c": "hospitals that may collude with the exchange", "t": "threshold of shares",
        "a": "absences tolerated in a round", "u": "smallest set whose sum is opened",
        "h": "honest shares of noise counted on, u − c", "f": "shares not counted on, N − h",
    }  # fmt: skip
    trusted = [(f"{letter}, {words}", str(trust[letter])) for letter, words in letters.items()]
    trusted.append(("mode", trust["mode"]))
    tables = [Table("Who is trusted", ("Letter", "Value"), tuple(trusted), sentence(trust["kind"]))]
    if epsilon["reported"] is not None:
        views = (
            ("By the contract", str(epsilon["contract"])),
            ("By the filter that decides", f"{epsilon['filter']:.3f}"),
            ("Reported, all rounds and spare attempts", f"{epsilon['reported']:.3f}"),
            ("Reported, without spare attempts", f"{epsilon['without_spare_attempts']:.3f}"),
            ("A patient at two hospitals (k = 2)", f"{epsilon['two_copies']:.3f}"),
            ("If all other hospitals collude", f"{epsilon['all_others_collude']:.3f}"),
            (f"Delta × {delta['slack']}", _small(delta["stated"])),
        )
        tables.insert(0, Table("Epsilon of the study", ("View", "Value"), views, sentence(delta["slack_because"])))
    tables.append(_releases(statement["releases"]))
    if statement["release_gate"]["sites"]:
        tables.append(_release_gate(statement["release_gate"]))
    if epsilon["reported"] is not None:
        tables.append(_padding(statement["evidence"]["noise_on_padding"]))
    return tables


def _releases(releases: list[dict[str, Any]]) -> Table:
    head = ("Release", "Mechanism", "σ", "C", "q", "T", "R", "ε alone", "Noise SD of a sum")
    rows = []
    for r in releases:
        private = r["mode"] == "private"
        rows.append(
            (
                r["name"],
                r["mechanism"] if private else "none (exact)",
                digits(r["sigma"], 5) if private else "—",
                digits(r["C"]) if private else "—",
                digits(r["q"]) if private else "—",
                str(r["T"]),
                str(r["R"]),
                f"{r['epsilon']:.3f}" if private else "—",
                digits(r["noise_sd_of_sum"]) if private else "—",
            )
        )
    note = (
        "σ noise multiplier, C bound on what one patient changes, q share sampled, T rounds, R spare attempts paid for."
    )
    return Table("Releases", head, tuple(rows), note, words=(1,))


def _release_gate(gate: Mapping[str, Any]) -> Table:
    head = ("Hospital", "Verdict", "Form", "Made-up patients", "Trainings", "Attempt", "Program", "Signed at")
    rows = []
    for site, row in gate["sites"].items():
        tried = row.get("tried", ())
        rows.append(
            (
                site,
                row["verdict"],
                row.get("form", "—"),
                ", ".join(f"{t['analysis']} {t['patients']:,}" for t in tried) or "—",
                ", ".join(str(t["runs"]) for t in tried) or "—",
                str(row.get("attempt", "—")),
                row.get("program", "—"),
                row.get("time", "—"),
            )
        )
    note = f"Model let out by: {gate['granted_by']}. Asked for: {gate['rule']}. {sentence(gate['means'])}"
    return Table(
        "Release gate: each hospital's own installation, tried", head, tuple(rows), note, words=(1, 2, 3, 6, 7)
    )


def _padding(padding: Mapping[str, Any]) -> Table:
    ratio = "not measured" if padding["ratio"] is None else f"{padding['ratio']:.4f}"
    band = "{:.4f} to {:.4f}".format(*padding["limits"]) if padding["limits"] is not None else "none"
    rows = (("Measured over promised standard deviation", ratio), ("Limits, one in 10,000 a side", band))
    return Table(
        "Noise, measured on coordinates that hold nothing else", ("Check", "Value"), rows, sentence(padding["verdict"])
    )


# ---- the federation -------------------------------------------------------------------------------------------------


def _federation(study: Study, results: Mapping[str, Any]) -> list[Table]:
    seconds, wall = results.get("round_seconds", {}), results.get("wall_seconds", {})
    rows = [("Rounds", str(results.get("rounds", "not known")))]
    rows += [(f"Seconds a round, {name}", digits(seconds[name], 3)) for name in ("median", "p95") if name in seconds]
    rows += [(f"Seconds, {name.replace('_', ' ')}", digits(value, 4)) for name, value in wall.items()]
    sent: Mapping[str, int] = results.get("bytes_up", {})
    traffic = tuple((site, f"{sent[site]:,}" if site in sent else "not known") for site in study.site_ids)
    note = "Masked integers and messages of the protocol. Their size follows from the signed study, not from patients."
    return [
        Table("Rounds", ("What", "Value"), tuple(rows)),
        Table("Bytes that left each hospital", ("Hospital", "Bytes"), traffic, note),
    ]


def _receipts(study: Study, receipts: Mapping[str, Receipt], statement: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for site in study.site_ids:
        receipt, spent = receipts.get(site), statement["sites"][site]
        rows.append(
            {
                "site": site,
                "state": receipt.state if receipt else "no receipt",
                "charges": ", ".join(f"{k} {v}" for k, v in (receipt.charges if receipt else spent["charges"]).items())
                or "none",
                "epsilon": "—" if spent["epsilon"] is None else f"{spent['epsilon']:.3f}",
                "two_copies": "—" if spent["two_copies"] is None else f"{spent['two_copies']:.3f}",
                "each": "; ".join(f"{name} {row['epsilon']:.3f}" for name, row in spent["releases"].items()),
                "life": _lifetime(spent["life"]),
                "life_words": _life_words(spent["life"]),
                "isolation": (receipt.isolation or "not said") if receipt else "not known",
                "unisolated": bool(receipt and receipt.allow_unisolated),
                "counter": str(receipt.ledger_counter) if receipt else "not known",
                "head": receipt.ledger_head if receipt else "",
                "time": receipt.time if receipt else "",
            }
        )
    return rows


def _lifetime(life: Mapping[str, Any]) -> str:
    return "—" if life["epsilon"] is None else f"{life['epsilon']:.3f}"


def _life_words(life: Mapping[str, Any]) -> str:
    """Over the life of a hospital's data: the figure with k = 2 and delta, or why there is none."""
    if life["epsilon"] is not None:
        figures = f"ε {life['epsilon']:.3f}, k = 2 {life['two_copies']:.3f}, at delta {_small(life['delta'])}"
        return f"Over the life of its data: {figures}."
    if "private_releases_alone" not in life:
        return f"Over the life of its data: not known, {life['because']}."
    return (
        f"Over the life of its data: {life['because']}. ε of the private releases alone {life['private_releases_alone']:.3f}, "
        f"k = 2 {life['two_copies']:.3f}, at delta {_small(life['delta'])}; exact: {', '.join(life['exact'])}."
    )


def _group_words(groups: Mapping[str, Any]) -> str:
    """Every group's own figure with its interval, or that it is withheld; after the figures what noise does to them."""
    said = []
    for name, found in groups["by_evaluation"].items():
        figures = []
        for group, row in found.items():
            measures = [f"{key.replace('_', ' ')} {_figure(value)}" for key, value in row.items()]
            figures.append(f"{group}: {', '.join(measures)}")
        said.append(f"{name}: {'; '.join(figures)}")
    return sentence(". ".join([*said, groups["because"]]))


def _figure(value: Any) -> str:
    if isinstance(value, Mapping):
        low = f" ({value['low']:.3f} to {value['high']:.3f})" if "low" in value and "high" in value else ""
        return f"{value['value']:.3f}{low}"
    return digits(value) if isinstance(value, int | float) else str(value)


def _audit_words(bound: Mapping[str, Any]) -> str:
    """The coordinator's lower bounds on epsilon beside what is claimed, or why there are none."""
    if bound["value"] is None:
        return f"Not told: {bound['because']}."
    rows = [
        f"{name}: at least {row['model']:.2f} from the model, {row['opened_sums']:.2f} from the opened sums, claimed "
        f"{row['claim']:.2f} ({row['patients']:,} made-up patients, {row['runs']} trainings)"
        for name, row in bound["models"].items()
    ]
    return f"{'; '.join(rows)}. {sentence(bound['because'])}"


def _small(value: float) -> str:
    """A small number without an exponent: 0.000001001."""
    return f"{value:.12f}".rstrip("0").rstrip(".")
