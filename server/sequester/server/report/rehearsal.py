"""rehearsal.html: what a rehearsal showed, on one page that says on top that nobody in it is a finding.

The words are made once, as sentences and tables, for the page and for the terminal.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from sequester.server.report.pieces import Table

Content = Mapping[str, Any]


def rehearsal_html(content: Content) -> bytes:
    """The page, UTF-8, from the content of rehearsal.json."""
    from jinja2 import Environment, StrictUndefined  # slow to load: only where a page is made

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    folder = files("sequester.server.report")
    template = environment.from_string((folder / "rehearsal.html.jinja").read_text("utf-8"))
    style = (folder / "report.css").read_text("utf-8")
    page = template.render(
        content=content, verdict=verdict(content), tables=tables(content), words=words(content), style=style
    )
    return (page + "\n").encode()


def verdict(content: Content) -> str:
    """What this was, in one sentence."""
    rows = content["hospitals"].values()
    people = sum(row["people_in_cohort"] for row in rows)
    given = sum(row["data"] != "made up" for row in rows)
    who = "made-up people" if not given else "people of files that were given" if given == len(rows) else (
        "made-up people and people of files that were given"
    )  # fmt: skip
    return f"REHEARSAL on {people:,} {who} at {len(rows)} hospitals. Nothing in it is a finding about patients."


def tables(content: Content) -> list[Table]:
    """What the models do, what the real study would cost, what each hospital sent, how long it took."""
    return [table for table in (_models(content), _cost(content), _hospitals(content), _time(content)) if table.rows]


def _models(content: Content) -> Table:
    rows = []
    for model in content["models"]:
        low, high = model["loss"]
        expected = f"{model['verdict']}: " + (
            f"more than {low:g}" if model["verdict"] == "refused" else f"at most {high:g}"
        )
        found = [_figure(model.get(name)) for name in ("private", "without_noise", "pooled", "lost")]
        said = {True: "yes", False: "no", None: "-"}[model.get("as_predicted")]
        rows.append((model["analysis"], str(model["features"]), expected, *found, said))
    measures = {model["measure"] for model in content["models"]} - {None}
    what = (
        f" ({', '.join(sorted(measures))} on {content['models'][0]['people']:,} who took no part)" if measures else ""
    )
    head = ("model", "features", "plan", "private", "no noise", "pooled", "lost", "as planned")
    return Table(
        f"What the models are worth{what}", head, tuple(rows),
        "Plan: what the planning rule lets noise cost. No noise: the same recipe over plain sums. Pooled: the best of three "
        "penalised fits of all patients at once, without privacy. Lost: no noise less private.",
        (2, 7),
    )  # fmt: skip


def _cost(content: Content) -> Table:
    promise = content["epsilon"]["if_real"]
    if promise is None:
        return Table("What the real study would cost", (), ())
    names = {
        "design": "by design",
        "pld_without_spares": "spent when no attempt fails",
        "pld": "spent when every spare attempt is used",
        "two_copies": "for a patient at two hospitals",
        "all_others_collude": "if everybody else colludes",
    }
    figures = {**promise, "design": float(content["epsilon"]["design"])}
    rows = tuple((words, f"{figures[name]:.3f}") for name, words in names.items())
    return Table(
        f"What the real study would cost a patient, delta {content['epsilon']['delta']}", ("", "epsilon"), rows
    )


def _hospitals(content: Content) -> Table:
    rows = []
    for name, row in content["hospitals"].items():
        sums = row["bytes_sent"].get("MaskedInput", 0)
        total = sum(row["bytes_sent"].values())
        rows.append((name, row["data"], f"{row['people_in_cohort']:,}", f"{sums:,}", f"{total:,}"))
    head = ("hospital", "people from", "in the cohort", "bytes of masked sums", "bytes in all")
    return Table("What each hospital sent, by its own ledger", head, tuple(rows), words=(1,))


def _time(content: Content) -> Table:
    rows = [(f"{content['rounds']} rounds, each (median)", f"{content['round_seconds']['median']:.2f}")]
    rows.append(("the study, from start to end", f"{sum(content['session_seconds'].values()):.1f}"))
    rows.append(("the whole rehearsal", f"{sum(content['wall_seconds'].values()):.0f}"))
    note = f"On this machine, all hospitals at once; {content['peak_memory_mb']:,} MB of memory at most, all processes together."
    return Table("How long it took", ("", "seconds"), tuple(rows), note)


def words(content: Content) -> list[str]:
    """What a reader must know besides the tables."""
    said = []
    for name, result in content["evaluations"].items():
        if "auc" in result and "value" in result["auc"]:
            auc = result["auc"]
            interval = f" ({auc['low']:.3f} to {auc['high']:.3f})" if "low" in auc and "high" in auc else ""
            said.append(f"The study's own `{name}` would print AUC {auc['value']:.3f}{interval}, noise included.")
    if (assumed := content["assumed"]) is not None:
        said.append(
            f"Assumed of the made-up people, seed {content['seed']}: the listed variants and scores explain "
            f"{assumed['heritability']:g} of the liability, the covariates {assumed['covariates']:g}. Real shares are not known."
        )
    if (several := content["people_at_several_hospitals"]) is not None:
        pairs = ", ".join(f"{count:,} at {both}" for both, count in several["pairs"].items() if count)
        said.append(
            f"{several['people']:,} people stand at more than one hospital{f' ({pairs})' if pairs else ''}: a patient at two "
            "hospitals pays the larger epsilon above."
        )
    said += [f"A hospital with the default policy would object. {sentence}." for sentence in
             content["objections_of_a_default_policy"]]  # fmt: skip
    if not content["isolated"]:
        said.append("This machine cannot isolate compute from the network; a real hospital refuses there.")
    return said


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{round(value, 3) + 0.0:.3f}".replace("-", "−")
