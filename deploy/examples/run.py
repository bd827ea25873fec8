"""Real patients through the real processes: the IWPC warfarin file, or 1000 Genomes people, at five hospitals or more.

    python deploy/examples/run.py warfarin [--sites 5] [--mode private exact] [--data FOLDER] [--out example-out] [--keep]
    python deploy/examples/run.py hapmap

FOLDER (default SEQUESTER_DATA) holds iwpc_warfarin/ or hapmap3_1kg/. Each example first shows that a hospital whose policy
does not name an exact analysis refuses it; then every hospital's policy does, and both studies run: private at epsilon 3,
then exact. What the exact study opened is compared with statsmodels on the pooled patients; a difference beyond the bounds
printed is exit status 1.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

import oracles
from sequester.one_machine.consortium import Consortium, Published, Site
from sequester.one_machine.phases import Phases
from sequester.one_machine.processes import INTERRUPTS, Failed, python
from sequester.protocols.signing import open_document
from sequester.protocols.study import Study, parse_study

HERE = Path(__file__).resolve().parent
SAME = 1e-6  # relative, of an exact coefficient: what is left is rounding to 2^-32 in the secure sum
EXACT_SUM = {"mode": "strict", "ring_bits": 64, "fraction_bits": 32, "round_deadline_s": 60}
PRIVATE_SUM = {"mode": "double", "ring_bits": 32, "fraction_bits": 16, "round_deadline_s": 60}
Stores = Mapping[str, Path]
Line = tuple[str, bool]  # a finding in words, and whether it is within its bound


@dataclass(frozen=True, slots=True)
class Example:
    """What differs between the two."""

    source: str
    template: str
    build: str
    exact_policy: Mapping[str, object]
    studies: Callable[[Mapping[str, Any], int], dict[str, dict[str, Any]]]
    findings: Callable[[str, Study, Stores, Mapping[str, Any]], list[Line]]


# ---- warfarin -------------------------------------------------------------------------------------------------------


def warfarin_studies(skeleton: Mapping[str, Any], people: int) -> dict[str, dict[str, Any]]:
    """The private study of the skeleton and its exact twin, sized for these hospitals."""
    told = {**skeleton, "variants": [], "n0": round(0.8 * people), "n_max": round(1.2 * people)}
    exact = [
        {"kind": "linear", "name": "fit", "mode": "exact"},
        {"kind": "evaluation", "name": "left_out", "of": "fit", "mode": "exact", "part": "all", "folds": True,
         "error_bound": 400},
    ]  # fmt: skip
    return {
        "private": {**told, "lineage": "warfarin-private", "aggregation": PRIVATE_SUM},
        "exact": {**told, "lineage": "warfarin-exact", "aggregation": EXACT_SUM, "analyses": exact},
    }


def warfarin_findings(mode: str, study: Study, stores: Stores, results: Mapping[str, Any]) -> list[Line]:
    """Coefficients and mean absolute error beside the pooled fit's."""
    everybody = oracles.pooled(study, stores, "all")
    cross = oracles.cross_validated_error(study, everybody)
    analyses = results["analyses"]
    if mode == "private":
        beta = oracles.coefficients(analyses["dose"]["result"])
        error = oracles.mean_absolute_error(study, everybody, beta)
        told = analyses["held_out"]["result"].get("mean_absolute_error")
        return [
            (f"epsilon {results['epsilon']:.2f}: MAE {error:.2f} mg/week, pooled least squares {cross:.2f} cross-validated "
             f"({error - cross:+.2f}, bound +0.30)", error <= cross + 0.3),
            (f"the study's own noisy held-out MAE: {told if told is None else round(told, 2)}", True),
        ]  # fmt: skip
    beta, expected = oracles.coefficients(analyses["fit"]["result"]), oracles.least_squares(everybody)
    worst = oracles.relative_difference(beta, expected)
    told = analyses["left_out"]["result"]["mean_absolute_error"]
    return [
        (f"{len(beta)} coefficients equal pooled least squares (statsmodels) to {worst:.1e} relative (bound {SAME:g})",
         worst <= SAME),
        (f"cross-validated MAE {told:.3f} mg/week, pooled {cross:.3f} (bound 0.05 apart)", abs(told - cross) <= 0.05),
    ]  # fmt: skip


# ---- 1000 Genomes ---------------------------------------------------------------------------------------------------


def hapmap_studies(skeleton: Mapping[str, Any], people: int) -> dict[str, dict[str, Any]]:
    """The private study of the skeleton, and logistic regression by exact Newton steps."""
    told = {**skeleton, "covariates": []}
    exact = [
        {"kind": "glm", "name": "score", "mode": "exact", "solver": "newton", "rounds": 25},
        {"kind": "evaluation", "name": "held_out", "of": "score", "mode": "exact"},
    ]
    return {
        "private": {**told, "lineage": "hapmap-private", "aggregation": PRIVATE_SUM},
        "exact": {**told, "lineage": "hapmap-exact", "aggregation": EXACT_SUM, "analyses": exact},
    }


