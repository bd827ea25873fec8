"""Three named choices of privacy that cover most studies. A word for people: what is signed are their numbers.

`profile: standard` in a study.yaml is read as the numbers below, so a signed study never depends on what a name means in
this release or the next; a hospital says by the numbers which profile a study has, and cannot be told another.

Epsilon 1, 3 and 8 with the order at which each needs least noise (spec/privacy.md, 2.2 and 9). Delta is one for a whole
ledger, so all three share it.
"""

from __future__ import annotations

from decimal import Decimal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sequester.protocols.study import Privacy

PROFILES = {
    "cautious": {"epsilon": Decimal("1"), "delta": Decimal("0.000001"), "order": Decimal("22")},
    "standard": {"epsilon": Decimal("3"), "delta": Decimal("0.000001"), "order": Decimal("8.9")},
    "open": {"epsilon": Decimal("8"), "delta": Decimal("0.000001"), "order": Decimal("4.4")},
}
PURPOSES = {
    "cautious": "few patients, or a diagnosis that must not be guessed: nearly three times the noise of standard",
    "standard": "the default, and what a hospital allows a study unless its policy says otherwise",
    "open": "many studies cannot follow on the same patients; a hospital's policy has to allow it",
}


def expanded(section: dict[str, object]) -> dict[str, object]:
    """A study's privacy section with its profile's numbers in place of the name; `ValueError` where both are given."""
    name, others = section.get("profile"), sorted(set(section) - {"profile"})
    if name not in PROFILES:
        raise ValueError(f"there is no profile `{name}`; there are {', '.join(PROFILES)}")
    if others:
        raise ValueError(f"profile {name} decides the whole section, and `{others[0]}` stands beside it")
    return dict(PROFILES[str(name)])


def profile_of(privacy: Privacy) -> str | None:
    """The profile whose numbers these are, None for numbers of a study's own."""
    if (privacy.unit, privacy.adjacency, privacy.mechanism) != ("patient", "add-remove", "distributed"):
        return None
    own = {"epsilon": privacy.epsilon, "delta": privacy.delta, "order": privacy.order}
    return next((name for name, numbers in PROFILES.items() if numbers == own), None)
