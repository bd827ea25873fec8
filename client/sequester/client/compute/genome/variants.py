"""The variants of a file as columns: a million rows are about 60 bytes each, and a pass over genotypes holds no more.

A row is one ALT allele of one line of the file. `counted` is the allele whose copies a reader returns.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

OTHER_CONTIG, X, Y, XY, MT = 0, 23, 24, 25, 26
_NAMES = ("other", *(str(n) for n in range(1, 23)), "X", "Y", "XY", "MT")
_CODES = {name: code for code, name in enumerate(_NAMES) if code} | {"23": X, "24": Y, "25": XY, "26": MT, "M": MT}
COMPLEMENT = str.maketrans("ACGT", "TGCA")


def chromosome_code(name: str) -> int:
    """1..22, 23 X, 24 Y, 25 XY, 26 MT, whatever the file's habit; 0 is any other contig.

    >>> [chromosome_code(n) for n in ("chr1", "CHR22", "23", "chrM", "GL000220.1", "01")]
    [1, 22, 23, 26, 0, 0]
    """
    bare = name[3:] if name[:3].lower() == "chr" else name
    return _CODES.get(bare.upper(), OTHER_CONTIG)


def chromosome_name(code: int) -> str:
    """The name of a code.

    >>> chromosome_name(7), chromosome_name(26)
    ('7', 'MT')
    """
    return _NAMES[code]


def is_palindromic(a: str, b: str) -> bool:
    """True for A/T and C/G: both strands read the same pair, so the strand cannot be told from it."""
    return len(a) == 1 and len(b) == 1 and a.translate(COMPLEMENT) == b


@dataclass(frozen=True, slots=True)
class Row:
    """One variant of a file: `counted` is the allele whose copies the reader returns; `id` is the file's own label."""

    chromosome: str
    position: int
    counted: str
    other: str
    id: str = ""


class Variants(Sequence[Row]):
    """Rows in file order, as columns: `code` uint8, `position` int64, `counted` and `other` alleles, `id` labels."""

    __slots__ = ("code", "counted", "id", "other", "position")

    def __init__(
        self,
        code: NDArray[np.uint8],
        position: NDArray[np.int64],
        counted: Sequence[str],
        other: Sequence[str],
        id: NDArray[Any],
    ) -> None:
        self.code, self.position, self.counted, self.other, self.id = code, position, counted, other, id

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Variants:
        """The same rows as columns."""
        columns = Columns()
        for row in rows:
            columns.add(chromosome_code(row.chromosome), row.position, row.counted, row.other, row.id)
        return columns.variants()

    @property
    def key(self) -> NDArray[np.int64]:
        """Chromosome and position in one number; equal keys are the same place."""
        return places(self.code, self.position)

    def __len__(self) -> int:
        return len(self.code)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return Row(
            _NAMES[self.code[index]], int(self.position[index]), self.counted[index], self.other[index],
            str(self.id[index]),
        )  # fmt: skip

    def __iter__(self) -> Iterator[Row]:
        return (self[i] for i in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Variants):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # a table is not a key

    def take(self, indices: NDArray[np.int64]) -> Variants:
        """The rows at `indices`, in that order."""
        counted, other = [self.counted[i] for i in indices], [self.other[i] for i in indices]
        return Variants(self.code[indices], self.position[indices], counted, other, self.id[indices])


def places(code: NDArray[np.uint8], position: NDArray[np.int64]) -> NDArray[np.int64]:
    """Chromosome and position in one int64; the order is genome order, and no place is 0."""
    return (code.astype(np.int64) << 32) | (position & 0xFFFFFFFF)


class Columns:
    """Rows being collected; alleles are upper case and shared."""

    def __init__(self) -> None:
        self._code, self._position = array("B"), array("q")
        self._counted: list[str] = []
        self._other: list[str] = []
        self._id: list[str] = []
        self._packed: list[NDArray[Any]] = []

    def __len__(self) -> int:
        return len(self._code)

    def add(self, code: int, position: int, counted: str, other: str, id: str) -> None:
        """One more row."""
        self._code.append(code)
        self._position.append(position)
        self._counted.append(sys.intern(counted.upper()))
        self._other.append(sys.intern(other.upper()))
        self._id.append(id)
        if len(self._id) >= 65536:
            self._packed.append(np.array(self._id, dtype=np.dtypes.StringDType()))
            self._id = []

    def variants(self) -> Variants:
        """The table of all rows added."""
        ids = np.concatenate([*self._packed, np.array(self._id, dtype=np.dtypes.StringDType())])
        return Variants(
            np.array(self._code, dtype=np.uint8), np.array(self._position, dtype=np.int64),
            self._counted, self._other, ids,
        )  # fmt: skip


def join(tables: Sequence[Variants]) -> Variants:
    """The rows of several files one after another."""
    counted: list[str] = []
    other: list[str] = []
    for table in tables:
        counted += table.counted
        other += table.other
    return Variants(
        np.concatenate([t.code for t in tables]),
        np.concatenate([t.position for t in tables]),
        counted,
        other,
        np.concatenate([t.id for t in tables]),
    )
