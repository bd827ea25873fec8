"""A whole study with separate processes on this machine: one coordinator, four hospitals, made-up people, a real report.

    make demo            or        python deploy/demo/demo.py [--out demo-out] [--keep]

It does what people would do, through the same commands: found, enrol, compare fingerprints, pin, approve, run, read. What it
leaves in `demo-out/`: report.html, results.json, the scoring file, every hospital's receipt. Everything it started is
stopped again, also after Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
from collections import Counter
from pathlib import Path
from typing import Any

import simulation

from sequester.one_machine.consortium import Consortium, Published, Site
from sequester.one_machine.phases import Phases
from sequester.one_machine.processes import Failed, Running, python
from sequester.one_machine.script import carried_out

CONSORTIUM, EPSILON, PEOPLE = "demo", 3, 10_000
HELD_OUT = 0.4
SIMULATE_S = 300.0
# Public shares of the patients, as a register outside the hospitals would give them; anybody else is `other`. The register
# knows of AMR, the four hospitals have none: the report must withhold such a group, and say so.
ANCESTRIES = {"AFR": "0.27", "AMR": "0.005", "EAS": "0.27", "EUR": "0.45"}
# What the demo's hospitals answer to. The AUC of everybody adds up the noise of five groups' histograms: so 40 % are held
# out, and the evaluation has most of the budget, of which training needs little at 18 features. Then the intervals of
# everybody and of the three groups keep their coverage. Opacus clips each patient's gradient. Step scale 4: rehearsed on
# other seeds, within 0.005 of the pooled fit.
ANALYSES = [
    {
        "kind": "training",
        "name": "score",
        "gradients": "hooks",
        "rounds": 10,
        "step_scale": 4,
        "average_last": 0.5,
        "budget": 0.15,
    },
    {"kind": "evaluation", "name": "held_out", "of": "score", "bins": 10, "budget": 0.85},
]
NOT_ISOLATED = """WARNING: this machine gives no network namespaces, so compute is not isolated. A real hospital would
refuse here. These people are made up: the demo's hospitals write `allow_unisolated = true` into their
policies, and every approval, receipt and report says so."""
DEPARTURES = """Where this departs from a real deployment:
  * coordinator, exchange and all hospitals share one machine and one account; in a real consortium the exchange's account
    can read neither the signing key nor the certificate authority, and each hospital is a machine of its own;
  * a script compared the fingerprints, which people read to each other by telephone;
  * a script approved the study, which a person reads first (`sequester-client show`);
  * `best_site` and `pooled` were computed from all hospitals' files at once, which nobody outside a simulation can do."""


