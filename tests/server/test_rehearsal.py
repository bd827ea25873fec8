"""What a rehearsal says of a study: made-up people who fit it, what noise costs its models, and what it does not start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from lifelines.utils import concordance_index
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import r2_score, roc_auc_score
from typer.testing import CliRunner

import gate_loop
from sequester.client.compute.cohort import StoredCohort
from sequester.client.config import Home
from sequester.client.ingest import freeze as ingest
from sequester.protocols import privacy
from sequester.protocols.errors import PrivacyError, SiteError, StudyError
from sequester.protocols.study import Study, read_study
from sequester.server import rehearsal
from sequester.server.cli import rehearse
from sequester.server.cli import study as verbs
from sequester.server.cli.study import templates
from sequester.server.forecast import utilities
from sequester.server.report.rehearsal import rehearsal_html, tables, verdict, words
from sequester.simulate.participants import Assumed, Participants, participants, write

APP = typer.Typer()
verbs.register(APP)
rehearse.register(APP)


def study(template: str, people: int) -> Study:
    return privacy.calibrate(rehearsal.resized(read_study(templates()[template]), people))


def made_up(of: Study, people: int, extra: int = 0, assumed: Assumed | None = None) -> Participants:
    return participants(of, rehearsal.sizes(of, people), extra, 7, assumed or Assumed())


@pytest.mark.parametrize("template", sorted(templates()))
def test_a_hospital_freezes_exactly_the_made_up_people_that_the_rehearsal_judges_by(
    tmp_path: Path, template: str
) -> None:
    of = study(template, 480)
    people = made_up(of, 480)
    write(tmp_path / "data", people)
    for place, site in enumerate(of.site_ids):
        folder, own, home = tmp_path / "data" / site, people.of(place), Home(tmp_path / site)
        home.root.mkdir()
        text = f'[site]\nid = "{site}"\n[data]\nbuild = "{of.genome_build}"\nphenotypes = "{folder}/phenotypes.csv"\n'
        home.site_toml.write_text(text + (f'genotypes = "{folder}/genotypes"\n' if of.variants else ""), "utf-8")
        account = ingest.freeze(home, home.config(), of, "ab" * 32)
        left_out = sum(count for name, count in account.counts.items() if name != "in_table")
        assert account.patients == 120 - left_out and left_out < 12  # a few are too young for the study
        frozen = StoredCohort(home.dataset("main") / "cohorts" / ("ab" * 32), of)
        theirs = np.vstack([block.x for block in frozen.blocks("all")])
        block = own.everybody("all")
        kept = slice(None) if not left_out else _met(of, own)
        np.testing.assert_allclose(theirs, block.x[kept], atol=2e-5)  # text has six digits
        columns = frozen.columns("all")
        np.testing.assert_allclose(columns.y, own.y[kept], atol=2e-5)
        assert columns.strata.tolist() == own.strata[kept].tolist()
        if own.event is not None:
            np.testing.assert_array_equal(columns.event, own.event[kept])


def _met(of: Study, own: Participants) -> Any:
    """Rows that meet `age >= n`, the one condition of the templates."""
    (condition,) = of.cohort.where
    least = float(condition.removeprefix("age >= "))
    return np.array([cell != "" and float(cell) >= least for cell in own.cells["age"]])


def test_made_up_people_have_the_studys_frequencies_and_prevalence_and_the_same_seed_makes_the_same() -> None:
    of = study("recipe-published-score", 4000)
    people = made_up(of, 4000, 1000)
    copies = np.where(people.dosage < 0, np.nan, people.dosage)
    np.testing.assert_allclose(np.nanmean(copies, axis=0) / 2, [0.21, 0.35, 0.48, 0.09], atol=0.02)
    assert people.y.mean() == pytest.approx(0.1, abs=1e-3) and np.bincount(people.hospital + 1).tolist() == [1000] * 5
    again = made_up(of, 4000, 1000)
    assert (again.dosage == people.dosage).all() and again.cells == people.cells
    # assumed and true: the score explains what was said of it, and nothing where nothing was said
    score, y = people.raw[:, 0], people.y
    assert roc_auc_score(y, score) > 0.65
    alike = made_up(of, 4000, 1000, Assumed(0.0, 0.2))
    assert abs(roc_auc_score(alike.y, alike.raw[:, 0]) - 0.5) < 0.03
    with pytest.raises(StudyError, match="leave nothing to chance"):
        Assumed(0.6, 0.5)


def _run(of: Study, people: Participants) -> dict[str, Any]:
    """The study through the gate's own noise and integers, as results.json has it."""
    cohorts = [people.of(i) for i in range(len(of.sites))]
    return {"analyses": {name: {"result": done.result} for name, done in gate_loop.run(of, cohorts).items()}}


