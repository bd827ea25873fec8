"""A definition as this site uses it: read from a file or the signed study, its phecodes looked up in the public map."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from sequester.client.ingest.phenotypes.phecodes import PhecodeMap
from sequester.protocols.definition import CodeList, Definition, Domain, definition_of
from sequester.protocols.errors import SiteError, StudyError

LARGEST = 4 << 20
_BY_PREFIX = ("ICD", "ATC")  # vocabularies whose codes begin with the code above them


@dataclass(frozen=True, slots=True)
class Codes:
    """The code lists of one set, with phecodes replaced by the diagnoses of the map."""

    domain: Domain
    lists: tuple[CodeList, ...]


@dataclass(frozen=True, slots=True)
class Expanded:
    """`sets` by name; `exclusions`: for a set given as a phecode, the name of the set of its exclusion range."""

    definition: Definition
    sets: dict[str, Codes]
    exclusions: dict[str, str] = field(default_factory=dict)


def read(path: Path) -> Definition:
    """The definition in a JSON file of this site, or in the signed study that a file holds."""
    try:
        data = path.read_bytes()
        if len(data) > LARGEST:
            raise SiteError(f"{path.name} has {len(data)} bytes", hint=f"a definition has at most {LARGEST}")
        value = json.loads(data.decode("utf-8"))
    except OSError as error:
        raise SiteError(f"{path}: {error.strerror}", hint="name a definition, JSON") from None
    except (ValueError, RecursionError):
        raise SiteError(f"{path.name} is not JSON", hint="a definition is one JSON object, UTF-8") from None
    return definition_of(value)


def expand(definition: Definition, phecodes: PhecodeMap | None) -> Expanded:
    """The sets as code lists; a phecode without a map, or with another map than the study's, is refused."""
    sets: dict[str, Codes] = {}
    exclusions: dict[str, str] = {}
    for name, given in definition.sets.items():
        if given.phecode is None:
            sets[name] = Codes(given.domain, given.lists)
            continue
        if phecodes is None:
            raise SiteError(
                f"the set {name} is phecode {given.phecode} and no map was named",
                hint="--phecode-map FILE: the public table from ICD to phecode (phewascatalog.org)",
            )
        if given.map_sha256 not in (None, phecodes.sha256):
            raise SiteError(
                f"the phecode map has SHA-256 {phecodes.sha256[:12]}, the definition names {given.map_sha256[:12]}"
                if given.map_sha256
                else "",
                hint="use the map the consortium agreed on",
            )
        codes = phecodes.codes(given.phecode)
        if not codes:
            raise StudyError(f"phecode {given.phecode} is not in the map", hint="another version of the map?")
        sets[name] = Codes("condition", codes)
        if around := phecodes.exclusion(given.phecode):
            exclusions[name] = f"{name} (exclusion range)"
            sets[exclusions[name]] = Codes("condition", around)
    return Expanded(definition, sets, exclusions)


def is_hierarchical(vocabulary: str) -> bool:
    """True where what lies below a code begins with it."""
    return vocabulary.upper().startswith(_BY_PREFIX)


def spelled(vocabulary: str, code: str) -> str:
    """A code as it is compared: ICD without its dot and in upper case, all others as written.

    >>> spelled("ICD10CM", "e11.9"), spelled("LOINC", "4548-4")
    ('E119', '4548-4')
    """
    return code.replace(".", "").upper() if vocabulary.upper().startswith("ICD") else code


class Lookup:
    """Which sets of a domain a code belongs to; only codes, no hierarchy but prefixes."""

    def __init__(self, sets: dict[str, Codes]) -> None:
        self._exact: dict[tuple[Domain, str, str], set[str]] = {}
        self._prefix: dict[tuple[Domain, str, str], set[str]] = {}
        self._longest = 0
        self.vocabularies: set[str] = set()
        for name, codes in sets.items():
            for listed in codes.lists:
                vocabulary = listed.vocabulary.upper()
                self.vocabularies.add(vocabulary)
                table = self._prefix if listed.descendants else self._exact
                for code in listed.codes:
                    text = spelled(vocabulary, code)
                    table.setdefault((codes.domain, vocabulary, text), set()).add(name)
                    self._longest = max(self._longest, len(text))

    def sets(self, domain: Domain, vocabulary: str, code: str) -> set[str]:
        """Names of the sets that the code is of."""
        vocabulary = vocabulary.upper()
        text = spelled(vocabulary, code)
        found = set(self._exact.get((domain, vocabulary, text), ()))
        for end in range(1, min(len(text), self._longest) + 1):
            found |= self._prefix.get((domain, vocabulary, text[:end]), set())
        return found
