"""An approval holds for exactly what was shown, and for nothing that changed since."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from statistics import NormalDist

import pytest

from contracts import COORDINATOR, PINNED, SITES, exact_study, freeze, hospital, study
from sequester.client.config import Home
from sequester.client.gate import approval
from sequester.client.gate.gate import Consortium
from sequester.client.gate.ledger import Ledger
from sequester.client.gate.rules import StudyRules, Witnesses
from sequester.client.policy import Policy
from sequester.protocols import arrays, privacy
from sequester.protocols.analyses.registry import analysis_of
from sequester.protocols.errors import RefusalCode, SequesterError, SiteError, StudyError
from sequester.protocols.secagg.messages import RoundStart
from sequester.protocols.signing import open_document, raw_public, sha256, sign_document
from sequester.protocols.study import Study, study_json
from sequester.protocols.wire import Limits

NORTH = SITES["north"]
STUDY = study()


def say_yes(home: Home, of: Study, person: str = "A. Person", role: str = "dpo", shown: str = "a text") -> bytes:
    return approval.sign(home, "example", home.config(), of, shown, person, role, NORTH)


def holds(home: Home, of: Study = STUDY, document: bytes | None = None) -> None:
    document = document or sign_document("study", study_json(of), COORDINATOR)
    approval.require_approved(home, "example", home.config(), of, document)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    place, digest = hospital(tmp_path, STUDY)
    freeze(place, digest)
    return place


def test_an_approval_given_for_this_study_data_and_policy_holds(home: Home) -> None:
    with pytest.raises(SiteError, match="not approved yet: 1 of 1"):
        holds(home)
    shown = approval.text(STUDY, privacy.study_digest(STUDY), home.config(), PINNED)
    body = open_document(say_yes(home, STUDY, shown=shown), "approval", raw_public(NORTH)).body
    holds(home)
    assert body["text"] == sha256(shown.encode()) and body["template"] == approval.TEMPLATE
    assert body["data_set_version"] == "11" * 32 and body["policy"] == home.config().policy.digest()
    assert "A. Person" not in json.dumps(body)  # a person's name does not leave the hospital


def test_the_text_names_the_privacy_profile_by_its_numbers_and_both_epsilons(home: Home) -> None:
    shown = approval.text(STUDY, privacy.study_digest(STUDY), home.config(), PINNED)
    worst = privacy.promise(STUDY).all_others_collude  # type: ignore[union-attr]
    assert f"Privacy profile `standard`: epsilon 3 by design, {worst:.3f} if everybody else colludes." in shown
    for changed in (
        {"privacy__epsilon": "2.9"},
        {"privacy__adjacency": "replace-one"},
        {"privacy__mechanism": "local"},
    ):
        other = study(**changed)
        assert "no named profile" in approval.text(other, privacy.study_digest(other), home.config(), PINNED)


def _other_signer(home: Home) -> None:
    holds(home, document=sign_document("study", study_json(STUDY), SITES["lake"]))


def _changed_byte(home: Home) -> None:
    data = sign_document("study", study_json(STUDY), COORDINATOR)
    holds(home, document=data.replace(b'"n0":10000', b'"n0":20000'))


def _other_study(home: Home) -> None:
    holds(home, document=sign_document("study", study_json(study(n0=9999)), COORDINATOR))


def _new_study_old_approval(home: Home) -> None:
    amended = study(n0=9999)
    freeze(home, privacy.study_digest(amended))
    holds(home, amended)


def _raised_epsilon(home: Home) -> None:
    holds(home, study(privacy__epsilon="8", privacy__order="4.4"))


def _refrozen(home: Home) -> None:
    freeze(home, privacy.study_digest(STUDY), version="22" * 32)
    holds(home)


def _excluded(home: Home) -> None:
    freeze(home, privacy.study_digest(STUDY), exclusions=1)
    holds(home)


def _policy_changed(home: Home) -> None:
    home.site_toml.write_text('[site]\nid = "north"\n[policy]\nminimum_cohort = 20\n', "utf-8")
    holds(home)


def _policy_tightened(home: Home) -> None:
    home.site_toml.write_text('[site]\nid = "north"\n[policy]\nepsilon_study = "1"\n', "utf-8")
    holds(home)


def _cohort_gone(home: Home) -> None:
    (home.dataset("main") / "cohorts" / privacy.study_digest(STUDY) / "manifest.json").unlink()
    holds(home)


def _refused(home: Home) -> None:
    approval.refuse(home, "example", home.config(), privacy.study_digest(STUDY), RefusalCode.POLICY, NORTH)
    holds(home)


def _approval_edited(home: Home) -> None:
    path = home.consortium("example") / "approvals" / privacy.study_digest(STUDY) / "dpo.json"
    path.write_bytes(path.read_bytes().replace(b'"role":"dpo"', b'"role":"pi_"'))
    holds(home)


def _approval_by_another_site(home: Home) -> None:
    path = home.consortium("example") / "approvals" / privacy.study_digest(STUDY) / "dpo.json"
    body = open_document(path.read_bytes(), "approval", None).body
    path.write_bytes(sign_document("approval", body, SITES["lake"]))
    holds(home)


def _not_ready(home: Home) -> None:
    freeze(home, privacy.study_digest(STUDY), ready=False)
    holds(home)


def _new_words(home: Home) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(approval, "TEMPLATE", "approval/3")
        holds(home)


def _wrong_bundle(home: Home) -> None:
    folder = home.consortium("example") / "bundles"
    folder.mkdir()
    (folder / f"{privacy.study_digest(STUDY)}.fab").write_bytes(b"another program")
    holds(home)


def _unknown_coordinator(home: Home) -> None:
    (home.consortium("example") / "coordinator.pub").unlink()
    holds(home)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        (_other_signer, "wrong signature|expected"),
        (_changed_byte, "changed after signing"),
        (_other_study, "the coordinator signed"),
        (_new_study_old_approval, "not approved yet"),
        (_raised_epsilon, "EPSILON"),
        (_refrozen, "another data set version"),
        (_excluded, "another exclusions version"),
        (_policy_changed, "another policy"),
        (_policy_tightened, "EPSILON"),
        (_cohort_gone, "no frozen cohort"),
        (_refused, "this site refused"),
        (_approval_edited, "does not hold"),
        (_approval_by_another_site, "signed by"),
        (_not_ready, "not ready"),
        (_new_words, "another template"),
        (_wrong_bundle, "BUNDLE"),
        (_unknown_coordinator, "missing or damaged"),
    ],
)
def test_an_approval_no_longer_counts_once_anything_changed(
    home: Home, what: Callable[[Home], None], said: str
) -> None:
    say_yes(home, STUDY)
    holds(home)
    with pytest.raises(SequesterError, match=said) as refused:
        what(home)
    assert refused.value.hint


@pytest.mark.parametrize(
    ("changed", "name", "code"),
    [
        ({"sites__2__id": "south"}, "NOT_ADDRESSED", RefusalCode.STUDY),
        ({"sites__2__key": raw_public(COORDINATOR).hex()}, "WRONG_KEY", RefusalCode.ROSTER),
        ({"expires": "2020-01-01T00:00:00Z"}, "EXPIRED", RefusalCode.EXPIRED),
        ({"ethics__0__expires": "2020-01-01T00:00:00Z"}, "PAPER_EXPIRED", RefusalCode.EXPIRED),
        ({"consortium": "andes"}, "CONSORTIUM", RefusalCode.STUDY),
    ],
)
def test_nobody_can_approve_what_is_not_for_this_site_now(
    home: Home, changed: dict[str, str], name: str, code: RefusalCode
) -> None:
    other = study(**changed)
    freeze(home, privacy.study_digest(other))
    for attempt in (lambda: say_yes(home, other), lambda: holds(home, other)):
        with pytest.raises(StudyError, match=name) as refused:
            attempt()
        assert refused.value.code == code


def test_the_study_expires_at_its_last_second_and_not_before() -> None:
    home, own = Home(Path("nowhere")), raw_public(NORTH)
    config = approval.SiteConfig.model_validate({"site": {"id": "north"}})
    at = STUDY.expires_at
    assert approval.objections(home, "example", config, STUDY, own, at) == []
    late = approval.objections(home, "example", config, STUDY, own, at.replace(second=1))
    assert {o.name for o in late} == {"EXPIRED", "PAPER_EXPIRED"}


def test_two_roles_are_two_persons(tmp_path: Path) -> None:
    home, digest = hospital(tmp_path, STUDY, policy='approvers = ["dpo", "pi"]')
    freeze(home, digest)
    say_yes(home, STUDY, "One", "dpo")
    with pytest.raises(SiteError, match="1 of 2 approvers are missing"):
        holds(home)
    with pytest.raises(SiteError, match="two roles"):
        say_yes(home, STUDY, "One", "pi")
    with pytest.raises(SiteError, match="approves nothing"):
        say_yes(home, STUDY, "Two", "janitor")
    say_yes(home, STUDY, "Two", "pi")
    holds(home)
    # and where the second document was made by other means than `approve`
    path = home.consortium("example") / "approvals" / digest / "pi.json"
    body = open_document(path.read_bytes(), "approval", None).body
    path.write_bytes(sign_document("approval", body | {"person": sha256(b"One")}, NORTH))
    with pytest.raises(SiteError, match="filled by one person"):
        holds(home)


def test_a_cohort_that_is_not_ready_cannot_be_approved_and_says_no_reason_aloud(home: Home) -> None:
    freeze(home, privacy.study_digest(STUDY), ready=False)
    with pytest.raises(SiteError) as refused:
        say_yes(home, STUDY)
    assert refused.value.code == RefusalCode.NOT_READY


def test_the_text_says_in_numbers_what_leaves_and_what_it_costs(home: Home) -> None:
    digest = privacy.study_digest(STUDY)
    shown = approval.text(STUDY, digest, home.config(), frozenset({raw_public(SITES["lake"])}))
    promise = privacy.promise(STUDY)
    assert promise is not None
    layout = privacy.layout(STUDY, STUDY.analyses[0], 0)
    for said in (
        f"epsilon {promise.pld:.3f}", f"{promise.all_others_collude:.3f}", f"{promise.two_copies:.3f}", "2 variants",
        f"{layout.length * 4} bytes a round", "at most 6 rounds", "at most 2 rounds", "  | Another line.",
    ):  # fmt: skip
        assert said in shown, said
    lines = {line.split()[0]: line for line in shown.splitlines() if line.startswith("  ") and len(line.split()) > 2}
    assert "this site" in lines["north"] and lines["lake"].endswith("pinned") and "NOT PINNED" in lines["harbor"]
    assert "EXACT" not in shown and "allow_unisolated" not in shown


def test_the_exact_consent_is_in_the_specification_s_words_with_the_power_of_the_test(tmp_path: Path) -> None:
    one = exact_study("glm")
    home, digest = hospital(tmp_path, one, policy='exact = ["glm"]\nexact_iterative = true\nallow_unisolated = true')
    shown = approval.text(one, digest, home.config(), PINNED, ("aaaa/fit", "bbbb/fit"))
    assert "Earlier exact releases of this data: aaaa/fit, bbbb/fit" in shown
    m = privacy.layout(one, one.analyses[0], 0).coordinates
    power = NormalDist().cdf(math.sqrt(m / one.n0) / math.sqrt(2))  # Phi(sqrt(m/n)/sqrt 2), a second implementation
    assert "the opened sums are not protected by differential privacy" in shown
    assert "a dishonest exchange can read single patients" in shown
    assert f"{power:.3f}" in shown and "allow_unisolated" in shown
    linear = exact_study()
    assert "single patients" not in approval.text(linear, privacy.study_digest(linear), home.config(), PINNED)


def test_invented_hospitals_are_refused_by_name_once_they_are_more_than_the_study_tolerates() -> None:
    own = raw_public(NORTH)
    assert approval.unpinned(STUDY, own, PINNED) is None
    assert approval.unpinned(STUDY, own, frozenset({raw_public(SITES["lake"])})) is None  # one colluder is tolerated
    found = approval.unpinned(STUDY, own, frozenset())
    assert found is not None and found.code == RefusalCode.UNPINNED and "harbor, lake" in found.sentence


def test_times_are_utc_seconds(home: Home) -> None:
    time = open_document(say_yes(home, STUDY), "approval", None).body["time"]
    stamp = datetime.strptime(time, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    assert abs((datetime.now(UTC) - stamp).total_seconds()) < 60


def test_the_power_of_the_test_counts_a_scan_s_largest_release(tmp_path: Path) -> None:
    one = study(
        analyses=[{"kind": "association", "name": "scan", "mode": "exact", "null_rounds": 2, "follow": 0}],
        aggregation={"mode": "strict", "ring_bits": 64, "fraction_bits": 28}, n0=20, n_max=30,
    )  # fmt: skip
    home, digest = hospital(
        tmp_path, one, policy='exact = ["association"]\nanalyses = ["association"]\nexact_iterative = true'
    )
    shown = approval.text(one, digest, home.config(), PINNED)
    power = 0.5 * (1 + math.erf(math.sqrt(17 / 20) / 2))  # Phi(sqrt(m/n)/sqrt 2), m = 17 numbers of the pass
    assert f"probability {power:.3f}" in shown


def first_round(of: Study) -> RoundStart:
    """What an honest exchange asks first."""
    plan = of.analyses[0]
    broadcast = arrays.encode(analysis_of(plan).start(plan, of, {}).broadcast)
    length = privacy.layout(of, plan, 0).length
    words, asked = privacy.codec(of).words(length), privacy.task_for(of, plan, 0, 0, broadcast)
    return RoundStart(bytes(32), 1, (0, 1, 2), words, length, asked, broadcast)


@pytest.mark.parametrize("kind", ["ethics", "agreement"])
def test_no_round_is_answered_after_a_paper_that_carried_the_study_has_expired(tmp_path: Path, kind: str) -> None:
    of = study(**{f"{kind}__0__expires": "2030-01-01T00:00:00Z"})
    Ledger.found(tmp_path / "main", Policy())
    ledger = Ledger(tmp_path / "main")
    today = [datetime(2029, 12, 31, tzinfo=UTC)]
    rest = (Policy(), ledger, frozenset(), Witnesses(tmp_path / "witnesses.json"), -1)
    rules = StudyRules(of, privacy.study_digest(of), *rest, now=lambda: today[0])
    assert not rules.admit(first_round(of)).exact
    today[0] = datetime(2030, 1, 2, tzinfo=UTC)
    with pytest.raises(StudyError, match="while the study ran") as refused:
        rules.admit(first_round(of))
    assert refused.value.code is RefusalCode.EXPIRED
    ledger.close()


def test_no_round_is_answered_once_a_person_said_no_to_a_study_that_runs(home: Home) -> None:
    digest = privacy.study_digest(STUDY)
    say_yes(home, STUDY)
    Ledger.found(home.dataset("main"), home.config().policy)
    (home.consortium("example") / "consortium.json").write_text("{}")
    ledger = Ledger(home.dataset("main"))
    gate = Consortium(home, "example", home.config(), ledger)
    member, journal = gate._member(STUDY, digest, Limits.for_study(STUDY), None)
    assert not member._rules.admit(first_round(STUDY)).exact
    approval.refuse(home, "example", home.config(), digest, RefusalCode.POLICY, NORTH)
    with pytest.raises(StudyError, match="said no to the study since it joined"):
        member._rules.admit(first_round(STUDY))
    journal.close()
    ledger.close()
