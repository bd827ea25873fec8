"""Real genomes and real doses through the real processes: five hospitals or more, each its own processes, on this machine.

    python deploy/examples/run.py warfarin [--sites 5] [--study private exact] [--data FOLDER] [--out example-out] [--keep]
    python deploy/examples/run.py hapmap
    python deploy/examples/run.py mice

FOLDER (default SEQUESTER_DATA) holds iwpc_warfarin/, hapmap3_1kg/ or mouse_hs1940/. Each example first shows that a hospital
whose policy does not name an exact analysis refuses it; then every hospital's policy does, and its studies run in order:

    warfarin   dose from genotypes and clinic, private at epsilon 3, then exact beside the paper's table 3
    hapmap     every kind of analysis of a simulated trait, of a time to an event and of a count, exact; then private
    mice       every kind of analysis of CD8, then ridge for MCH, on 7,991 variants, exact, whole families held out

What an exact study opened is compared with statsmodels, PLINK 2, scikit-learn, lifelines and others on everybody's data,
and written to OUT/NAME-STUDY/comparison.json; a difference beyond its tolerance is exit status 1.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import examples.hapmap.studies as hapmap
import examples.mice.studies as mice
import examples.warfarin.studies as warfarin
from examples.compared import Compared, lines, write
from examples.example import Example, policy
from examples.ran import Ran
from examples.second_opinions import of_study
from sequester.one_machine.consortium import Consortium, Published, Site
from sequester.one_machine.phases import Phases
from sequester.one_machine.processes import Failed, python
from sequester.one_machine.script import carried_out
from sequester.protocols.signing import open_document
from sequester.protocols.study import parse_study

HERE = Path(__file__).resolve().parent
PEOPLE = "hapmap3_1kg/1kg.ref.phase1_release_v3.20101123_thinned_autosomal_overlap"
EXAMPLES = {
    "warfarin": Example(
        "iwpc_warfarin/iwpc_subject_data.csv", "warfarin-dose", "GRCh38", warfarin.studies, warfarin.findings
    ),
    "hapmap": Example("hapmap3_1kg", "risk-score", "GRCh37", hapmap.studies, hapmap.findings, PEOPLE),
    "mice": Example("mouse_hs1940", "risk-score", "GRCh38", mice.studies, mice.findings, "mouse_hs1940/mouse_hs1940"),
}


def main() -> int:
    """Run one example; 0 where every finding is within its bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("example", choices=sorted(EXAMPLES))
    parser.add_argument("--data", type=Path, default=os.environ.get("SEQUESTER_DATA"), help="default: SEQUESTER_DATA")
    parser.add_argument("--sites", type=int, default=5, help="the largest hospitals; 16 is all of warfarin (7 GB)")
    parser.add_argument("--study", nargs="+", help="some of its studies, by name; default: all, in their order")
    parser.add_argument("--out", type=Path, default=Path("example-out"))
    parser.add_argument("--keep", action="store_true", help="keep the working folder")
    arguments = parser.parse_args()
    if arguments.data is None or not (arguments.data / EXAMPLES[arguments.example].source).exists():
        print(f"error: {arguments.data or 'no folder'} holds no {EXAMPLES[arguments.example].source}")
        print("hint: name the folder of the data with --data or SEQUESTER_DATA")
        return 1
    if arguments.sites < 5:
        print("error: an example runs at 5 hospitals or more\nhint: leave --sites out")
        return 1
    example = EXAMPLES[arguments.example]
    return carried_out("example", lambda work, phases: run(arguments, example, work, phases), arguments.keep)


