"""Ways around the release gate, at a real exchange and real gates: forged words, another's name, a waiver nobody signed."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

import loopback
import released
from loopback import Hospital as Site
from loopback import Loopback
from sequester.client.gate import approval
from sequester.client.gate import exchange as calls
from sequester.client.gate import release as gate
from sequester.protocols import privacy, release
from sequester.protocols.errors import PrivacyError, SiteError, StudyError
from sequester.protocols.signing import sign_document
from sequester.protocols.study import Study
from sequester.server import authority
from sequester.server.release import attest, waive
from sequester.simulate.hospitals import Hospital, hospitals

pytestmark = pytest.mark.system

SITES = (
    Hospital("harbor", (100, 300, 300), 1.0, 0.9, 0.01, "chr"),
    Hospital("lake", (300, 300, 100), 1.0, 0.9, 0.01, "swapped"),
    Hospital("metro", (300, 300, 100), 2.0, 0.9, 0.01, "flipped"),
)


def verdict(study: Study, site: Site, passed: bool, at: str = "") -> bytes:
    """A verdict by this site's own key, in its own name or in another's."""
    return released.verdict(study, at or site.name, passed, key=approval.identity(site.home, "alps"))


def test_nobody_gets_round_the_release_gate(tmp_path: Path) -> None:
    simulated = hospitals(7, tmp_path / "data", SITES, 600, chromosomes=2, length_bp=100_000, published=4)
    part = dict(simulated.study)
    prevalence, _ = part.pop("prevalence"), [part.pop(name) for name in ("subgroup", "subgroup_values")]
    fields = {
        **part, "privacy": {"epsilon": "3", "delta": "0.000001", "order": "8.9"},
        "analyses": [{"kind": "glm", "name": "score", "rounds": 3, "prevalence": prevalence}],
        "aggregation": {"mode": "strict", "round_deadline_s": 30},
    }  # fmt: skip
    alps = loopback.enrolled(tmp_path, {site.name: simulated.site(site.name) for site in SITES})
    asyncio.run(_story(alps, fields))


async def _story(alps: Loopback, fields: dict[str, object]) -> None:
    harbor, lake, metro = (alps.hospitals[name] for name in ("harbor", "lake", "metro"))
    async with alps.serving() as exchange:
        study, other = alps.study(fields), alps.study({**fields, "lineage": "another"})
        coordinator = authority.signing_key(alps.founded.home)
        key = bytes.fromhex((alps.founded.home.exchange / "coordinator.pub").read_text().strip())
        digest = await alps.publish_and_approve(study)
        another = await alps.publish_and_approve(other)

        # ---- at the exchange
        for document in (
            verdict(study, lake, True, "metro"),  # in another's name
            verdict(other, lake, True).replace(another.encode(), digest.encode()),  # of another study
            released.verdict(study, "lake", key=coordinator),  # the coordinator for a hospital
            sign_document("receipt", {"study": digest}, approval.identity(lake.home, "alps")),
            b"{}",
        ):
            with pytest.raises(StudyError):
                attest(exchange, "lake", document)
        by_lake = released.waiver(study, {"metro": "failed"}, key=approval.identity(lake.home, "alps"))
        with pytest.raises(StudyError, match="the waiver of the coordinator: signed by"):
            waive(exchange, key, by_lake)
        assert exchange.store.release(digest) == release.Documents()
        with pytest.raises(SiteError, match="did not answer `Attest`"):  # the same over the wire
            await asyncio.to_thread(calls.send_attestation, lake.home, "alps", verdict(study, lake, True, "metro"))

        # ---- a hospital that fails joins nothing, and reserves nothing
        gate.keep(metro.home, "alps", digest, "verdict", _by_this_program(study, metro, passed=False))
        exchange.start(digest)
        said = await alps.call(digest)
        assert said == {"harbor": ("joined", ""), "lake": ("joined", ""), "metro": ("refused", "NOT_READY")}
        assert metro.ledger is not None
        assert [row.body["study"] for row in metro.ledger.rows("reserve")] == []

        # ---- a waiver: not before the coordinator signs, not without metro's own name under it
        assert not _countersigns(metro, study, by_lake)
        assert (await alps.call(digest))["metro"] == ("refused", "NOT_READY")
        waiver = released.waiver(study, {"metro": "failed"}, "A trial in a trial.", key=coordinator)
        waive(exchange, key, waiver)
        assert (await alps.call(digest))["metro"] == ("refused", "NOT_READY")
        raw = await asyncio.to_thread(calls.fetch_waiver, metro.home, "alps", digest)
        assert raw == waiver and _countersigns(metro, study, waiver)
        assert (await alps.call(digest))["metro"] == ("joined", "")
        assert (await alps.ended(digest))["state"] == "done"

        # ---- and the results stay where they are until the others have signed as well
        def held_back(found: str) -> None:
            with pytest.raises(PrivacyError, match=found):
                exchange.results(digest)
            with pytest.raises(SiteError, match="did not answer `Result`"):
                calls.fetch_result(harbor.home, "alps", digest)

        assert metro.gate is not None and await metro.gate.release.send(digest)
        await asyncio.to_thread(held_back, "metro failed.*lacks the countersignature of harbor, lake")
        for site in (harbor, lake):
            assert _countersigns(site, study, waiver) and site.gate is not None
            assert await site.gate.release.send(digest)
        assert exchange.release(digest).granted_by == "waiver"
        assert exchange.results(digest)
        second = released.waiver(study, {"metro": "failed"}, "Another reason.", key=coordinator)
        waive(exchange, key, second)  # the names under the first one say nothing of the second
        await asyncio.to_thread(held_back, "lacks the countersignature of harbor, lake, metro")
        with pytest.raises(StudyError, match="countersigned a waiver that does not stand"):
            attest(exchange, "lake", exchange.store.release(digest).countersignatures["lake"])


def _by_this_program(study: Study, site: Site, passed: bool) -> bytes:
    from importlib.metadata import version

    key = approval.identity(site.home, "alps")
    return released.verdict(study, site.name, passed, key=key, program=version("sequester"))


def _countersigns(site: Site, study: Study, waiver: bytes) -> bool:
    """Whether this hospital takes the waiver for one of the coordinator's, and signs it."""
    digest = privacy.study_digest(study)
    try:
        gate.countersign(site.home, "alps", site.name, study, digest, waiver, "A. Keeper", "dpo")
    except StudyError:
        return False
    return gate.countersigned(site.home, "alps", site.name, study, digest) is not None
