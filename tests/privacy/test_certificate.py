"""The certificate states every item that spec/privacy.md, section 1, asks of a release: in JSON, and on the page."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest

import reported
from sequester.protocols import privacy
from sequester.protocols.errors import PrivacyError, StudyError
from sequester.protocols.study import Study
from sequester.server.report.results_folder import write

# Section 1, from its first line to its last: what a release must state -> where the certificate does, and what the page says.
SECTION_1: tuple[tuple[str, str, str], ...] = (
    # unit, adjacency, sizes
    ("unit: one patient's whole record at one site", "unit.means", "one patient's whole record at one hospital"),
    ("a patient at k sites: k = 2 is printed", "epsilon.two_copies", r"two hospitals \(k = 2\)"),
    ("private set intersection is off: nobody looks for the same patient", "not_covered", "same person at two"),
    ("relatives are units of their own", "not_covered", "relatives: each person"),
    ("adjacency, named in every report", "adjacency", "Adjacency: add-remove"),
    ("what the adjacency compares", "adjacency_means", "with and without any one patient"),
    ("n, site sizes and case counts are never published exactly", "sizes", "never published exactly"),
    ("n0 is declared", "public_inputs.n0", "n0 30000"),
    ("n_max is declared", "public_inputs.n_max", "n_max 40000"),
    # epsilon and delta
    ("epsilon of the study", "epsilon.reported", "Reported, all rounds and spare attempts"),
    ("epsilon of each release", "releases.0.epsilon", "ε alone"),
    ("delta, x 1.001", "delta.stated", "0.000001001"),
    ("one delta for a whole ledger, below 1 / n_max", "delta.means", "one delta for a whole ledger"),
    ("epsilon per site from charges actually spent", "sites.lake.epsilon", "ε spent"),
    ("the charges themselves", "sites.lake.charges.score", r"\bscore 10\b"),
    ("per site, with k = 2", "sites.lake.two_copies", "k = 2"),
    ("per site, of each release", "sites.lake.releases.score.epsilon", "ε of each release: score"),
    ("per site, of each release, with k = 2", "sites.lake.releases.score.two_copies", "k = 2"),
    ("per site, delta", "sites.lake.delta", "0.000001001"),
    ("per site, over the life of the data", "sites.lake.life.epsilon", "Over the life of its data: ε 4.300"),
    ("per site, over the life of the data, with k = 2", "sites.lake.life.two_copies", "k = 2 10.100"),
    ("per site, over the life of the data, delta", "sites.lake.life.delta", "at delta 0.000001001"),
    ("no one epsilon for sites whose epsilons differ", "life.because", "hospitals differ"),
    # exact lines: named in another study's certificate below
    ("exact lines by name", "exact", ""),
    ("iterative exact trusts the exchange to broadcast honestly", "exact_trusts_broadcasts", ""),
    # mechanism
    ("mechanism", "releases.0.mechanism", "Gaussian, distributed discrete shares"),
    ("sigma", "releases.0.sigma", "σ noise multiplier"),
    ("C", "releases.0.C", "C bound on what one patient changes"),
    ("q", "releases.0.q", "q share sampled"),
    ("T", "releases.0.T", "T rounds"),
    ("R", "releases.0.R", "R spare attempts"),
    ("accountant", "accountant.library", "dp-accounting"),
    ("and its version", "accountant.version", "dp-accounting 0"),
    ("the filter's order", "accountant.order", "Renyi filter at one order, 8.9"),
    ("bound on contributions per patient", "contributions_per_patient", "a second row is refused"),
    # trust
    ("S", "trust.S", "N, hospitals in the roster"),
    ("a", "trust.a", "a, absences"),
    ("u", "trust.u", "u, smallest set"),
    ("c", "trust.c", "c, hospitals that may collude"),
    ("h", "trust.h", "h, honest shares"),
    ("f, at least 1", "trust.f", "f, shares not counted on"),
    ("mode", "trust.mode", "mode strict"),
    ("key holders", "trust.key_holders", "each hospital holds its own keys"),
    ("worst-case epsilon: all other sites collude", "trust.worst_case_epsilon", "If all other hospitals collude"),
    ("computational DP", "trust.kind", "omputational differential privacy"),
    ("the exchange may be malicious with up to c sites", "trust.exchange", "may be malicious, together with up to 1"),
    ("any broadcast: the bound holds; charges beyond T + R refused", "trust.broadcasts", r"refuses any beyond T \+ R"),
    ("public and model holders", "trust.holders", "holds the published figures or the model"),
    ("compute and gate are the site's custodian", "not_covered", "own compute and gate"),
    # not promised
    ("correctness against a malicious site", "not_covered", "correctness against a hospital that sends wrong numbers"),
    ("site names, cohort, architecture, timing, sizes, failures", "not_covered", "the names of the hospitals"),
    ("join or not", "not_covered", "joined or did not join"),
    ("raw DNA never leaves: about data flow, stated apart", "not_covered", "not about differential privacy"),
    ("no refusal depends on patients after approval", "implementation.refusals", "none depends on patients after approval"),
    # the rest of the statement
    ("budget policy and refresh", "budget_policy", "never refreshed by this study"),
    ("implementation: random source", "implementation.random_source", "AES-CTR"),
    ("implementation: integer arithmetic", "implementation.noise", "in integers"),
    ("implementation: timing", "implementation.timing", "answer time is not padded"),
    ("implementation: sizes", "implementation.message_sizes", "fixed by the signed study"),
    ("implementation: logs", "implementation.logs", "counts, positions in files"),
    ("implementation: access control", "implementation.access", "share a socket and nothing else"),
    ("public data used", "public_inputs.variant_frequencies", "frequencies of 8 variants"),
    ("hyper-parameters: their values", "hyper_parameters.values.score.rounds", "rounds 10"),
    ("hyper-parameters: how chosen", "hyper_parameters.chosen", "fixed in the signed study"),
    ("hyper-parameters: whether charged", "hyper_parameters.charged", "Charged: 0"),
    ("AUC per ancestry group under DP", "groups.by_evaluation.held_out.EUR.auc.value", r"EUR: auc 0\.\d{3}"),
    ("noise hits small groups hardest", "groups.because", "oise costs small groups most"),
    ("evidence: tests", "evidence.tests", "one test for each claim"),
    ("evidence: audit lower bounds", "evidence.audit_lower_bound.value", "at least 0.31 from the model"),
    ("evidence: padding sigma", "evidence.noise_on_padding.ratio", "1.0031"),
    ("pass or fail from canaries and simulated cohorts only", "release_gate.sites.lake.verdict", "lake passed short"),
)  # fmt: skip


def trial(of: Study, **changed: Any) -> bytes:
    """What `audit release study.json --json` prints, its figures made up."""
    checks = [
        {"check": name, "passed": True, "figures": {"median": value}, "sentence": "."}
        for name, value in (("canaries", 0.31), ("white_box", 0.27))
    ]
    row = {"analysis": "score", "claim": 2.39, "passed": True, "size": {"patients": 2000, "runs": 3}, "checks": checks}
    said = {"format": 1, "study": privacy.study_digest(of), "passed": True, "models": [row]}
    return json.dumps(said | changed).encode()


def at(statement: Any, path: str) -> Any:
    for step in path.split("."):
        statement = statement[int(step)] if step.isdigit() else statement[step]
    return statement


@pytest.fixture(scope="module")
def held() -> dict[str, Any]:
    study = reported.private_study()
    return reported.held_by_coordinator(study, reported.run(study, n=6000))


def written(folder: Path, held: dict[str, Any], **more: Any) -> tuple[dict[str, Any], str]:
    """The certificate, and the words of the page."""
    write(folder, **held, **more)
    page = re.sub(r"<style>.*?</style>|<[^>]+>", " ", (folder / "report.html").read_text("utf-8"), flags=re.DOTALL)
    return json.loads((folder / "certificate.json").read_text("utf-8")), " ".join(html.unescape(page).split())


@pytest.fixture(scope="module")
def complete(held: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    return written(tmp_path_factory.mktemp("complete"), held, audit=trial(held["study"]))


@pytest.mark.parametrize(("item", "path", "words"), SECTION_1, ids=[item for item, _, _ in SECTION_1])
def test_every_item_of_section_1_is_in_the_certificate_and_on_the_page(
    complete: tuple[dict[str, Any], str], item: str, path: str, words: str
) -> None:
    statement, page = complete
    value = at(statement, path)
    assert value is not None and value != "", path
    assert words == "" or re.search(words, page), words
    if path == "not_covered":
        assert any(re.search(words, line) for line in value)


def test_no_key_of_the_certificate_is_there_by_accident(complete: tuple[dict[str, Any], str]) -> None:
    named = {path.split(".")[0] for _, path, _ in SECTION_1}
    assert set(complete[0]) == named | {"format", "study", "lineage", "rehearsal", "versions"}


def test_trust_leaves_at_least_one_share_out_and_delta_is_below_one_over_n_max(
    complete: tuple[dict[str, Any], str],
) -> None:
    statement, _ = complete
    assert statement["trust"]["f"] >= 1
    assert statement["delta"]["stated"] < statement["delta"]["one_over_n_max"] == 1 / 40_000


def test_exact_lines_are_named_and_then_there_is_no_epsilon_for_life(tmp_path: Path) -> None:
    of = reported.exact_study()
    statement, page = written(tmp_path, reported.held_by_coordinator(of, reported.run(of, n=3000)))
    assert statement["exact"] == ["score", "held_out"] and statement["exact_trusts_broadcasts"] == ["score", "held_out"]
    assert statement["life"]["epsilon"] is None
    life = statement["sites"]["lake"]["life"]
    assert life["epsilon"] is None and life["private_releases_alone"] == 4.3
    assert life["exact"] == [f"{privacy.study_digest(of)[:12]}/score", f"{privacy.study_digest(of)[:12]}/held_out"]
    assert (
        "a dishonest exchange can read single patients" in page
        and "Trusting what the exchange broadcasts: score, held_out" in page
    )
    assert statement["evidence"]["audit_lower_bound"]["because"].startswith("the study has no private model")


def test_an_exact_release_of_another_study_takes_the_epsilon_for_life_away(
    tmp_path: Path, held: dict[str, Any]
) -> None:
    bodies = reported.receipt_bodies(held["study"])
    bodies["lake"]["life"]["exact"] = ["0123456789ab/scan"]
    statement, page = written(tmp_path, held | {"receipt_documents": reported.signed(bodies)})
    assert statement["sites"]["lake"]["life"]["epsilon"] is None
    assert statement["sites"]["north"]["life"]["epsilon"] == 4.4
    assert "ε of the private releases alone 4.300" in page and "exact: 0123456789ab/scan" in page


def test_receipts_of_a_program_that_did_not_say_it_stay_readable(tmp_path: Path, held: dict[str, Any]) -> None:
    bodies = reported.receipt_bodies(held["study"])
    del bodies["lake"]["life"], bodies["north"]
    statement, page = written(tmp_path, held | {"receipt_documents": reported.signed(bodies)})
    assert statement["sites"]["lake"]["life"]["because"].startswith("its program does not say it")
    assert statement["sites"]["north"]["life"]["because"] == "no receipt arrived"
    assert "not known, no receipt arrived" in page


@pytest.mark.parametrize(
    "life",
    [3, {}, {"epsilon": -1, "two_copies": 1, "delta": "0.1", "exact": []},
     {"epsilon": 1, "two_copies": 1, "delta": "x", "exact": []},
     {"epsilon": 1, "two_copies": 1, "delta": "0.1", "exact": ["\x1b"]},
     {"epsilon": True, "two_copies": 1, "delta": "0.1", "exact": []}],
)  # fmt: skip
def test_a_life_that_is_no_figures_is_refused_by_name(tmp_path: Path, held: dict[str, Any], life: Any) -> None:
    bodies = reported.receipt_bodies(held["study"])
    bodies["lake"]["life"] = life
    with pytest.raises(StudyError, match="receipt of lake: what it says of its data set's whole life"):
        write(tmp_path, **held | {"receipt_documents": reported.signed(bodies)})


def test_without_a_trial_of_the_coordinators_own_the_bound_is_not_told_and_why(
    tmp_path: Path, held: dict[str, Any]
) -> None:
    statement, page = written(tmp_path, held)
    assert statement["evidence"]["audit_lower_bound"]["value"] is None
    assert "a hospital publishes pass or fail of its audit and no figure" in page


def test_a_trial_of_another_study_or_one_that_failed_or_is_none_exports_nothing(
    tmp_path: Path, held: dict[str, Any]
) -> None:
    of = held["study"]
    for data, error, said in (
        (trial(of, study="ab" * 32), StudyError, "the audit is of study abab"),
        (trial(of, models=[]), StudyError, "the audit is of study"),
        (trial(of).replace(b"0.31", b"NaN"), StudyError, "the audit is not what"),
        (b"", StudyError, "the audit is not what"),
        (b"[]", StudyError, "the audit is not what"),
        (trial(of, passed=False), PrivacyError, "own trial failed"),
    ):
        with pytest.raises(error, match=said):
            write(tmp_path, **held, audit=data)
    assert not list(tmp_path.iterdir())
