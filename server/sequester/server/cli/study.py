"""`sequester-server study`: write, check, plan and sign a study on the coordinator's machine. Nothing here calls out.

The verbs that reach the exchange (`publish`, `start`, ...) join the same `verbs` from their own module.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from sequester.protocols import privacy
from sequester.protocols.decimals import one_spelling
from sequester.protocols.errors import StudyError
from sequester.protocols.faults import INSTANT
from sequester.protocols.profiles import PROFILES, PURPOSES, profile_of
from sequester.protocols.signing import fingerprint, open_document, sha256, sign_document
from sequester.protocols.study import Study, parse_study, read_study, study_json, validated
from sequester.server.config import home as home_of
from sequester.server.forecast import Forecast, forecast, require_worth

HomeOption = Annotated[
    Path | None,
    typer.Option("--home", help="The consortium's folder; default SEQUESTER_SERVER_HOME, else ~/.sequester-server."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Answer in JSON, for machines.")]
StudyArgument = Annotated[Path, typer.Argument(help="study.yaml, or a signed study.json.")]

verbs = typer.Typer(no_args_is_help=True, help="Write, check, plan, sign and run studies.")
UNNAMED = "0" * 60


def register(app: typer.Typer) -> None:
    """Add `study` and its local verbs."""
    verbs.command("new")(new)
    verbs.command("check")(check)
    verbs.command("plan")(plan)
    verbs.command("sign")(sign)
    verbs.command("show")(show)
    app.add_typer(verbs, name="study")


def templates() -> dict[str, str]:
    """Name -> text of the studies that come with the program."""
    folder = files("sequester.server") / "templates"
    return {p.name.removesuffix(".yaml"): p.read_text("utf-8") for p in folder.iterdir() if p.name.endswith(".yaml")}


def new(
    output: Annotated[Path | None, typer.Argument(help="Default: print it. An existing file is left alone.")] = None,
    template: Annotated[
        str, typer.Option("--template", help=f"One of {', '.join(sorted(templates()))}.")
    ] = "risk-score",
    site: Annotated[list[str] | None, typer.Option("--site", help="NAME=KEY (hex), once for each hospital.")] = None,
    profile: Annotated[
        str, typer.Option("--profile", help="Of privacy: " + "; ".join(f"{n}: {p}" for n, p in PURPOSES.items()) + ".")
    ] = "standard",
    consortium: Annotated[str, typer.Option("--consortium", help="Default: this home's consortium.")] = "",
    days: Annotated[int, typer.Option("--days", min=1, help="Days until the study expires.")] = 180,
    home: HomeOption = None,
) -> None:
    """Write a commented study.yaml to edit. It passes `study check` as it is."""
    known = templates()
    if template not in known:
        raise StudyError(f"no template `{template}`", hint=f"there are: {', '.join(sorted(known))}")
    if profile not in PROFILES:
        raise StudyError(f"no privacy profile `{profile}`", hint=f"there are: {', '.join(PROFILES)}")
    place = home_of(home)
    if not consortium and (place.coordinator / "consortium.toml").is_file():
        consortium = place.config(place.coordinator).consortium
    text = re.sub(r"^  profile: standard ", f"  profile: {profile:8} ", known[template], count=1, flags=re.MULTILINE)
    if consortium:
        text = _set(text, "consortium", consortium)
    text = _set(text, "expires", (datetime.now(UTC) + timedelta(days=days)).strftime(INSTANT))
    if site:
        text = text[: text.index("\nsites:\n")] + "\nsites:\n" + "".join(_site_line(s) for s in site)
    read_study(text)
    if output is None:
        typer.echo(text, nl=False)
        return
    try:
        with output.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise StudyError(f"{output}: {error.strerror}", hint="name a file that does not exist yet") from None
    typer.echo(f"{output}: edit it, then `sequester-server study check {output}`.")


def _set(text: str, field: str, value: str) -> str:
    return re.sub(rf"^{field}: .*$", f"{field}: {value}", text, count=1, flags=re.MULTILINE)


def _site_line(given: str) -> str:
    name, equals, key = given.partition("=")
    if not equals or not re.fullmatch(r"[0-9a-f]{64}", key):
        raise StudyError(
            f"--site {given[:40]} is not NAME=KEY", hint="the key is 64 hex digits: `enrolments` lists what to give"
        )
    return f'  - {{id: {name}, key: "{key}"}}\n'


def check(path: StudyArgument, as_json: JsonOption = False) -> None:
    """Say whether a study holds together, with its first fault; changes nothing."""
    study = read(path)
    ready = privacy.calibrate(study)
    privacy.session_params(ready)
    privacy.check_calibrated(ready)
    privacy.check_headroom(ready)
    open_ends = unnamed(study)
    if as_json:
        typer.echo(json.dumps({"digest": privacy.study_digest(study), "open": open_ends}, indent=2))
        return
    typer.echo(f"{path}: a study of {len(study.analyses)} analyses at {len(study.sites)} hospitals; no fault found.")
    asked = study.privacy
    typer.echo(
        f"privacy {profile_of(asked) or 'by numbers of its own'}: epsilon {asked.epsilon}, delta {one_spelling(asked.delta)}."
    )
    for sentence in open_ends:
        typer.echo(f"still open: {sentence}")
    typer.echo(f"next: `sequester-server study plan {path}` says what it costs.")


def plan(path: StudyArgument, as_json: JsonOption = False) -> None:
    """Say what a study will cost before anybody spends anything; exit 40 where it could not learn anything."""
    study = read(path)
    said = forecast(study)
    if as_json:
        typer.echo(json.dumps(asdict(said), indent=2))
    else:
        _print(study, said)
    require_worth(study)


def sign(
    path: StudyArgument,
    output: Annotated[Path | None, typer.Option("--output", help="Default: study.json beside the YAML.")] = None,
    bundle: Annotated[
        Path | None, typer.Option("--bundle", help="The Flower bundle; its SHA-256 enters the study.")
    ] = None,
    home: HomeOption = None,
) -> None:
    """Calibrate the noise and sign the study with the coordinator's key; from here a changed byte is another study."""
    from sequester.server.authority import signing_key

    study = read(path)
    if bundle is not None:
        try:
            study = study.model_copy(update={"bundle": sha256(bundle.read_bytes())})
        except OSError as error:
            raise StudyError(f"{bundle}: {error.strerror}", hint="`sequester-server bundle FILE` writes it") from None
    open_ends = unnamed(study)
    if open_ends:
        raise StudyError(open_ends[0], hint="complete the study before it is signed")
    require_worth(study)
    study = validated(study_json(privacy.calibrate(study)))
    privacy.session_params(study)
    privacy.check_calibrated(study)
    privacy.check_headroom(study)
    place = home_of(home)
    founded = place.config(place.coordinator).consortium
    if study.consortium != founded:
        raise StudyError(f"the study names consortium `{study.consortium}`, this is `{founded}`", hint="correct it")
    document = sign_document("study", study_json(study), signing_key(place, passphrase()))
    open_document(document, "study", None)  # what will not open at the hospitals does not leave here
    target = output or path.with_suffix(".json")
    temporary = target.with_name(target.name + ".new")
    try:
        temporary.write_bytes(document)
        temporary.replace(target)
    except OSError as error:
        raise StudyError(f"{target}: {error.strerror}", hint="choose another --output") from None
    typer.echo(f"study {privacy.study_digest(study)} signed: {target}")
    carried = bundle or "FILE"
    typer.echo(f"next: `sequester-server study publish {target} --bundle {carried}`.")


