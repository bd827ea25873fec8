"""Where a site keeps things, and what its `site.toml` says.

    HOME/site.toml                       settings and policy, written by hospital IT
    HOME/datasets/<id>/                  ledger.db, ledger.key, cohorts/, exclusions/: one budget for all consortia
    HOME/consortia/<name>/               consortium.json, keys, certificate, pins.json, approvals/, journal/
    HOME/run/, HOME/log/                 sockets and logs; nothing in them is needed to recover

State of the data lies apart from state of a consortium, so one hospital serves several consortia on one budget.
"""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass
from glob import has_magic
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from pydantic_core import ErrorDetails

from sequester.client.policy import Policy
from sequester.protocols.errors import SiteError


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SiteSection(_Section):
    """The site's name, as the study will write it."""

    id: Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9-]{1,31}$")]
    language: str = "en"


class DataSection(_Section):
    """One data set: genotype files and one row per patient of text columns.

    `genotypes`: a prefix of .bed/.bim/.fam or .pgen/.pvar/.psam, a .vcf, .vcf.gz, .bcf or .bgen file, or a pattern with
    * or ? in its last part that names several of either.
    """

    id: Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_-]{0,31}$")] = "main"
    genotypes: str | None = None
    build: Literal["NCBI36", "GRCh37", "GRCh38"] = "GRCh38"
    phenotypes: str | None = None
    id_column: str = "patient"


class ComputeSection(_Section):
    """Where torch computes: `cpu`, or `cuda` on a machine that has one. Linear models in closed form use neither."""

    device: Literal["cpu", "cuda"] = "cpu"


class ScoringSection(_Section):
    """Scores of single patients at this site, off by default (scoring/README.md). `signer` answers for the reports.

    `reference`: prefix of public genotypes (PLINK) that scores are compared with; `reference_labels`: iid,superpopulation.
    """

    enabled: bool = False
    signer: str = ""
    reference: str | None = None
    reference_labels: str | None = None
    reference_build: Literal["NCBI36", "GRCh37", "GRCh38"] = "GRCh37"


ONE_PASS = (".vcf", ".vcf.gz", ".vcf.bgz", ".bcf", ".bgen")  # files that are read once, by `data ingest`


def genotype_files(named: str | None) -> list[Path]:
    """The one-pass files and PLINK prefixes that `genotypes` in site.toml names, in order of their names."""
    if not named:
        raise SiteError("site.toml names no genotypes", hint="set `genotypes` under [data]")
    if "://" in named:
        raise SiteError(f"{named} is not a path", hint="genotypes are read from files of this machine only")
    path = Path(named).absolute()
    if not has_magic(path.name):
        return [path]
    found = []
    for match in sorted(path.parent.glob(path.name)):
        if match.name.endswith(ONE_PASS):
            found.append(match)
        elif match.suffix in (".bed", ".pgen"):
            found.append(match.with_suffix(""))
    if not found:
        raise SiteError(f"nothing matches {named}", hint="a pattern names .vcf.gz, .bcf, .bgen, .bed or .pgen files")
    return found


class NetworkSection(_Section):
    """How this site reaches out; empty means directly. `https_proxy` is http://[user:password@]host:port."""

    https_proxy: str = ""


class SiteConfig(_Section):
    """`site.toml`, validated."""

    site: SiteSection
    data: DataSection = DataSection()
    compute: ComputeSection = ComputeSection()
    network: NetworkSection = NetworkSection()
    policy: Policy = Field(default_factory=Policy)
    scoring: ScoringSection = ScoringSection()


@dataclass(frozen=True, slots=True)
class Home:
    """The paths of one site."""

    root: Path

    @property
    def site_toml(self) -> Path:
        return self.root / "site.toml"

    @property
    def run(self) -> Path:
        return self.root / "run"

    @property
    def log(self) -> Path:
        return self.root / "log"

    def dataset(self, name: str) -> Path:
        return self.root / "datasets" / name

    def consortium(self, name: str) -> Path:
        return self.root / "consortia" / name

    def enrolling(self) -> list[str]:
        """The consortia whose coordinator was asked and has not decided, as far as this site knows."""
        return sorted(path.parent.name for path in (self.root / "enrolment").glob("*/token"))

    def consortia(self) -> list[str]:
        """Names of the consortia this site is enrolled in."""
        folder = self.root / "consortia"
        return sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []

    def config(self) -> SiteConfig:
        """The settings; a missing or wrong `site.toml` is a `SiteError` with the line that is at fault."""
        try:
            text = self.site_toml.read_bytes()
        except OSError as error:
            raise SiteError(
                f"{self.site_toml}: {error.strerror}",
                hint="name the site's folder with --home or SEQUESTER_HOME, or write site.toml there "
                "(client/README.md has one to copy)",
            ) from None
        try:
            return SiteConfig.model_validate(tomllib.loads(text.decode("utf-8")))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise SiteError(f"{self.site_toml} is not TOML: {error}", hint="correct the line named above") from None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise SiteError(
                f"{self.site_toml}: {where}: {first['msg']}{_found(first)}", hint="client/README.md lists every setting"
            ) from None


def _found(fault: ErrorDetails) -> str:
    """What stood there, where it is a word out of a list: other settings may hold a password."""
    return f"; found `{str(fault['input'])[:40]}`" if fault["type"] == "literal_error" else ""


def home(path: Path | None = None) -> Home:
    """The site's home: the argument, else SEQUESTER_HOME, else `~/.sequester`."""
    return Home(path or Path(os.environ.get("SEQUESTER_HOME", str(Path.home() / ".sequester"))))
