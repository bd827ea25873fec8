"""Every reachable abstract state of one round under a malicious aggregator, by breadth-first search in plain Python.

Imports nothing of the product: the rules of section 5 are written down here a second time, each with a switch that
takes it away. All c corrupt sites are in every active set and in every survivor set, acknowledge anything and give
away their shares and seeds, so a quorum of t is t - c honest sites, and only honest subsets are written out (bit sets).

A site's abstract state: the context it serves in this round (it serves at most one), the sets it acknowledged, the set
acknowledged last, the sets it released. Messages may come in any order, so any site may take any allowed step next.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import permutations
from typing import NamedTuple

View = tuple[int, int]  # (version, honest part of the survivor set); version 0 is the whole active set


@dataclass(frozen=True, slots=True)
class Checks:
    """The site's rules; a mutation is one of them gone."""

    lower_threshold_by: int = 0
    threshold_from_active: bool = False
    views_grow_and_sets_shrink: bool = True  # C12
    no_ack_after_release: bool = True  # C13
    no_full_release_after_ack: bool = True  # C14
    one_release: bool = True  # C15


@dataclass(frozen=True, slots=True)
class Cell:
    """N sites, c of them corrupt; `active`: the honest part of each active set offered in the one round, as bit sets."""

    n_sites: int
    corrupt: int
    active: tuple[int, ...]
    absent: int | None = None  # a; None: N - t
    views: int = 2


class Site(NamedTuple):
    context: int = -1
    masked: bool = False
    acked: frozenset[View] = frozenset()
    last: View = (0, 0)
    released: frozenset[View] = frozenset()


@dataclass(frozen=True, slots=True)
class Found:
    """What the whole search saw: states up to renaming of honest sites, sums that open alone, and a violation if any."""

    states: int
    sums: frozenset[tuple[int, int]]  # (context, bit set of honest sites)
    violation: str | None


def sets(*sizes: int) -> tuple[int, ...]:
    """Honest parts of two active sets with the least overlap: the first from the bottom, the second from the top."""
    if len(sizes) == 1:
        return ((1 << sizes[0]) - 1,)
    honest, first, second = sizes
    return (1 << first) - 1, ((1 << second) - 1) << (honest - second)


def search(cell: Cell, checks: Checks = Checks(), limit: int = 2_000_000) -> Found:
    """Visits every state; stops at the first violation of the goal or of the quorum lemma (section 10)."""
    return _Search(cell, checks).run(limit)