def test_a_model_is_judged_on_people_who_took_no_part_with_and_without_noise() -> None:
    of = study("recipe-gradient", 4000)
    people = made_up(of, 4000, 3000)
    results = _run(of, people)
    (row,) = rehearsal.judged(of, utilities(of), results, people)
    others = people.of(-1).everybody("all")
    weights = [w["standardised"] for w in results["analyses"]["score"]["result"]["weights"]]
    assert row["private"] == pytest.approx(roc_auc_score(others.y, others.x @ weights)) and row["people"] == 3000
    assert row["lost"] == row["without_noise"] - row["private"] and row["measure"] == "AUC"
    # 6 features for 3,200 patients: the rule says at most 0.01; a run's standard deviation is 0.002
    assert row["verdict"] == "good" and row["as_predicted"] and abs(row["lost"]) < 0.01
    trained = [people.of(i).everybody("train") for i in range(4)]
    x, y = np.vstack([b.x for b in trained]), np.concatenate([b.y for b in trained])
    sklearn = LogisticRegression(C=1.0).fit(x, y)
    assert row["pooled"] == pytest.approx(roc_auc_score(others.y, sklearn.decision_function(others.x)), abs=0.003)
    assert row["without_noise"] <= row["pooled"] + 0.005


def test_heads_are_judged_by_the_head_of_each_persons_own_group() -> None:
    of = study("recipe-heads", 4000)
    people = made_up(of, 4000, 1000)
    cohorts = [people.of(i) for i in range(len(of.sites))]
    finished = gate_loop.run(of, cohorts)
    results = {"analyses": {name: {"result": done.result} for name, done in finished.items()}}
    rows = rehearsal.judged(of, utilities(of), results, people)
    assert [(row["analysis"], row["features"]) for row in rows] == [("pooled", 4), ("heads", 20)]  # 4 columns, 5 groups
    others, state = people.of(-1).everybody("all"), finished["heads"].state
    theirs = (others.x * state["head_w"][others.strata]).sum(axis=1) + state["head_b"][others.strata]
    ours = rehearsal.heads_scores(of, finished["pooled"].result, finished["heads"].result, others)
    np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)
    assert rows[1]["private"] == pytest.approx(roc_auc_score(others.y, theirs), abs=1e-9)
    assert rows[1]["without_noise"] is not None and rows[1]["lost"] == rows[1]["without_noise"] - rows[1]["private"]


@pytest.mark.parametrize(
    ("template", "measure", "expected"),
    [
        ("warfarin-dose", "R2", lambda y, score, event: r2_score(y, np.polyval(np.polyfit(score, y, 1), score))),
        ("breast-cancer-survival", "C-index", lambda y, score, event: concordance_index(y, -score, event)),
    ],
)
def test_doses_and_survival_are_judged_as_other_programs_judge_them(template: str, measure: str, expected: Any) -> None:
    of = study(template, 1200)
    people = made_up(of, 1200, 400)
    results = _run(of, people)
    rows = rehearsal.judged(of, utilities(of), results, people)
    others = people.of(-1).everybody("all")
    weights = {w["name"]: w["standardised"] for w in results["analyses"][rows[0]["analysis"]]["result"]["weights"]}
    score = others.x @ np.array([weights.get(f.name, 0.0) for f in of.features()])
    assert rows[0]["measure"] == measure
    assert rows[0]["private"] == pytest.approx(expected(others.y, score, others.event), abs=1e-9)


def test_where_nobody_is_made_up_nothing_is_judged() -> None:
    of = study("risk-score", 4000)
    (row,) = rehearsal.judged(of, utilities(of), {"analyses": {}}, None)
    assert row["measure"] is None and "private" not in row


def test_declared_sizes_are_n0_to_train_on_and_the_share_that_is_held_out() -> None:
    of = read_study(templates()["type-2-diabetes"])  # n0 20,000, a fifth held out, n_max 25,000
    assert sum(rehearsal.sizes(of).values()) == 25_000 and set(rehearsal.sizes(of).values()) == {6250}
    small = rehearsal.resized(of, 1000)
    assert (small.n0, small.n_max) == (800, 1000) and sum(rehearsal.sizes(small, 1000).values()) == 1000


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--size", "nowhere=100"], "no hospital `nowhere`"),
        (["--size", "north"], "--size north"),
        (["--size", "north=12"], "--size north=12"),
        (["--data", "north=FOLDER"], "no phenotypes.csv for north"),
        (["--data", "north=FOLDER", "--data", "north=FOLDER"], "--data north="),
        (["--build", "north=hg19"], "--build north=hg19"),
        (["--heritability", "0.9"], "leave nothing to chance"),
        (["--out", "FULL"], "not an empty folder"),
    ],
)
def test_what_cannot_be_rehearsed_is_said_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], said: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("mine", "utf-8")
    path = tmp_path / "study.yaml"
    path.write_text(templates()["risk-score"], "utf-8")
    monkeypatch.setattr("sequester.one_machine.processes.subprocess", None)  # nothing could be started
    monkeypatch.chdir(tmp_path)
    words = [
        word.replace("FOLDER", str(tmp_path / "empty")).replace("FULL", str(tmp_path / "full")) for word in options
    ]
    refused = CliRunner().invoke(APP, ["study", "rehearse", str(path), *words]).exception
    assert isinstance(refused, StudyError) and said in refused.message and refused.hint
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "full", "study.yaml"]


