"""The folder a coordinator takes away: complete, verified first, and never written over by accident."""

from __future__ import annotations

import gzip
import html
import json
import re
import stat
from pathlib import Path
from typing import Any

import pytest
from pgscatalog.core.lib.models import CatalogScoreHeader
from pgscatalog.core.lib.scorefiles import ScoringFile

import contracts
import released
import reported
from sequester.protocols import accounting, privacy
from sequester.protocols.errors import PrivacyError, StudyError
from sequester.protocols.release import Documents
from sequester.protocols.signing import sign_document
from sequester.protocols.study import study_json
from sequester.server.report.results_folder import scoring_files, variant_weights, write
from sequester.server.rounds import results_bytes


@pytest.fixture(scope="module")
def held() -> dict[str, Any]:
    study = reported.private_study()
    return reported.held_by_coordinator(study, reported.run(study, n=3000))


def _files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_folder_holds_everything_and_a_second_writing_changes_nothing(tmp_path: Path, held: dict[str, Any]) -> None:
    folder = tmp_path / "results"
    paths = write(folder, **held)
    names = {str(p.relative_to(folder)) for p in paths}
    assert names == set(_files(folder)) == {
        "results.json", "report.html", "certificate.json", "prs_rs.json", "study.json", "risk_scoring_file.txt.gz",
        "receipts/harbor.json", "receipts/lake.json", "receipts/north.json", "release.json", "model_card.md",
    }  # fmt: skip
    before = _files(folder)
    assert write(folder, **held) == paths and _files(folder) == before
    assert before["results.json"] == held["results_json"] and before["study.json"] == held["study_document"]
    assert all(stat.S_IMODE(p.stat().st_mode) == 0o644 for p in paths)


def test_a_file_of_other_content_is_left_alone_unless_told(tmp_path: Path, held: dict[str, Any]) -> None:
    (tmp_path / "report.html").write_bytes(b"mine")
    with pytest.raises(StudyError, match=r"report\.html is there already"):
        write(tmp_path, **held)
    assert _files(tmp_path) == {"report.html": b"mine"}
    write(tmp_path, **held, overwrite=True)
    assert (tmp_path / "report.html").read_bytes().startswith(b"<!doctype html>")


def test_a_receipt_signed_by_another_hospital_is_refused_by_name(tmp_path: Path, held: dict[str, Any]) -> None:
    bodies = reported.receipt_bodies(held["study"])
    forged = held["receipt_documents"] | {"lake": sign_document("receipt", bodies["lake"], contracts.SITES["north"])}
    with pytest.raises(StudyError, match="receipt of lake: signed by"):
        write(tmp_path, **held | {"receipt_documents": forged})
    assert _files(tmp_path) == {}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"study": "ab" * 32}, "about study"),
        ({"site": "north"}, "about study"),
        ({"charges": {"score": 13}}, "the study reserves 12"),
        ({"charges": {"score": -1}}, "charges"),
        ({"charges": {"unknown": 1}}, "the study reserves 0"),
        ({"charges": {"score": True}}, "charges"),
        ({"charges": None}, "missing"),
        ({"isolation": "a\x1b[2Jb"}, "isolation"),
        ({"isolation": "x" * 301}, "isolation"),
        ({"ledger": {"counter": 1, "head": "zz"}}, "ledger"),
        ({"bytes_up": "many"}, "bytes_up"),
        ({"allow_unisolated": "no"}, "allow_unisolated"),
    ],
)
def test_a_receipt_that_says_something_else_is_refused_by_name(
    tmp_path: Path, held: dict[str, Any], changed: dict[str, Any], said: str
) -> None:
    bodies = reported.receipt_bodies(held["study"])
    bodies["lake"] |= changed
    with pytest.raises(StudyError, match=f"receipt of lake: .*{said}"):
        write(tmp_path, **held | {"receipt_documents": reported.signed(bodies)})
    assert _files(tmp_path) == {}


def test_a_receipt_of_a_stranger_is_refused(tmp_path: Path, held: dict[str, Any]) -> None:
    documents = held["receipt_documents"] | {"../lake": held["receipt_documents"]["lake"]}
    with pytest.raises(StudyError, match="no hospital of this study"):
        write(tmp_path / "results", **held | {"receipt_documents": documents})
    assert _files(tmp_path) == {}


def test_results_and_study_that_do_not_belong_together_are_refused(tmp_path: Path, held: dict[str, Any]) -> None:
    other = sign_document("study", study_json(reported.private_study(n0=30001)), contracts.COORDINATOR)
    results = json.loads(held["results_json"])
    del results["analyses"]["held_out"]
    wrong = [
        ({"study_document": other}, "the signed study is"),
        ({"digest": "0" * 64}, "the signed study is"),
        ({"study_document": held["study_document"][:-1]}, "not a signed document"),
        ({"results_json": b"{}"}, "not what the exchange writes"),
        ({"results_json": results_bytes(results)}, "analyses score"),
    ]
    for changed, said in wrong:
        with pytest.raises(StudyError, match=said):
            write(tmp_path, **held | changed)
    assert _files(tmp_path) == {}


