"""The security argument of one round, searched: no reachable state opens more than one sum, or a small one.

The whole grid of section 13 with the roster threshold; each rule taken away must lead to a violation, or the search
would prove nothing. Larger grids are nightly.
"""

from __future__ import annotations

import pytest

from attacks.state_model import Cell, Checks, Found, search, sets


def threshold(n_sites: int, corrupt: int) -> int:
    return (n_sites + corrupt) // 2 + 1


def cell(n_sites: int, corrupt: int, *active: int, views: int = 2, absent: int | None = None) -> Cell:
    """`active`: sizes of the one or two active sets, corrupt sites counted."""
    honest = [n - corrupt for n in active]
    chosen = sets(honest[0]) if len(honest) == 1 else sets(n_sites - corrupt, *honest)
    return Cell(n_sites, corrupt, chosen, absent, views)


ONE_SET = [
    cell(n_sites, c, n, absent=a)
    for n_sites in range(3, 7)
    for c in range(1, min(3, n_sites - 2) + 1)
    for n in range(threshold(n_sites, c), min(5, n_sites) + 1)
    for a in range(n_sites - threshold(n_sites, c) + 1)
]
TWO_SETS = [
    cell(n_sites, c, first, second)
    for n_sites in range(3, 7)
    for c in range(1, min(3, n_sites - 2) + 1)
    for first in range(threshold(n_sites, c), min(5, n_sites) + 1)
    for second in range(threshold(n_sites, c), first + 1)
]
THREE_VIEWS = [cell(4, 1, 4, views=3), cell(5, 1, 5, views=3), cell(5, 2, 5, views=3)]


def holds(found: Found) -> None:
    assert found.violation is None, found
    assert found.sums, "nothing opens at all: the model is empty"


@pytest.mark.parametrize("checked", ONE_SET, ids=str)
def test_no_message_order_opens_more_than_one_sum_of_one_active_set(checked: Cell) -> None:
    holds(search(checked))


@pytest.mark.parametrize("checked", TWO_SETS, ids=str)
def test_no_message_order_opens_a_sum_in_each_of_two_active_sets_of_one_round(checked: Cell) -> None:
    holds(search(checked))


@pytest.mark.parametrize("checked", THREE_VIEWS, ids=str)
def test_a_third_view_helps_nobody(checked: Cell) -> None:
    holds(search(checked))


def test_the_full_sum_and_the_sum_without_one_site_are_both_reachable_and_never_together() -> None:
    sums = search(cell(4, 1, 4)).sums
    assert {subset.bit_count() for _, subset in sums} == {2, 3}


CASES = {  # the mutation, and every cell in which the search has to catch it
    "t - 1": (Checks(lower_threshold_by=1), [cell(4, 1, 4), cell(5, 1, 5), cell(5, 2, 5), cell(6, 1, 3, 4)]),
    "t from n": (Checks(threshold_from_active=True), [cell(6, 1, 3, 4)]),
    "no C12": (Checks(views_grow_and_sets_shrink=False), [cell(4, 1, 4), cell(5, 2, 5), cell(4, 1, 4, 3)]),
    "no C13": (Checks(no_ack_after_release=False), [cell(4, 1, 4), cell(5, 1, 5), cell(5, 2, 5), cell(4, 1, 4, 3)]),
    "no C14": (Checks(no_full_release_after_ack=False), [cell(4, 1, 4), cell(5, 1, 5), cell(5, 2, 5)]),
}


@pytest.mark.parametrize(
    ("mutation", "checked"),
    [(name, checked) for name, (_, cells) in CASES.items() for checked in cells],
    ids=str,
)
def test_the_search_catches_every_rule_taken_away(mutation: str, checked: Cell) -> None:
    assert search(checked, CASES[mutation][0]).violation, mutation


def test_one_digest_a_round_is_a_second_line_behind_the_other_rules() -> None:
    # with C12, C13 and C14 in place the search finds no use for a second release; C15 is kept as law 5 all the same
    for checked in (cell(4, 1, 4), cell(5, 1, 5), cell(5, 2, 5)):
        holds(search(checked, Checks(one_release=False)))


@pytest.mark.nightly
@pytest.mark.timeout(5400)
@pytest.mark.parametrize(
    "checked",
    [
        cell(6, 1, 6, views=1), cell(6, 1, 6), cell(6, 2, 6), cell(6, 3, 6), cell(7, 1, 5), cell(7, 2, 5), cell(7, 2, 6),
        cell(7, 3, 6), cell(7, 1, 6, views=1), cell(6, 1, 6, 5, views=1), cell(6, 2, 6, 5), cell(7, 2, 6, 5),
        cell(5, 1, 5, 4, views=3),
    ],
    ids=str,
)  # fmt: skip
def test_the_larger_grid_holds(checked: Cell) -> None:
    holds(search(checked, limit=5_000_000))


@pytest.mark.nightly
@pytest.mark.timeout(5400)
@pytest.mark.parametrize("checked", [cell(7, 1, 4, 4), cell(10, 1, 5, 5)], ids=str)
def test_a_threshold_from_the_active_set_opens_two_sums_in_larger_rosters_too(checked: Cell) -> None:
    assert search(checked, Checks(threshold_from_active=True)).violation == "two sums in one round"