def hapmap_findings(mode: str, study: Study, stores: Stores, results: Mapping[str, Any]) -> list[Line]:
    """Coefficients and AUC beside the pooled fit's."""
    expected = oracles.logistic(oracles.pooled(study, stores, "train"))
    held_out = oracles.pooled(study, stores, "test")
    beta = oracles.coefficients(results["analyses"]["score"]["result"])
    ranks = oracles.auc(held_out, beta), oracles.auc(held_out, expected)
    told = results["analyses"]["held_out"]["result"].get("auc")
    lines = [
        (f"AUC on {len(held_out.y)} held-out people {ranks[0]:.3f}, pooled logistic regression {ranks[1]:.3f}; the study's "
         f"own histogram says {_interval(told)}", True),
    ]  # fmt: skip
    if mode == "exact":
        worst = oracles.relative_difference(beta, expected)
        lines.append(
            (f"{len(beta)} coefficients equal pooled logistic regression (statsmodels) to {worst:.1e} relative "
             f"(bound {SAME:g})", worst <= SAME)
        )  # fmt: skip
    return lines


def _interval(auc: Mapping[str, Any] | None) -> str:
    return "too few people" if auc is None else f"{auc['value']:.3f} ({auc['low']:.3f} to {auc['high']:.3f})"


EXAMPLES = {
    "warfarin": Example(
        "iwpc_warfarin/iwpc_subject_data.csv", "warfarin-dose", "GRCh38",
        {"exact": ["linear", "evaluation"], "exact_iterative": True}, warfarin_studies, warfarin_findings,
    ),
    "hapmap": Example(
        "hapmap3_1kg", "risk-score", "GRCh37",
        {"exact": ["glm", "evaluation"], "exact_iterative": True}, hapmap_studies, hapmap_findings,
    ),
}  # fmt: skip


# ---- the same path for both -----------------------------------------------------------------------------------------


def main() -> int:
    """Run one example; 0 where every finding is within its bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("example", choices=sorted(EXAMPLES))
    parser.add_argument("--data", type=Path, default=os.environ.get("SEQUESTER_DATA"), help="default: SEQUESTER_DATA")
    parser.add_argument("--sites", type=int, default=5, help="the largest hospitals; 16 is all of warfarin (7 GB)")
    parser.add_argument("--mode", nargs="+", choices=("private", "exact"), default=["private", "exact"])
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
    INTERRUPTS.install()
    phases = Phases()
    work = Path(tempfile.mkdtemp(prefix="sequester-example-"))
    kept = arguments.keep
    try:
        return 0 if run(arguments, EXAMPLES[arguments.example], work, phases) else 1
    except Failed as error:
        kept = True
        phases.line(f"error: {error.message}")
        if tail := error.tail():
            phases.line(f"the end of {error.log}:\n{tail}")
        return 1
    except KeyboardInterrupt:
        phases.interrupted()
        phases.line("interrupted; everything that was started has been stopped.")
        return 130
    finally:
        if kept:
            phases.line(f"the working folder stays: {work}")
        else:
            shutil.rmtree(work, ignore_errors=True)


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
        studies = example.studies(_skeleton(data / "study.yaml"), sum(people.values()))
        if "exact" in arguments.mode:
            with phases.phase("refuse", "a hospital whose policy names no exact analysis is asked"):
                path = consortium.write_study(studies["exact"], example.template, "refused")
                said = consortium.hospital(sites[0].name, "check", str(path), "--json", statuses=(10,))
                objections = json.loads(said)["objections"]
            phases.line(f"    {sites[0].name} would refuse: {objections[0]['sentence']}")
        for site in sites:
            consortium.set_policy(site.name, example.exact_policy)
        consortium.run_sites()
        good = True
        for mode in arguments.mode:
            out = arguments.out / f"{name}-{mode}"
            with phases.phase(f"prepare {mode}", f"the {mode} study is signed, published, frozen, approved"):
                study = consortium.publish(consortium.write_study(studies[mode], example.template, mode))
                consortium.decide(study)
            with phases.phase(f"rounds {mode}", f"the {mode} study runs", live=False):
                results = consortium.run_study(study, out)
            good &= _report(mode, example, study, consortium, results, phases)
        with phases.phase("stop", "stop everything that was started"):
            consortium.processes.end()
        if consortium.processes.left_behind:
            raise Failed("something outlived its end: " + "; ".join(consortium.processes.left_behind))
        phases.line(f"peak memory (MB): {consortium.processes.watch.peaks()}")
    phases.line(f"results: {arguments.out.resolve()}")
    return good


def _report(
    mode: str, example: Example, study: Published, consortium: Consortium, results: dict[str, Any], phases: Phases
) -> bool:
    parsed = parse_study(open_document(study.signed.read_bytes(), "study", None).body_bytes)
    stores = {site: consortium.cohort(site, study.digest) for site in consortium.sites}
    found = example.findings(mode, parsed, stores, results)
    phases.line(f"  {mode}: {results['rounds']} rounds at {len(stores)} hospitals, median "
                f"{1000 * results['round_seconds']['median']:.0f} ms")  # fmt: skip
    for text, within in found:
        phases.line(f"  {mode}: {text}" + ("" if within else "   <-- OUTSIDE"))
    return all(within for _, within in found)


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