def main() -> int:
    """Run the demo; 0 where everything worked, 1 with one error otherwise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="where the results go; default demo-out")
    parser.add_argument("--people", type=int, default=PEOPLE)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--keep", action="store_true", help="keep the working folder: homes, genotypes, logs")
    arguments = parser.parse_args()

    def act(work: Path, phases: Phases) -> bool:
        run(work, arguments.out, arguments.people, arguments.seed, phases)
        return True

    hint = "everything it wrote lies in {work}; `sequester-client doctor --home` tests a hospital there"
    return carried_out("demo", act, arguments.keep, hint)


def run(work: Path, out: Path, people: int, seed: int, phases: Phases) -> None:
    """The whole story; `Failed` at the first thing that does not work."""
    out.mkdir(parents=True, exist_ok=True)
    data = work / "data"
    names = sorted(hospital.name for hospital in simulation.FOUR)
    phases.line(f"Sequester demo: {len(names)} hospitals, about {people:,} made-up people of three ancestries.")
    with Consortium(work, phases.say) as consortium:
        simulating = _simulate(consortium, data, people, seed)
        with phases.phase("found", "found the consortium, start the exchange"):
            consortium.found(CONSORTIUM)
        sites = [Site(name, data / name / "phenotypes.csv", data / name / "genotypes") for name in names]
        with phases.phase("enrol", "hospitals make their keys and enrol"):
            consortium.enrol(sites)
        with phases.phase("pin", "hospitals compare and pin each other's fingerprints"):
            consortium.pin()
        with phases.phase("simulate", "finish the made-up genomes (begun at the start)"):
            counts: dict[str, int] = json.loads(consortium.processes.finish(simulating, SIMULATE_S).splitlines()[-1])
        phases.line("           " + ", ".join(f"{name} {counts[name]:,}" for name in names) + " people")
        with phases.phase("doctor", "every hospital tests its own installation"):
            isolated = consortium.require_sound()
        if not isolated:
            phases.line(NOT_ISOLATED)
        consortium.run_sites()
        with phases.phase("write", "the coordinator writes, signs and publishes the study"):
            fields = study_fields(json.loads((data / "study.json").read_text("utf-8")), people)
            study = consortium.publish(consortium.write_study(fields))
            trial = consortium.try_out(study)  # as every hospital will, before it joins
        with phases.phase("approve", "hospitals read it, freeze their cohorts, approve"):
            consortium.decide(study)
        with phases.phase("rounds", f"the study {study.digest[:12]} runs", live=False):
            results = consortium.run_study(study, out, trial)
        with phases.phase("audit", "stop the hospitals, read and verify their ledgers"):
            consortium.stop_sites()
            ledgers, audits = consortium.ledgers(), consortium.audits()
            receipts = _receipts(consortium, study, out)
        for site, verdict in audits.items():
            phases.line(f"           {site}: {verdict}")
        with phases.phase("compare", "fit each hospital alone and all pooled, for comparison"):
            auc = _compare(consortium, study, results)
        with phases.phase("stop", "stop everything that was started"):
            consortium.processes.end()
        if consortium.processes.left_behind:
            raise Failed("something outlived its end: " + "; ".join(consortium.processes.left_behind))
        peaks = consortium.processes.watch.peaks()
        peaks["demo"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    results |= {
        "auc": {key: auc[key] for key in ("federated", "best_site", "pooled")},
        "auc_detail": auc,
        "people": counts,
        "session_seconds": results["wall_seconds"],
        "wall_seconds": {name: round(seconds, 2) for name, seconds in phases.seconds.items()},
        "peak_rss_mb": peaks,
        "bytes_up_control": {site: _control_bytes(ledger) for site, ledger in ledgers.items()},
        "isolation": {site: body["isolation"] for site, body in receipts.items()},
    }
    (out / "results.json").write_text(json.dumps(results, indent=2, sort_keys=True) + "\n", "utf-8")
    _tell(results, ledgers, study, out, phases)


def _simulate(consortium: Consortium, data: Path, people: int, seed: int) -> Running:
    """The made-up genomes, written by a process of their own while the hospitals enrol."""
    script = Path(simulation.__file__)
    command = python(str(script), str(data), "--people", str(people), "--seed", str(seed))
    return consortium.processes.start("simulation", "simulation", command, lives_on=False)


def study_fields(public: dict[str, Any], people: int) -> dict[str, Any]:
    """What the coordinator writes into study.yaml: the simulation's public part, and what is asked of it."""
    training = round(people * (1 - HELD_OUT))
    glm = {**ANALYSES[0], "prevalence": float(public["prevalence"])}
    return {
        "lineage": "demo-risk-score",
        "title": {"en": "A risk score for a made-up disease"},
        "summary": {
            "en": f"A logistic model on {len(public['variants'])} published variants, age and sex, trained on all "
            "hospitals together with differential privacy. The people are simulated.\n"
        },
        "question": "How well do published variants predict the disease in patients that did not train the model?",
        "ethics": [{"reference": "none needed: the people are simulated", "expires": "2099-01-01T00:00:00Z"}],
        "agreement": [{"reference": "none needed: the people are simulated", "expires": "2099-01-01T00:00:00Z"}],
        "genome_build": public["genome_build"],
        "phenotype": public["phenotype"],
        "covariates": public["covariates"],
        "variants": public["variants"],
        "cohort": {
            "where": [],
            "test_fraction": HELD_OUT,
            "subgroup": public["subgroup"],
            "subgroup_values": list(ANCESTRIES),
            "subgroup_shares": list(ANCESTRIES.values()),
        },
        "analyses": [glm, ANALYSES[1]],
        "privacy": {"epsilon": EPSILON, "delta": "0.000001", "order": 8.9},
        "n0": training,
        "n_max": round(people * 1.2),
    }


def _receipts(consortium: Consortium, study: Published, out: Path) -> dict[str, dict[str, Any]]:
    """Each hospital's own receipt, by hospital; the coordinator must have been given the same."""
    own = {site: consortium.receipt(site, study.digest) for site in consortium.sites}
    for site, body in own.items():
        if json.loads((out / "receipts" / f"{site}.json").read_bytes())["body"] != body:
            raise Failed(f"the coordinator's receipt of {site} is not the one that {site} keeps")
    return own


def _compare(consortium: Consortium, study: Published, results: dict[str, Any]) -> dict[str, Any]:
    """AUC of the study (from its noisy histogram), and of what a single machine with all files could have fitted."""
    from comparison import compare

    from sequester.protocols.signing import open_document
    from sequester.protocols.study import parse_study

    told = results["analyses"]["held_out"]["result"]
    if "auc" not in told:
        raise Failed(f"the study's evaluation gives no AUC: {told}")
    weights = {row["name"]: row["standardised"] for row in results["analyses"]["score"]["result"]["weights"]}
    parsed = parse_study(open_document(study.signed.read_bytes(), "study", None).body_bytes)
    found = compare(parsed, {site: consortium.cohort(site, study.digest) for site in consortium.sites}, weights)
    return {
        "federated": told["auc"]["value"],
        "federated_interval": [told["auc"].get("low"), told["auc"].get("high")],
        "federated_without_noise_in_the_evaluation": found.released,
        "best_site": found.best_site,
        "by_site": found.by_site,
        "pooled": found.pooled,
        "held_out_patients": found.held_out,
    }


