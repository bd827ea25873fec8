"""A study run before any patient is touched: on made-up or public people, at hospitals that exist for it alone.

Real processes of this machine, through the commands that people type: exchange, gates, compute, secure sum, noise, ledgers,
report. Everything lies below one folder that is made for it; no home of a real consortium or hospital is opened, and the
rehearsed study names other keys and another consortium, so nobody can approve it for a real one.

What only a rehearsal can do: it knows the made-up people, so it can say what the released model does for people who took no
part, and what the same study would have found without noise.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from sequester.protocols import privacy
from sequester.protocols.analyses.cohort import Block
from sequester.protocols.analyses.evaluation import subgroups
from sequester.protocols.analyses.heads import HeadsPlan
from sequester.protocols.analyses.loop import without_noise
from sequester.protocols.analyses.registry import leaves_a_model
from sequester.protocols.analyses.training import TrainingPlan, network_score, records
from sequester.protocols.analyses.weights import judged as judged_by
from sequester.protocols.analyses.weights import sent, sigmoid
from sequester.protocols.errors import StudyError
from sequester.protocols.study import Study, study_json
from sequester.server.forecast import Utility, forecast
from sequester.simulate.participants import Assumed, Participants, participants, write

if TYPE_CHECKING:
    from sequester.one_machine.consortium import Consortium, Published, Site
    from sequester.one_machine.phases import Phases

Vector = NDArray[np.float64]
CONSORTIUM = "rehearsal"
STUDY_S = 4 * 3600.0  # every hospital tries its release gate first, minutes each, all on these cores; progress is shown
OTHERS = 5000  # made-up people at no hospital, on whom models are judged
ONE_PASS = (".vcf", ".vcf.gz", ".vcf.bgz", ".bcf", ".bgen")
RIDGE = (1e-3, 1.0, 100.0)
NEWTON_STEPS = 15


@dataclass(frozen=True, slots=True)
class Given:
    """A hospital's own files: a folder with phenotypes.csv and genotypes.*, and the build they are in."""

    folder: Path
    build: str

    def genotypes(self) -> Path | None:
        """What site.toml would name: a prefix, or a file that is ingested first; None where there is none."""
        for suffix in (".bed", ".pgen", *ONE_PASS):
            path = self.folder / f"genotypes{suffix}"
            if path.exists():
                return path if suffix in ONE_PASS else path.with_suffix("")
        return None


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """What is rehearsed: a study, people at each made-up hospital, what is assumed of them, and files given for others."""

    study: Study
    sizes: Mapping[str, int]
    given: Mapping[str, Given] = field(default_factory=dict)
    seed: int = 7
    assumed: Assumed = field(default_factory=Assumed)