class _Search:
    def __init__(self, cell: Cell, checks: Checks) -> None:
        self.cell, self.checks, self.c = cell, checks, cell.corrupt
        self.honest = cell.n_sites - cell.corrupt
        roster = (cell.n_sites + self.c) // 2 + 1 - checks.lower_threshold_by
        self.t, self.u = [], []
        for members in cell.active:
            n = members.bit_count() + self.c
            t = (n + self.c) // 2 + 1 if checks.threshold_from_active else roster
            absent = cell.n_sites - t if cell.absent is None else cell.absent
            self.t.append(t)
            self.u.append(max(t, n - absent))
        self.refused = any(m.bit_count() + self.c < t for m, t in zip(cell.active, self.t, strict=True))  # n < t
        # the proper subsets of each active set that are large enough, corrupt sites counted in
        self.subsets = [
            [s for s in range(1, members) if s & ~members == 0 and s.bit_count() + self.c >= u]
            for members, u in zip(cell.active, self.u, strict=True)
        ]
        self.renamings = [p for p in permutations(range(self.honest)) if self._keeps_active_sets(p)]
        self._rename = cache(self._renamed_site)

    # ---- symmetry: honest sites with the same place in the active sets have no name -----------------------------

    def _keeps_active_sets(self, names: Sequence[int]) -> bool:
        return all(_renamed(members, names) == members for members in self.cell.active)

    def _renamed_site(self, site: Site, names: tuple[int, ...]) -> Site:
        def view(v: View) -> View:
            return v[0], _renamed(v[1], names)

        return site._replace(
            acked=frozenset(map(view, site.acked)), last=view(site.last), released=frozenset(map(view, site.released))
        )

    def _canonical(self, state: tuple[Site, ...]) -> tuple[Site, ...]:
        best: tuple[object, tuple[Site, ...]] | None = None
        for names in self.renamings:
            other: list[Site] = [Site()] * self.honest
            for i, site in enumerate(state):
                other[names[i]] = self._rename(site, names)
            key = tuple(map(_order, other))
            if best is None or key < best[0]:  # type: ignore[operator]
                best = (key, tuple(other))
        assert best is not None
        return best[1]

    # ---- steps --------------------------------------------------------------------------------------------------

    def _quorums(self, state: tuple[Site, ...], context: int) -> set[View]:
        votes: dict[View, int] = {}
        for site in state:
            if site.context == context:
                for view in site.acked:
                    votes[view] = votes.get(view, 0) + 1
        return {view for view, n in votes.items() if n >= self.t[context] - self.c}

    def _steps(self, state: tuple[Site, ...]) -> Iterator[tuple[Site, ...]]:
        quorums = [self._quorums(state, k) for k in range(len(self.cell.active))]
        for i, site in enumerate(state):
            for after in self._site_steps(i, site, state, quorums):
                if after != site:
                    yield (*state[:i], after, *state[i + 1 :])

    def _site_steps(self, i: int, site: Site, state: tuple[Site, ...], quorums: list[set[View]]) -> Iterator[Site]:
        me, checks = 1 << i, self.checks
        if site.context < 0:
            for k, members in enumerate(self.cell.active):
                if members & me:
                    yield site._replace(context=k, masked=True)
                    for view in quorums[k]:  # it missed the start and is asked for seeds: its last_round rises too
                        if not view[1] & me:
                            yield site._replace(context=k, released=frozenset({view}))
            return
        k, members = site.context, self.cell.active[site.context]
        if site.masked and not (site.released and checks.no_ack_after_release):
            for subset in self.subsets[k]:
                if subset & me:
                    for version in range(1, self.cell.views + 1):
                        grows = version > site.last[0] and (
                            not site.acked or (subset != site.last[1] and subset & ~site.last[1] == 0)
                        )
                        if grows or not checks.views_grow_and_sets_shrink:
                            view = (version, subset)
                            yield site._replace(acked=site.acked | {view}, last=view)

        def release(view: View) -> Iterator[Site]:
            if not site.released or not checks.one_release:
                yield site._replace(released=site.released | {view})

        entered = sum(1 << j for j, other in enumerate(state) if other.context == k and other.masked)
        if site.masked and entered == members and not (site.acked and checks.no_full_release_after_ack):
            yield from release((0, members))
        for view in quorums[k]:
            # a member of U opens the boxes of U, so all of U has masked; a site outside U only names seeds
            inside = bool(view[1] & me)
            if not inside or (site.masked and view == site.last and view[1] & ~entered == 0):
                yield from release(view)

    # ---- what the adversary knows -------------------------------------------------------------------------------

    def _judge(self, state: tuple[Site, ...], sums: set[tuple[int, int]]) -> str | None:
        opened: set[tuple[int, int]] = set()
        for k, members in enumerate(self.cell.active):
            shares = [0] * self.honest
            seeds: set[tuple[int, int]] = set()
            excluded = 0
            for i, site in enumerate(state):
                if site.context != k:
                    continue
                for _, subset in site.released:
                    inside = bool(subset & 1 << i)
                    for j in _bits(subset if inside else 0):
                        shares[j] += 1
                    for j in _bits(members & ~subset if inside else subset):
                        seeds |= {(i, j), (j, i)}
                    excluded |= members & ~subset
            need = self.t[k] - self.c
            is_open = sum(1 << j for j in _bits(members) if state[j].masked and shares[j] >= need)
            if is_open & excluded:
                return "a self-mask and a seed of the same site"
            subset = is_open
            while subset:
                if all((i, j) in seeds for i in _bits(subset) for j in _bits(members & ~subset)):
                    opened.add((k, subset))
                    if subset.bit_count() < self.u[k] - self.c:
                        return "a sum of fewer honest sites than u - c"
                subset = (subset - 1) & is_open
        sums |= opened
        return "two sums in one round" if len(opened) > 1 else None

    def run(self, limit: int) -> Found:
        sums: set[tuple[int, int]] = set()
        start = (Site(),) * self.honest
        seen, layer = {start}, [start]
        if self.refused:
            return Found(0, frozenset(), None)
        while layer:
            following = []
            for state in layer:
                for raw in self._steps(state):
                    after = self._canonical(raw)
                    if after in seen:
                        continue
                    seen.add(after)
                    if len(seen) > limit:
                        raise RuntimeError(f"more than {limit} states")
                    violation = self._judge(after, sums)
                    if violation:
                        return Found(len(seen), frozenset(sums), violation)
                    following.append(after)
            layer = following
        return Found(len(seen), frozenset(sums), None)


def _order(site: Site) -> tuple[object, ...]:
    return site.context, site.masked, sorted(site.acked), site.last, sorted(site.released)


def _bits(subset: int) -> Iterator[int]:
    while subset:
        low = subset & -subset
        yield low.bit_length() - 1
        subset ^= low


def _renamed(subset: int, names: Sequence[int]) -> int:
    return sum(1 << names[i] for i in _bits(subset))