def _tell(
    results: dict[str, Any], ledgers: dict[str, dict[str, Any]], study: Published, out: Path, phases: Phases
) -> None:
    """Where the report is, what was learnt, what left, what it cost."""
    auc = results["auc_detail"]
    low, high = auc["federated_interval"]
    weights = sorted(results["analyses"]["score"]["result"]["weights"], key=lambda row: -abs(row["standardised"]))
    phases.line()
    phases.line(f"The report: {(out / 'report.html').resolve()}")
    phases.line(f"            {(out / 'results.json').resolve()}")
    phases.line()
    phases.line(f"Learnt: a risk score of {len(weights)} features that ranks held-out patients with")
    # none where its coverage is not verified at this size
    interval = (
        f" (95 % interval {low:.3f} to {high:.3f}, noise included)" if low is not None and high is not None else ""
    )
    phases.line(f"  AUC {auc['federated']:.3f}{interval},")
    phases.line(f"  where the best hospital alone reaches {auc['best_site']:.3f} and all files pooled, unprotected,")
    phases.line(f"  {auc['pooled']:.3f} ({auc['held_out_patients']:,} held-out patients).")
    phases.line(_by_ancestry(results["analyses"]["held_out"]["result"]["groups"]))
    phases.line("  It weighs most: " + ", ".join(
        f"{row['name']} {row['standardised']:+.2f}" for row in weights[:4]
    ) + ".")  # fmt: skip
    phases.line()
    phases.line("Left each hospital, by its own ledger (bytes):")
    for site, ledger in ledgers.items():
        kinds: Counter[str] = Counter()
        for row in ledger["rows"]:
            if row.get("kind") == "egress" and row.get("study") == study.digest:
                kinds[row["what"]] += row["bytes"] * row.get("times", 1)
        kinds["Flower's control connection"] = _control_bytes(ledger)
        listed = ", ".join(f"{what} {size:,}" for what, size in kinds.most_common())
        phases.line(f"  {site:8} {sum(kinds.values()):>10,}   {listed}")
    phases.line(f"  in {results['rounds']} rounds of {1000 * results['round_seconds']['median']:.0f} ms (median).")
    phases.line()
    promise = results["promise"]
    phases.line(f"Cost every patient: epsilon {promise['pld_without_spares']:.2f} at delta {float(results['delta']):g}")
    phases.line(
        f"  ({promise['pld']:.2f} had every spare attempt been used; the study allows {EPSILON}). Nothing left without noise."
    )
    phases.line(_released(json.loads((out / "certificate.json").read_text("utf-8"))))
    phases.line()
    phases.line(DEPARTURES)
    total = sum(phases.seconds.values())
    phases.line(
        f"\n{total:.0f} s in all, {os.cpu_count()} cores; peak memory {results['peak_rss_mb']['all at once']} MB."
    )


def _by_ancestry(groups: dict[str, Any]) -> str:
    """The equity gap, and the groups of whom nothing is told."""
    from sequester.server.report.findings import equity_gap, hidden, interval
    from sequester.server.report.pieces import listed

    shown = ", ".join(f"{name} {interval(row['auc'])}" for name, row in groups.items() if "auc" in row)
    gap, _ = equity_gap(groups)
    told = f"  By ancestry: {shown or 'too few patients'}; equity gap {'not known' if gap is None else f'{gap:.3f}'}."
    withheld = hidden(groups)
    return told + (f"\n  Withheld: {listed(withheld)}." if withheld else "")


def _released(certificate: dict[str, Any]) -> str:
    """What the release gate found, on which size, and the coordinator's own lower bound on epsilon."""
    sites = certificate["release_gate"]["sites"]
    passed = sum(row["verdict"] == "passed" for row in sites.values())
    form, tried = next((row["form"], row["tried"][0]) for row in sites.values() if "tried" in row)
    bound = certificate["evidence"]["audit_lower_bound"]
    (claim,) = (row["claim"] for row in bound["models"].values())
    return (
        f"Release gate: passed at {passed} of {len(sites)} hospitals before they joined ({form} form: {tried['patients']:,} "
        f"made-up patients,\n  {tried['canaries']} canaries, {tried['runs']} trainings). The coordinator's own trial finds "
        f"epsilon of the score at least {bound['value']:.2f}, claimed {claim:.2f}."
    )


def _control_bytes(ledger: dict[str, Any]) -> int:
    """What a hospital's SuperNode sent through the gate's forwarder: TLS bytes of registrations, polls and one answer."""
    return sum(row["bytes"] for row in ledger["rows"] if row.get("kind") == "control")


if __name__ == "__main__":
    raise SystemExit(main())