def show(path: StudyArgument) -> None:
    """Print a study as the bytes that are signed, indented, and its digest."""
    study = read(path)
    typer.echo(json.dumps(study_json(study), indent=2, ensure_ascii=False))
    typer.echo(f"digest {privacy.study_digest(study)}", err=True)


def passphrase() -> bytes | None:
    """The passphrase of the coordinator's keys: SEQUESTER_PASSPHRASE, None where it is not set."""
    text = os.environ.get("SEQUESTER_PASSPHRASE", "")
    return text.encode() or None


def read(path: Path) -> Study:
    """The study in a YAML file or in a signed document; a document's signature must hold under the key it names."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StudyError(f"{path}: {error.strerror}", hint="`sequester-server study new` writes one") from None
    if data.startswith(b'{"body":'):
        return parse_study(open_document(data, "study", None).body_bytes)
    try:
        return read_study(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise StudyError(f"{path}: byte {error.start} is not UTF-8", hint="save the file as UTF-8") from None


def unnamed(study: Study) -> list[str]:
    """What keeps a study from being signed: hospitals without a key, no bundle, a date that has passed."""
    said = [f"site `{site.id}` has no key yet" for site in study.sites if site.key.startswith(UNNAMED)]
    if study.bundle.startswith(UNNAMED):
        said.append("no bundle is named: `study sign --bundle FILE` fills it in")
    if study.expires_at <= datetime.now(UTC):
        said.append(f"expires: {study.expires} has passed: choose a later date")
    return said


def _print(study: Study, said: Forecast) -> None:
    console = Console(highlight=False)
    table = Table("analysis", "mode", "rounds + spare", "numbers", "bytes a round", "noise multiplier", "sd of the sum")
    for column in table.columns:
        column.overflow = "fold"  # 80 columns are few: a cut word says less than two lines
    for row in said.analyses:
        noise = (f"{row.noise_multiplier:.3f}", f"{row.noise_sd_of_sum:.2f}") if row.noise_multiplier else ("none", "0")
        table.add_row(
            f"{row.name} ({row.kind})", row.mode, f"{row.rounds} + {row.spares}", str(row.coordinates),
            str(row.bytes_a_round), *noise,
        )  # fmt: skip
    console.print(table)
    lines = [
        f"{said.sites} hospitals, mode {said.mode}: {said.colluders} may collude with the exchange, {said.absent} may be "
        f"absent; the noise is sized for {said.honest_adders} honest shares.",
        f"Each hospital sends at most {said.bytes_a_site} bytes of masked sums.",
    ]
    if said.promise is not None:
        p = said.promise
        lines += [
            f"Privacy profile: {said.profile or 'none, numbers of its own'}.",
            f"epsilon {p.filter:.3f} by the filter, {p.pld:.3f} by PLD with every spare used, {p.pld_without_spares:.3f} "
            f"with none, at delta {float(study.privacy.delta):g}.",
            f"A patient in two hospitals: {p.two_copies:.3f}. Everybody else colludes: {p.all_others_collude:.3f}.",
        ]
    for model in said.utility:
        low, high = model.loss
        lost = f"more than {low:g}" if model.verdict == "refused" else f"at most {high:g}"
        measured = "" if study.phenotype.kind == "binary" else ", which was measured on yes/no outcomes"
        lines.append(
            f"{model.analysis}: {model.features} features for n0 {study.n0} at epsilon {model.epsilon:.2f} of its own: "
            f"{model.verdict}. Privacy costs {lost} of AUC by the planning rule{measured}."
        )
    for line in (*lines, *said.advice):
        console.print(line, soft_wrap=True)
    for site in study.sites:
        console.print(f"  {site.id}  {fingerprint(bytes.fromhex(site.key))[:16]}")