def test_a_temporary_folder_whose_sockets_would_have_too_long_names_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, deep = tmp_path / "study.yaml", tmp_path / ("d" * 90)
    deep.mkdir()
    path.write_text(templates()["risk-score"], "utf-8")
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    refused = CliRunner().invoke(APP, ["study", "rehearse", str(path), "--out", str(tmp_path / "out")]).exception
    assert isinstance(refused, SiteError) and "set TMPDIR" in refused.hint and not list(deep.iterdir())


def test_a_study_that_would_be_noise_is_not_rehearsed_either(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(templates()["risk-score"].replace("n0: 10000", "n0: 40"), "utf-8")
    assert isinstance(CliRunner().invoke(APP, ["study", "rehearse", str(path)]).exception, PrivacyError)


CONTENT: dict[str, Any] = {
    "title": "A <b>score</b>", "lineage": "score", "study": "ab" * 32, "rehearsed_as": "cd" * 32, "seed": 7,
    "assumed": {"heritability": 0.2, "covariates": 0.1},
    "hospitals": {"north": {"data": "made up", "people_in_cohort": 1200, "bytes_sent": {"MaskedInput": 900, "Receipt": 70}},
                  "lake": {"data": "lake-files", "people_in_cohort": 300, "bytes_sent": {"MaskedInput": 900}}},
    "models": [{"analysis": "score", "features": 6, "epsilon": 2.6, "verdict": "noisy", "loss": (0.01, 0.03), "measure": "AUC",
                "private": 0.7, "without_noise": 0.75, "pooled": 0.76, "lost": 0.05, "as_predicted": False, "people": 5000}],
    "evaluations": {"held_out": {"auc": {"value": 0.71, "low": 0.68, "high": 0.74}}},
    "epsilon": {"design": "3", "delta": "0.000001", "if_real": {
        "filter": 3.0, "pld": 2.8, "pld_without_spares": 2.474, "two_copies": 6.1, "all_others_collude": 4.1}},
    "rounds": 11, "round_seconds": {"median": 0.12}, "session_seconds": {"set_up": 2.0, "rounds": 3.0},
    "wall_seconds": {"found": 5.0, "rounds": 20.0}, "peak_memory_mb": 3549, "isolated": False,
    "objections_of_a_default_policy": ["EPSILON: the study asks for epsilon 8, this site gives a study 3"],
    "people_at_several_hospitals": {"people": 564, "pairs": {"lake, north": 564, "lake, metro": 0}},
}  # fmt: skip


def test_the_page_says_on_top_that_it_is_a_rehearsal_and_where_the_plan_was_wrong() -> None:
    page = rehearsal_html(CONTENT).decode()
    assert (
        page.index("REHEARSAL on 1,500") < page.index("<table")
        and "A &lt;b&gt;score" in page
        and "<b>score" not in page
    )
    assert "made-up people and people of files" in verdict(CONTENT)
    model, cost, hospitals, time = tables(CONTENT)
    assert model.rows == (("score", "6", "noisy: at most 0.03", "0.700", "0.750", "0.760", "0.050", "no"),)
    assert ("spent when no attempt fails", "2.474") in cost.rows and (
        "if everybody else colludes",
        "4.100",
    ) in cost.rows
    assert hospitals.rows[0] == ("north", "made up", "1,200", "900", "970") and time.rows[2] == (
        "the whole rehearsal",
        "25",
    )
    said = " ".join(words(CONTENT))
    for part in ("AUC 0.710 (0.680 to 0.740)", "0.2 of the liability", "564 people", "(564 at lake, north)", "default policy",
                 "cannot isolate"):  # fmt: skip
        assert part in said and part in page


def test_an_exact_study_has_no_epsilon_to_show_and_no_model_to_judge() -> None:
    bare = CONTENT | {"models": [], "epsilon": {"design": None, "if_real": None, "delta": "0.000001"}, "isolated": True}
    assert [table.caption for table in tables(bare)] == [
        "What each hospital sent, by its own ledger",
        "How long it took",
    ]
    assert b"REHEARSAL" in rehearsal_html(bare)