def test_no_model_without_a_pass_of_every_hospital(tmp_path: Path, held: dict[str, Any]) -> None:
    study = held["study"]
    for documents, found in (
        (Documents(), "harbor missing, lake missing, north missing"),
        (Documents(released.verdicts(study, lake="missing")), "lake missing"),
        (Documents(released.verdicts(study, lake="failed")), "lake failed"),
    ):
        with pytest.raises(PrivacyError, match=f"the release gate: {found}; a pass of every hospital was expected"):
            write(tmp_path, **held | {"release_documents": documents})
    forged = released.verdicts(study) | {"lake": released.verdict(study, "lake", key=contracts.SITES["north"])}
    with pytest.raises(StudyError, match="verdict of lake: signed by"):
        write(tmp_path, **held | {"release_documents": Documents(forged)})
    assert _files(tmp_path) == {}


def test_a_waiver_lets_the_model_out_and_is_printed_with_its_reason_and_its_names(
    tmp_path: Path, held: dict[str, Any]
) -> None:
    study = held["study"]
    waiver = released.waiver(study, {"lake": "failed"}, "Its libraries are older; checked <by hand>.")
    verdicts = released.verdicts(study, lake="failed")
    with pytest.raises(PrivacyError, match="lacks the countersignature of north"):
        two = released.countersigned(study, waiver, ["harbor", "lake"])
        write(tmp_path, **held | {"release_documents": Documents(verdicts, waiver, two)})
    everybody = released.countersigned(study, waiver)
    by_lake = released.waiver(study, {"lake": "failed"}, key=contracts.SITES["lake"])
    with pytest.raises(StudyError, match="waiver of the coordinator: signed by"):
        write(tmp_path, **held | {"release_documents": Documents(verdicts, by_lake, everybody)})
    assert _files(tmp_path) == {}
    write(tmp_path, **held | {"release_documents": Documents(verdicts, waiver, everybody)})
    page = html.unescape((tmp_path / "report.html").read_text("utf-8"))
    first = page[page.index("<section") : page.index("</section>")]
    assert "Release gate waived" in first and "lake failed" in first and "checked <by hand>." in first
    assert "countersigned by harbor, lake, north" in first
    found = json.loads((tmp_path / "certificate.json").read_text())["release_gate"]
    assert found["granted_by"] == "waiver" and found["waiver"]["countersigned"] == ["harbor", "lake", "north"]
    assert found["sites"]["lake"]["verdict"] == "failed" and found["sites"]["north"]["verdict"] == "passed"
    kept = json.loads((tmp_path / "release.json").read_text())
    assert Documents.from_json(kept) == Documents(verdicts, waiver, everybody)


@pytest.mark.parametrize("ratio", [0.9, 0.5**0.5, None])
def test_a_release_with_less_noise_than_promised_is_not_exported(
    tmp_path: Path, held: dict[str, Any], ratio: Any
) -> None:
    results = json.loads(held["results_json"]) | {"noise_on_padding": ratio}
    with pytest.raises(PrivacyError, match="of what was promised"):
        write(tmp_path, **held | {"results_json": results_bytes(results)})
    assert _files(tmp_path) == {}


def test_the_scoring_file_is_read_by_pgscatalog_core_with_the_released_weights(
    tmp_path: Path, held: dict[str, Any]
) -> None:
    study = held["study"]
    write(tmp_path, **held)
    path = tmp_path / "risk_scoring_file.txt.gz"
    score = ScoringFile(str(path))
    assert score.genome_build.value == study.genome_build
    rows = list(score.variants)
    weights = variant_weights(study, json.loads(held["results_json"])["analyses"]["score"]["result"])
    assert len(rows) == len(study.variants)
    for row, variant in zip(rows, study.variants, strict=True):
        assert (row.rsID, row.chr_name, row.chr_position) == (variant.id, variant.chromosome, variant.position)
        assert (str(row.effect_allele), str(row.other_allele)) == (variant.effect, variant.other)
        assert float(row.effect_weight) == pytest.approx(weights[variant.id], rel=5e-4)  # four significant digits
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    header = dict(line[1:].split("=", 1) for line in lines if re.match(r"#\w+=", line))
    assert header["study_digest"] == held["digest"]
    # the catalogue's own header model: a study outside the catalogue has no accession, everything else must hold
    accessions = {"pgs_id": "PGS000000", "pgp_id": "PGP000000"}
    full = CatalogScoreHeader(**{k: v for k, v in header.items() if k in CatalogScoreHeader.model_fields} | accessions)
    assert full.variants_number == len(rows) and full.format_version.value == "2.0"


