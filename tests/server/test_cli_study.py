"""The coordinator's local verbs, as typed."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import typer
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from typer.testing import CliRunner, Result

from contracts import COORDINATOR, SITES, study
from sequester.protocols import privacy
from sequester.protocols.accounting import cap, sigma_for
from sequester.protocols.errors import PrivacyError, StudyError
from sequester.protocols.signing import open_document, raw_public, sha256
from sequester.protocols.study import parse_study, read_study, study_json
from sequester.server.cli.study import read, register, templates, unnamed
from sequester.server.forecast import forecast, require_worth, utilities

APP = typer.Typer()
register(APP)


def run(*words: object) -> Result:
    return CliRunner().invoke(APP, ["study", *map(str, words)])


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / "home" / "coordinator"
    folder.mkdir(parents=True)
    (folder / "consortium.toml").write_text('consortium = "alps"\n', "utf-8")
    pem = COORDINATOR.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (folder / "coordinator.key").write_bytes(pem)
    return tmp_path / "home"


def written(tmp_path: Path, home: Path, template: str = "risk-score") -> Path:
    path = tmp_path / "study.yaml"
    sites = [word for name, key in SITES.items() for word in ("--site", f"{name}={raw_public(key).hex()}")]
    said = run("new", path, "--template", template, "--home", home, *sites)
    assert said.exit_code == 0, said.output
    return path


@pytest.mark.parametrize("template", sorted(templates()))
def test_every_template_passes_check_and_says_what_is_still_open(tmp_path: Path, template: str) -> None:
    path = tmp_path / "s.yaml"
    assert run("new", path, "--template", template, "--home", tmp_path).exit_code == 0
    said = run("check", path)
    assert said.exit_code == 0 and "no fault found" in said.output and "has no key yet" in said.output
    assert forecast(read(path)).verdict == (
        None if template == "rare-disease-burden" else "good"
    )  # exact alone: no noise


def test_the_exact_form_that_the_warfarin_template_describes_is_a_study_that_passes(tmp_path: Path, home: Path) -> None:
    text = written(tmp_path, home, "warfarin-dose").read_text("utf-8")
    start, end = text.index("analyses:"), text.index("# The exact form")
    lines = [line[1:] for line in text[end:].splitlines() if line.startswith("#     - {kind")]
    exact = text[:start] + "analyses:\n" + "\n".join(lines) + "\n" + text[end:]
    exact = exact.replace("ring_bits: 32", "ring_bits: 64").replace("fraction_bits: 16", "fraction_bits: 28")
    said = forecast(read_study(exact))
    assert [row.mode for row in said.analyses] == ["exact", "exact"] and said.promise is None
    with pytest.raises(StudyError, match="bits"):
        forecast(read_study(exact.replace("ring_bits: 64", "ring_bits: 32")))


def test_new_without_a_path_prints_the_study(tmp_path: Path, home: Path) -> None:
    said = run("new", "--template", "warfarin-dose", "--home", home)
    assert said.exit_code == 0 and read_study(said.stdout).consortium == "alps"


def test_new_leaves_an_existing_file_alone_and_names_unknown_templates(tmp_path: Path, home: Path) -> None:
    path = written(tmp_path, home)
    before = path.read_bytes()
    assert isinstance(run("new", path, "--home", home).exception, StudyError) and path.read_bytes() == before
    wrong = run("new", tmp_path / "x.yaml", "--template", "nothing").exception
    assert isinstance(wrong, StudyError) and "warfarin-dose" in wrong.hint


def test_a_signed_study_opens_and_carries_noise_bundle_and_consortium(tmp_path: Path, home: Path) -> None:
    path, bundle = written(tmp_path, home), tmp_path / "app.fab"
    bundle.write_bytes(b"a bundle without code")
    said = run("sign", path, "--bundle", bundle, "--home", home)
    assert said.exit_code == 0, said.exception
    document = open_document((tmp_path / "study.json").read_bytes(), "study", raw_public(COORDINATOR))
    signed = parse_study(document.body_bytes)
    assert document.digest == privacy.study_digest(signed) and document.digest in said.output
    assert (signed.consortium, signed.bundle) == ("alps", sha256(bundle.read_bytes()))
    assert all(plan.noise_multiplier is not None for plan in signed.analyses)
    privacy.check_calibrated(signed)
    shown = run("show", tmp_path / "study.json")
    assert json.loads(shown.stdout)["bundle"] == signed.bundle


def test_an_incomplete_expired_or_foreign_study_is_not_signed(tmp_path: Path, home: Path) -> None:
    path = written(tmp_path, home)
    assert unnamed(read(path)) and "no bundle" in str(run("sign", path, "--home", home).exception)
    text = path.read_text("utf-8").replace('bundle: "0000', 'bundle: "ab00')
    for changed, said in (
        (_expired(text), "has passed"),
        (text.replace("consortium: alps", "consortium: andes"), "andes"),
    ):
        path.write_text(changed, "utf-8")
        refused = run("sign", path, "--home", home).exception
        assert isinstance(refused, StudyError) and said in refused.message
    assert not (tmp_path / "study.json").exists()


def test_sign_says_the_next_command_whole(tmp_path: Path, home: Path) -> None:
    path, bundle = written(tmp_path, home), tmp_path / "app.fab"
    bundle.write_bytes(b"a bundle without code")
    said = run("sign", path, "--bundle", bundle, "--home", home)
    assert f"study publish {tmp_path / 'study.json'} --bundle {bundle}" in said.output.replace("\n", "")


def test_check_tells_of_a_date_that_has_passed(tmp_path: Path, home: Path) -> None:
    path = written(tmp_path, home)
    path.write_text(_expired(path.read_text("utf-8")), "utf-8")
    assert "has passed" in run("check", path).stdout


def test_an_unsigned_study_is_not_published_and_the_step_that_lacks_is_named(tmp_path: Path, home: Path) -> None:
    path = written(tmp_path, home)
    refused = run("publish", path, "--bundle", path, "--home", home).exception
    assert isinstance(refused, StudyError) and "not a signed study" in refused.message and "sign" in refused.hint


def _expired(text: str) -> str:
    at = text.index("\nexpires: ") + len("\nexpires: ")
    return text[:at] + "2020" + text[at + 4 :]


def test_a_changed_byte_of_a_signed_study_is_refused_by_name(tmp_path: Path, home: Path) -> None:
    path = written(tmp_path, home)
    path.write_text(path.read_text("utf-8").replace('bundle: "0000', 'bundle: "ab00'), "utf-8")
    assert run("sign", path, "--home", home).exit_code == 0
    signed = tmp_path / "study.json"
    signed.write_bytes(signed.read_bytes().replace(b'"epsilon":"3"', b'"epsilon":"8"'))
    assert "changed after signing" in str(run("check", signed).exception)


def test_the_plan_names_bytes_noise_and_epsilon_and_agrees_with_the_promise(tmp_path: Path, home: Path) -> None:
    path = written(tmp_path, home)
    said = json.loads(run("plan", path, "--json").stdout)
    score = said["analyses"][0]
    words = score["coordinates"] + score["padding"]
    assert score["bytes_a_round"] == 4 * words and said["bytes_a_site"] > 12 * 4 * words
    # sigma sqrt((T + R) order / (2 share of the cap)), by hand (spec/privacy.md 2.2)
    cap = 3 - (math.log1p(-1 / 8.9) - (math.log(1e-6) + math.log(8.9)) / 7.9)
    assert score["noise_multiplier"] == pytest.approx(math.sqrt(12 * 8.9 / (2 * 0.75 * cap)), abs=2e-6)
    assert said["promise"]["filter"] == pytest.approx(3, abs=1e-5) and said["promise"]["pld"] < 3
    assert "may collude" in run("plan", path).output


@pytest.mark.parametrize(("n0", "verdict"), [(10000, "good"), (200, "noisy"), (29, "refused")])
def test_the_planning_rule_is_features_against_n0_epsilon(n0: int, verdict: str) -> None:
    one = study(n0=n0)  # 3 features, epsilon 2.65 of their own by PLD: good from n0 340, refused below n0 34
    (model,) = utilities(one)
    assert (model.features, model.verdict) == (3, verdict) and model.epsilon == pytest.approx(2.65, abs=0.05)
    if verdict == "refused":
        with pytest.raises(PrivacyError, match="noise"):
            require_worth(one)
    else:
        require_worth(one)


def test_a_model_that_gets_a_tenth_of_the_study_is_judged_by_its_own_epsilon_and_a_local_one_by_its_larger_noise() -> (
    None
):
    whole = utilities(study())[0]
    tenth = utilities(study(analyses__0__budget="0.1", analyses__1__budget="0.9"))[0]
    assert tenth.epsilon < 0.4 * whole.epsilon
    hopeless = study(n0=50, analyses__0__budget="0.1", analyses__1__budget="0.9")
    with pytest.raises(PrivacyError, match="score: 3 features at n0 50"):
        require_worth(hopeless)
    assert utilities(study(n0=400))[0].verdict == "good"
    assert utilities(study(n0=400, privacy__mechanism="local"))[0].verdict == "noisy"  # sqrt(3) times the noise


@pytest.mark.parametrize("profile", ["cautious", "standard", "open"])
def test_a_profile_is_its_numbers_once_the_study_is_read(tmp_path: Path, home: Path, profile: str) -> None:
    path = tmp_path / "s.yaml"
    assert run("new", path, "--profile", profile, "--home", home).exit_code == 0
    of = read(path)
    assert "profile" not in study_json(of)["privacy"]
    said = json.loads(run("plan", path, "--json").stdout)
    assert said["profile"] == profile and said["promise"]["filter"] == pytest.approx(
        float(of.privacy.epsilon), abs=1e-5
    )
    order = float(of.privacy.order)  # no order near it needs less noise
    sigma = {a: sigma_for(cap(float(of.privacy.epsilon), 1e-6, a), 1, a) for a in (0.8 * order, order, 1.25 * order)}
    assert min(sigma, key=lambda a: sigma[a]) == order
    assert f"privacy {profile}" in run("check", path).output and profile in run("plan", path).output


def test_a_profile_that_is_unknown_or_not_alone_is_refused_with_its_line(tmp_path: Path, home: Path) -> None:
    assert "cautious, standard, open" in str(run("new", "--profile", "strict", "--home", home).exception.hint)  # type: ignore[union-attr]
    text = written(tmp_path, home).read_text("utf-8")
    line = text[: text.index("  profile: standard")].count("\n") + 1
    with pytest.raises(StudyError, match=f"line {line}: .*no profile `brave`"):
        read_study(text.replace("profile: standard", "profile: brave"))
    with pytest.raises(StudyError, match=f"line {line + 1}: .*`epsilon` stands beside"):
        read_study(text.replace("  profile: standard", "  epsilon: 5\n  profile: standard"))


def test_three_or_four_hospitals_are_told_that_strict_is_better() -> None:
    assert any("strict" in line for line in forecast(study(aggregation={"mode": "double", "max_absent": 0})).advice)


def test_a_scan_is_forecast_by_its_largest_round_and_the_sum_of_all() -> None:
    said = forecast(study(
        analyses=[{"kind": "association", "name": "scan", "mode": "exact", "null_rounds": 2, "follow": 0}],
        aggregation={"mode": "strict", "ring_bits": 64, "fraction_bits": 28},
    ))  # fmt: skip
    (row,) = said.analyses
    # intercept and age: 3 + 2 + 1 + 3 numbers of the null model; 2 variants: with counts 4 more, in the pass 2 (1 + 1 + 2)
    assert row.rounds == 3 and row.coordinates == 9 + 8
    assert row.bytes_a_round == 8 * 17 and row.bytes_in_all == said.bytes_a_site == 8 * (13 + 9 + 17)


def test_the_plan_says_which_auc_will_have_an_interval_and_what_would_mend_the_others() -> None:
    cohort = {"subgroup": "ancestry", "subgroup_values": ["AFR", "EUR"], "subgroup_shares": ["0.02", "0.9"]}
    said = forecast(study(cohort=cohort, n0=25000, n_max=30000)).advice
    of = {line.split("the AUC of ")[1].split()[0]: line for line in said if "AUC" in line}
    assert set(of) == {"everybody", "AFR", "EUR", "other"}
    assert "comes with a 95 % interval" in of["EUR"]
    assert "without an interval" in of["AFR"] and "a larger share of the budget or fewer bins" in of["AFR"]
    wide = forecast(study(n0=300_000, n_max=300_000, aggregation={"mode": "strict", "fraction_bits": 10}))
    assert any("without an interval" in line and "more bins may help" in line for line in wide.advice)
