"""The report of a study that really ran: exchange, gates and compute over mutual TLS; documents as they were signed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import loopback
from sequester.protocols.signing import canonical, open_document, sha256
from sequester.protocols.study import parse_study, study_json
from sequester.server.report.results_folder import write
from sequester.simulate.hospitals import Hospital, hospitals

pytestmark = pytest.mark.system

SITES = (
    Hospital("harbor", (50, 150, 650), 1.0, 0.9, 0.01, "chr"),
    Hospital("lake", (300, 700, 100), 1.0, 0.9, 0.01, "swapped"),
    Hospital("metro", (550, 500, 150), 2.0, 0.9, 0.01, "flipped"),
)


def test_what_a_real_run_leaves_behind_becomes_a_folder_with_verified_receipts(tmp_path: Path) -> None:
    simulated = hospitals(7, tmp_path / "data", SITES, 900, chromosomes=2, length_bp=100_000, published=6)
    part = dict(simulated.study)
    prevalence = part.pop("prevalence")
    cohort = {"subgroup": part.pop("subgroup"), "subgroup_values": part.pop("subgroup_values")}
    fields = {
        **part, "cohort": cohort, "privacy": {"epsilon": "3", "delta": "0.000001", "order": "8.9"},
        "analyses": [
            {"kind": "glm", "name": "score", "rounds": 5, "prevalence": prevalence, "budget": "0.9"},
            {"kind": "evaluation", "name": "held_out", "of": "score", "budget": "0.1"},
        ],
        "aggregation": {"mode": "strict", "round_deadline_s": 20},
    }  # fmt: skip
    alps = loopback.enrolled(tmp_path, {site.name: simulated.site(site.name) for site in SITES})
    folder = tmp_path / "results"

    async def main() -> None:
        async with alps.serving() as exchange:
            # nobody has tried anything: every hospital's gate does, in a process of its own, before it joins
            digest = await alps.publish_and_approve(alps.study(fields), tried=False)
            exchange.start(digest)
            said = {"": ("not yet", "")}
            while ("not yet", "") in said.values():
                said = await alps.call(digest)
            assert set(said.values()) == {("joined", "")}
            assert (await alps.ended(digest))["state"] == "done"
            texts = json.loads(exchange.results(digest))
            documents = exchange.store.release(digest)
            for name, hospital in alps.hospitals.items():
                assert hospital.ledger is not None
                rows = [r.body for r in hospital.ledger.rows() if r.body.get("study") == digest]
                (row,) = [row for row in rows if row.get("what") == "Verdict"]
                assert row["sha256"] == sha256(documents.verdicts[name]) and row["bytes"] == len(
                    documents.verdicts[name]
                )
                kinds = [r["kind"] for r in rows]
                assert rows.index(row) < kinds.index("reserve")  # nothing is reserved before the pass
                assert [r["release"] for r in rows if "release" in r] == ["passed"]
        document = texts["study"].encode()
        study = parse_study(open_document(document, "study", None).body_bytes)
        receipts = {site: raw.encode() for site, raw in texts["receipts"].items()}
        assert canonical(study_json(study)) == open_document(document, "study", None).body_bytes
        write(folder, study, digest, texts["results"].encode(), receipts, document, documents)

    loopback.run(main)
    page = (folder / "report.html").read_text("utf-8")
    statement = json.loads((folder / "certificate.json").read_text("utf-8"))
    for site in SITES:
        receipt = json.loads((folder / "receipts" / f"{site.name}.json").read_text("utf-8"))["body"]
        assert receipt["ledger"]["head"] in page
        # its ledger has this study alone: what the data cost in their life is what the study cost
        row = statement["sites"][site.name]
        assert row["life"]["epsilon"] == pytest.approx(row["epsilon"], abs=2e-6)
        assert row["life"]["two_copies"] == pytest.approx(row["two_copies"], abs=2e-6)
        assert statement["sites"][site.name]["charges"] == receipt["charges"] == {"score": 5, "held_out": 1}
    assert statement["release_gate"]["granted_by"] == "passes"
    for row in statement["release_gate"]["sites"].values():
        assert row["verdict"] == "passed" and row["attempt"] == 1 and row["tried"][0]["analysis"] == "score"
        assert set(row) == {"verdict", "site", "passed", "form", "tried", "attempt", "program", "time"}  # and no figure
    # six rounds of at least 1,024 padding coordinates with real noise: inside limits at 1e-4 a side
    assert statement["evidence"]["noise_on_padding"]["verdict"] == "the noise that was promised"