def test_a_published_score_in_the_model_is_part_of_its_variants_weights() -> None:
    # the linear predictor from the scoring file is the model's own, up to a constant, where no score is clamped
    study = reported.private_study(
        scores=[{"name": "known", "weights": [["rs1000", "0.3"], ["rs1037", "-0.2"]], "mean": "0.1", "sd": "0.5"}]
    )
    per_unit = {feature.name: 0.1 * (i + 1) for i, feature in enumerate(study.features())}
    result = {"weights": [{"name": name, "per_unit": value} for name, value in per_unit.items()]}
    weights = variant_weights(study, result)
    assert weights["rs1000"] == pytest.approx(per_unit["rs1000"] + 0.3 * per_unit["known"])
    assert weights["rs1037"] == pytest.approx(per_unit["rs1037"] - 0.2 * per_unit["known"])
    assert weights["rs1074"] == per_unit["rs1074"]


def test_epsilon_comes_from_the_signed_study_whatever_the_results_say(tmp_path: Path, held: dict[str, Any]) -> None:
    results = json.loads(held["results_json"]) | {"epsilon": 0.5, "promise": None, "exact": []}
    write(tmp_path, **held | {"results_json": results_bytes(results)})
    promise = privacy.promise(held["study"])
    assert promise is not None
    header = gzip.decompress((tmp_path / "risk_scoring_file.txt.gz").read_bytes()).decode()
    assert f"#epsilon={promise.pld:.4g}\n" in header
    assert f"epsilon {promise.pld:.2f} at delta" in (tmp_path / "report.html").read_text()


def test_a_model_of_the_table_alone_has_no_scoring_file(held: dict[str, Any]) -> None:
    study, results = held["study"], json.loads(held["results_json"])
    rows = results["analyses"]["score"]["result"]["weights"]
    assert set(scoring_files(study, held["digest"], results)) == {"risk_scoring_file.txt.gz"}
    results["analyses"]["score"]["result"]["weights"] = [row for row in rows if row["kind"] != "variant"]
    assert scoring_files(study, held["digest"], results) == {}


def test_the_certificate_says_what_each_hospital_spent_from_its_own_charges(
    tmp_path: Path, held: dict[str, Any]
) -> None:
    study = held["study"]
    bodies = reported.receipt_bodies(study)
    bodies["lake"]["charges"] = {"score": 12, "held_out": 1}  # two retries
    del bodies["north"]
    write(tmp_path, **held | {"receipt_documents": reported.signed(bodies)})
    found = json.loads((tmp_path / "certificate.json").read_text())
    promise = privacy.promise(study)
    assert promise is not None
    sites = {name: row["epsilon"] for name, row in found["sites"].items()}
    assert sites["harbor"] < sites["lake"] < sites["north"] == pytest.approx(promise.pld)
    # the second opinion: the RDP filter at its one order is never below the tighter PLD figure
    order, delta = float(study.privacy.order), float(study.privacy.delta)
    spent = sum(
        accounting.cost(accounting.Event(p.name, privacy.multiplier(p), privacy.rounds(study, p)), order)
        for p in study.analyses
    )
    assert (
        0.85 * accounting.epsilon_rdp(spent, delta, order)
        < sites["harbor"]
        < accounting.epsilon_rdp(spent, delta, order)
    )
    assert found["sites"]["north"]["from"].startswith("the reservation")
    assert found["epsilon"]["two_copies"] == promise.two_copies
    assert found["delta"]["stated"] == pytest.approx(1.001e-6)
    assert found["trust"] | {"N": 3, "c": 1, "u": 3, "h": 2, "f": 1, "mode": "strict"} == found["trust"]
    for key in (
        "unit",
        "adjacency",
        "exact",
        "accountant",
        "not_covered",
        "hyper_parameters",
        "implementation",
        "evidence",
    ):
        assert found[key] not in (None, "")


def test_an_exact_study_has_a_certificate_without_any_epsilon(tmp_path: Path) -> None:
    study = reported.exact_study()
    write(tmp_path, **reported.held_by_coordinator(study, reported.run(study, n=3000)))
    found = json.loads((tmp_path / "certificate.json").read_text())
    assert found["exact"] == ["score", "held_out"] and found["life"]["epsilon"] is None
    assert found["epsilon"]["reported"] is None and all(row["epsilon"] is None for row in found["sites"].values())
    assert "#epsilon=none, exact" in gzip.decompress((tmp_path / "risk_scoring_file.txt.gz").read_bytes()).decode()