def run(arguments: argparse.Namespace, example: Example, work: Path, phases: Phases) -> bool:
    """The studies, one after the other, at the same hospitals; True where every finding is within its bound."""
    data, name = work / "data", arguments.example
    with Consortium(work, phases.say) as consortium:
        with phases.phase("prepare", f"prepare the hospitals of {name}"):
            script = str(HERE / name / "prepare.py")
            consortium.processes.run(
                "prepare", python(script, str(arguments.data / example.source), str(data)), kind="preparation"
            )
            sites = largest(data, arguments.sites, example.build)
        people = {site.name: patients(site.phenotypes) for site in sites}
        phases.line(f"{sum(people.values()):,} people: " + ", ".join(f"{n} {c}" for n, c in people.items()))
        with phases.phase("found", "found the consortium, start the exchange"):
            consortium.found(name)
        with phases.phase("enrol", "hospitals make their keys and enrol"):
            consortium.enrol(sites)
        with phases.phase("pin", "hospitals compare and pin each other's fingerprints"):
            consortium.pin()
        studies = example.studies(_skeleton(data / "study.yaml"), data, sum(people.values()))
        asked = arguments.study or list(studies)
        if unknown := set(asked) - set(studies):
            raise Failed(f"{name} has no study {min(unknown)}; it has {', '.join(studies)}")
        exact = [study for study in asked if all(plan.get("mode") == "exact" for plan in studies[study]["analyses"])]
        if exact:
            with phases.phase("refuse", "a hospital whose policy names no exact analysis is asked"):
                path = consortium.write_study(studies[exact[0]], example.template, "refused")
                said = consortium.hospital(sites[0].name, "check", str(path), "--json", statuses=(10,))
                objections = json.loads(said)["objections"]
            phases.line(f"    {sites[0].name} would refuse: {objections[0]['sentence']}")
        for site in sites:
            consortium.set_policy(site.name, policy(studies))
        consortium.run_sites()
        good = True
        for study_name in asked:
            out = arguments.out / f"{name}-{study_name}"
            with phases.phase(f"prepare {study_name}", f"study {study_name} is signed, published, frozen, approved"):
                study = consortium.publish(consortium.write_study(studies[study_name], example.template, study_name))
                consortium.decide(study)
            with phases.phase(f"rounds {study_name}", f"study {study_name} runs", live=False):
                results = consortium.run_study(study, out)
            with phases.phase(f"compare {study_name}", "other programs compute the same from everybody's data"):
                genotypes = arguments.data / example.genotypes if example.genotypes else None
                ran = _ran(study, consortium, results, genotypes, work / "plink")
                found = [*of_study(ran), *example.findings(study_name, ran)]
            good &= _report(study_name, ran, found, out, phases)
        with phases.phase("stop", "stop everything that was started"):
            consortium.processes.end()
        if consortium.processes.left_behind:
            raise Failed("something outlived its end: " + "; ".join(consortium.processes.left_behind))
        phases.line(f"peak memory (MB): {consortium.processes.watch.peaks()}")
    phases.line(f"results: {arguments.out.resolve()}")
    return good


def _ran(
    study: Published, consortium: Consortium, results: Mapping[str, Any], genotypes: Path | None, work: Path
) -> Ran:
    parsed = parse_study(open_document(study.signed.read_bytes(), "study", None).body_bytes)
    stores = {site: consortium.cohort(site, study.digest) for site in consortium.sites}
    tables = {site.name: site.phenotypes for site in consortium.sites.values()}
    return Ran(parsed, results, stores, tables, genotypes, work)


def _report(name: str, ran: Ran, found: list[Compared | str], out: Path, phases: Phases) -> bool:
    rows = [row for row in found if isinstance(row, Compared)]
    told = [row for row in found if isinstance(row, str)]
    write(out / "comparison.json", rows, told)
    median = 1000 * ran.results["round_seconds"]["median"]
    phases.line(f"{name}: {ran.results['rounds']} rounds at {len(ran.stores)} hospitals, median {median:.0f} ms")
    for text in [*lines(rows), *told]:
        phases.line(f"  {text}")
    outside = [row for row in rows if not row.is_within]
    phases.line(f"{name}: {len(rows)} comparisons, {len(outside)} outside their tolerance")
    return not outside


def largest(data: Path, count: int, build: str) -> list[Site]:
    """The hospitals with most patients, by name."""
    folders = sorted(
        (path.parent for path in data.glob("*/phenotypes.csv")), key=lambda f: -patients(f / "phenotypes.csv")
    )
    if len(folders) < count:
        raise Failed(f"{len(folders)} hospitals were prepared, {count} were asked for")
    return [
        Site(
            folder.name,
            folder / "phenotypes.csv",
            folder / "genotypes" if (folder / "genotypes.bed").exists() else None,
            build,
        )
        for folder in sorted(folders[:count])
    ]


def patients(table: Path) -> int:
    """Rows below the header."""
    return len(table.read_text("utf-8").splitlines()) - 1


def _skeleton(path: Path) -> dict[str, Any]:
    fields: dict[str, Any] = YAML().load(path.read_text("utf-8"))  # keeps every number's own digits
    return fields


if __name__ == "__main__":
    raise SystemExit(main())