def sizes(study: Study, people: int | None = None) -> dict[str, int]:
    """People at each hospital: the study's n0 to train on and as many as it holds out, or `people`, shared out equally."""
    n = len(study.sites)
    if people is None:
        people = min(math.ceil(study.n0 / (1 - float(study.cohort.test_fraction))), study.n_max)
    return {name: people // n + (i < people % n) for i, name in enumerate(study.site_ids)}


def resized(study: Study, people: int) -> Study:
    """The study with n0 and n_max in proportion to so many people, in place of the declared ones."""
    n0 = max(1, round(people * (1 - float(study.cohort.test_fraction))))
    return study.model_copy(update={"n0": n0, "n_max": max(n0, round(n0 * study.n_max / study.n0))})


def rehearse(asked: Rehearsal, out: Path, work: Path, phases: Phases, people_to: int | None = None) -> dict[str, Any]:
    """Run the study; report.html and the rest lie in `out`, and what comes back is the content of rehearsal.json.

    `work` is a new folder for everything that runs. `people_to`: file descriptor of the study's own progress lines.
    """
    from sequester.one_machine.consortium import Consortium, Site
    from sequester.one_machine.processes import Failed

    study, said = asked.study, forecast(asked.study)
    made: Participants | None = None
    if any(name not in asked.given for name in study.site_ids):
        with phases.phase("simulate", "make up people who fit the study"):
            counts = {name: 0 if name in asked.given else asked.sizes[name] for name in study.site_ids}
            made = participants(study, counts, OTHERS, asked.seed, asked.assumed)
            write(work / "data", made)
    sites = []
    for name in study.site_ids:
        given = asked.given.get(name, Given(work / "data" / name, study.genome_build))
        sites.append(Site(name, given.folder / "phenotypes.csv", given.genotypes(), given.build, _founding(study)))
    with Consortium(work, phases.say) as consortium:
        consortium.processes.show_to = people_to
        with phases.phase("found", "found a consortium for this rehearsal, start its exchange"):
            consortium.found(CONSORTIUM)
        with phases.phase("enrol", "hospitals make their keys, enrol, pin each other's fingerprints"):
            consortium.enrol(sites)
            consortium.pin()
        with phases.phase("doctor", "every hospital tests its own installation"):
            isolated = consortium.require_sound()
        with phases.phase("write", "sign and publish the rehearsal of the study"):
            published = consortium.publish(consortium.write_study(_fields(study)))
            objections = _objections(consortium, published)
            for site in consortium.sites.values():
                consortium.set_policy(
                    site.name, {**_allowing(study), **({} if isolated else {"allow_unisolated": True})}
                )
        consortium.run_sites()
        if ingested := [site.name for site in sites if _is_ingested(site, study)]:
            with phases.phase("ingest", "read and harmonise the files that were given"):
                consortium.each(
                    lambda name: consortium.hospital(name, "data", "ingest", "--json", timeout_s=900), ingested
                )
        with phases.phase("approve", "hospitals freeze their cohorts and approve"):
            frozen = consortium.decide(published)
        with phases.phase("rounds", f"the rehearsal {published.digest[:12]} runs", live=False):
            results = consortium.run_study(published, out, timeout_s=STUDY_S)
        several = _people_at_several(consortium, list(asked.given), phases)
        with phases.phase("audit", "stop the hospitals, read and verify their ledgers"):
            consortium.stop_sites()
            ledgers = consortium.ledgers()
            consortium.audits()
            consortium.processes.end()
        if consortium.processes.left_behind:
            raise Failed("something outlived its end: " + "; ".join(consortium.processes.left_behind))
        peaks = consortium.processes.watch.peaks()
    with phases.phase("judge", "judge the models on people who took no part, with and without noise"):
        models = judged(study, said.utility, results, made)
    return {
        "rehearsal": True,
        "study": privacy.study_digest(study),
        "rehearsed_as": published.digest,
        "lineage": study.lineage,
        "title": study.title.get("en") or next(iter(study.title.values())),
        "seed": asked.seed,
        "assumed": asdict(asked.assumed) if made is not None else None,
        "hospitals": {
            name: {
                "data": str(asked.given[name].folder) if name in asked.given else "made up",
                "people_in_cohort": frozen[name]["patients"],
                "bytes_sent": _bytes_sent(ledgers[name], published.digest),
            }
            for name in study.site_ids
        },
        "plan": asdict(said),
        "models": models,
        "evaluations": {
            plan.name: results["analyses"][plan.name]["result"] for plan in study.analyses if plan.kind == "evaluation"
        },
        "epsilon": {
            "design": None if said.promise is None else str(study.privacy.epsilon),
            "if_real": results.get("promise"),
            "delta": str(study.privacy.delta),
        },
        "rounds": results["rounds"],
        "round_seconds": results["round_seconds"],
        "session_seconds": results["wall_seconds"],
        "wall_seconds": {name: round(seconds, 1) for name, seconds in phases.seconds.items()},
        "peak_memory_mb": peaks["all at once"],
        "isolated": isolated,
        "objections_of_a_default_policy": objections,
        "people_at_several_hospitals": several,
    }


# ---- hospitals and study --------------------------------------------------------------------------------------------


def _fields(study: Study) -> dict[str, Any]:
    """The study as it is rehearsed: its own fields, but for consortium, hospitals' keys, bundle and expiry."""
    kept = {k: v for k, v in study_json(study).items() if k not in ("consortium", "sites", "bundle", "expires")}
    return {**kept, "rehearsal": True, "supersedes": None}


def _founding(study: Study) -> dict[str, object]:
    """A hospital's default policy, with a budget for life that holds the study at all: a ledger is founded once."""
    if study.privacy.epsilon <= 8:
        return {}
    return {"epsilon_life": str(study.privacy.epsilon), "order_life": str(study.privacy.order)}


def _allowing(study: Study) -> dict[str, object]:
    """A policy that accepts the study: what a real hospital would have to write is said beside it."""
    return {
        **_founding(study),
        "analyses": sorted({plan.kind for plan in study.analyses}),
        "exact": sorted({plan.kind for plan in study.analyses if plan.mode == "exact"}),
        "exact_iterative": True,
        "epsilon_study": str(study.privacy.epsilon),
        "delta": str(max(study.privacy.delta, type(study.privacy.delta)("0.000001"))),
        "minimum_cell": min(10, study.publication_floor),
    }


def _objections(consortium: Consortium, published: Published) -> list[str]:
    """What a hospital with the default policy would say against the study."""
    first = next(iter(consortium.sites))
    said = consortium.hospital(first, "check", str(published.signed), "--json", statuses=(0, 10, 20, 40))
    return [f"{row['name']}: {row['sentence']}" for row in json.loads(said)["objections"]]


def _is_ingested(site: Site, study: Study) -> bool:
    return site.genotypes is not None and (site.genotypes.name.endswith(ONE_PASS) or site.build != study.genome_build)


def _people_at_several(consortium: Consortium, given: list[str], phases: Phases) -> dict[str, Any] | None:
    """People at more than one of the hospitals whose files were given; None where fewer than two bring genotypes."""
    from sequester.one_machine.processes import python

    homes = [str(consortium.home(name)) for name in given if consortium.sites[name].genotypes is not None]
    if len(homes) < 2:
        return None
    with phases.phase("several", "look for people at more than one hospital"):
        command = python("-m", "sequester.client.ingest.several", *homes)
        found: dict[str, Any] = json.loads(consortium.processes.run("several", command, timeout_s=900))
    return found


def _bytes_sent(ledger: Mapping[str, Any], digest: str) -> dict[str, int]:
    """What one hospital's ledger says left it for the study, by kind, Flower's control connection included."""
    kinds: Counter[str] = Counter()
    for row in ledger["rows"]:
        if row.get("kind") == "egress" and row.get("study") == digest:
            kinds[row["what"]] += row["bytes"]
        elif row.get("kind") == "control":
            kinds["control connection"] += row["bytes"]
    return dict(kinds)


# ---- what came of it ------------------------------------------------------------------------------------------------


def judged(
    study: Study, predicted: tuple[Utility, ...], results: Mapping[str, Any], made: Participants | None
) -> list[dict[str, Any]]:
    """Each private model on made-up people who took no part, beside what the plan predicted; without any of them: None.

    `without_noise` is the same recipe over plain sums, `pooled` the best of three penalised fits of the pooled patients.
    """
    wanted = {model.analysis: model for model in predicted}
    rows = [asdict(model) | {"measure": None} for model in predicted]
    if made is None or not predicted:
        return rows
    others, trained = made.of(-1), [made.of(i) for i in range(len(study.sites))]
    block = others.everybody("all")
    models = tuple(plan for plan in study.analyses if plan.name in wanted and leaves_a_model(plan))
    linear = tuple(plan for plan in models if not getattr(plan, "hidden", 0))
    under = {plan.of for plan in linear if isinstance(plan, HeadsPlan)} | {plan.name for plan in linear}
    linear = tuple(plan for plan in study.analyses if plan.name in under)
    bare = without_noise(study.model_copy(update={"analyses": linear}), trained) if linear else {}
    pooled = _pooled(study, trained, block)
    for row in rows:
        plan = study.analysis(row["analysis"])
        result = results["analyses"][plan.name]["result"]
        if isinstance(plan, HeadsPlan):
            pooled_result = results["analyses"][plan.of]["result"]
            private = _agreement(study, heads_scores(study, pooled_result, result, block), block)
        else:
            private = _agreement(study, _scores(study, plan, result, block.x), block)
        noiseless = None
        if plan.name in bare:
            found = sent(bare[plan.name].state)
            noiseless = _agreement(study, judged_by(block, found["w"], found["b"]), block)
        row |= {"measure": _MEASURES[study.phenotype.kind], "private": private, "without_noise": noiseless,
                "pooled": pooled, "people": len(block.y)}  # fmt: skip
        if noiseless is not None:
            row |= {"lost": noiseless - private, "as_predicted": noiseless - private <= row["loss"][1]}
    return rows


_MEASURES = {"binary": "AUC", "quantitative": "R2", "time": "C-index"}


def _scores(study: Study, plan: Any, result: Mapping[str, Any], x: Vector) -> Vector:
    """The released model's score of each row of standardised features."""
    if isinstance(plan, TrainingPlan) and plan.hidden:
        return network_score({name: np.asarray(w) for name, w in result["network"].items()}, records(plan, study, x))
    weight = {row["name"]: float(row["standardised"]) for row in result["weights"]}
    return np.asarray(x @ np.array([weight.get(feature.name, 0.0) for feature in study.features()]))


def heads_scores(study: Study, pooled: Mapping[str, Any], result: Mapping[str, Any], block: Block) -> Vector:
    """The released heads' predictor of each person, by the head of their own group; who has none, by the pooled model."""
    names = {f.name: j for j, f in enumerate(study.features())}
    w, b = np.zeros(len(names)), float(pooled["intercept"])
    for row in pooled["weights"]:
        w[names[row["name"]]] = float(row["standardised"])
    score = block.x @ w + b
    for g, group in enumerate(subgroups(study)):
        head, rows = result["groups"].get(group, {}), block.strata == g
        if "weights" in head:
            own = w * float(head["pooled_times"])
            for row in head["weights"]:
                own[names[row["name"]]] = float(row["standardised"])
            score[rows] = block.x[rows] @ own + float(head["intercept"])
    return np.asarray(score)


def _agreement(study: Study, score: Vector, block: Block) -> float:
    """AUC of a yes/no outcome, squared correlation of a quantity, C-index of a time (a higher score, an earlier event)."""
    if study.phenotype.kind == "binary":
        cases = block.y > 0.5
        n1, n0 = int(cases.sum()), int((~cases).sum())
        return float((rankdata(score)[cases].sum() - n1 * (n1 + 1) / 2) / (n1 * n0))
    if study.phenotype.kind == "quantitative":
        return float(np.corrcoef(score, block.y)[0, 1] ** 2) if score.std() > 0 else 0.0
    assert block.event is not None  # the study was validated
    right = compared = 0.0
    for i in np.flatnonzero(block.event > 0.5):
        later = block.y > block.y[i]
        compared += later.sum()
        right += (score[i] > score[later]).sum() + 0.5 * (score[i] == score[later]).sum()
    return float(right / compared)


def _pooled(study: Study, trained: list[Participants], block: Block) -> float | None:
    """The best of three penalised fits of all training patients at once, on people who took no part; None for times."""
    if study.phenotype.kind == "time":
        return None
    parts = [people.everybody("train") for people in trained]
    x, y = np.vstack([b.x for b in parts]), np.concatenate([b.y for b in parts])
    x, fresh = (np.column_stack([part, np.ones(len(part))]) for part in (x, block.x))
    return max(_agreement(study, fresh @ _fitted(study, x, y, ridge), block) for ridge in RIDGE)


def _fitted(study: Study, x: Vector, y: Vector, ridge: float) -> Vector:
    """Weights of penalised least squares, or of penalised logistic regression by Newton steps."""
    penalty = ridge * np.eye(x.shape[1])
    if study.phenotype.kind == "quantitative":
        return np.asarray(np.linalg.solve(x.T @ x + penalty, x.T @ y))
    w = np.zeros(x.shape[1])
    for _ in range(NEWTON_STEPS):
        mu = sigmoid(x @ w)
        hessian = (x * (mu * (1 - mu))[:, None]).T @ x + penalty
        w = w + np.linalg.solve(hessian, x.T @ (y - mu) - ridge * w)
    return w


def require_people(asked: Rehearsal) -> None:
    """`StudyError` where given files lie in no folder or a hospital is named that the study does not have."""
    for name in [*asked.given, *asked.sizes]:
        if name not in asked.study.site_ids:
            raise StudyError(f"the study has no hospital `{name}`", hint=f"it names {', '.join(asked.study.site_ids)}")
    for name, given in asked.given.items():
        if not (given.folder / "phenotypes.csv").is_file():
            raise StudyError(
                f"{given.folder} holds no phenotypes.csv for {name}",
                hint="a folder with phenotypes.csv (column `patient`, and what the study names) and genotypes.*",
            )
        if asked.study.variants and given.genotypes() is None:
            raise StudyError(
                f"{given.folder} holds no genotypes.* for {name}, and the study lists variants",
                hint="genotypes.bed with .bim and .fam, .pgen with .pvar and .psam, .vcf.gz, .bcf or .bgen",
            )
