"""What the head of a .pgen file promises: how many people and variants, how long the file is, whether it holds dosages.

pgenlib reads a file with bytes missing or added until it meets them; here they are seen before the first genotype.
Source: the PGEN specification (C. Chang, pgen_spec.tex), sections 2 and 3.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sequester.protocols.errors import SiteError

_BLOCK = 1 << 16  # variants in one block of the header
_HAS_DOSAGE = 0x60  # bits 5 and 6 of a record's type


@dataclass(frozen=True, slots=True)
class PgenHeader:
    """Counts, the size the file must have in bytes, and whether any record carries dosages."""

    people: int
    variants: int
    size: int
    has_dosages: bool


def pgen_header(path: Path) -> PgenHeader:
    """The header of a .pgen file; a file that does not begin as one, or whose header is cut, is a `SiteError`."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(12)
        if start[:2] != b"\x6c\x1b":
            raise SiteError(
                f"{path.name} does not begin as a .pgen file", hint="copy it again, or name the right prefix"
            )
        if len(start) < 12:
            raise SiteError(f"{path.name} has {size} bytes, its header alone has more", hint="copy it again")
        mode, (variants, people), flags = start[2], struct.unpack("<II", start[3:11]), start[11]
        if mode == 0x02:  # hard calls of fixed width, no table
            return PgenHeader(people, variants, 12 + variants * -(-people // 4) + _nonref(flags, variants), False)
        if mode != 0x10:
            raise SiteError(
                f"{path.name} is of storage mode {mode:#04x}, 0x10 was expected",
                hint=f"write it anew: `plink2 --pfile {path.stem} --make-pgen`",
            )
        blocks = -(-variants // _BLOCK)
        if size < 12 + 8 * blocks + variants:
            raise SiteError(
                f"{path.name} has {size} bytes; the table of its {variants} variants alone has more",
                hint="copy it again",
            )
        offsets = np.frombuffer(file.read(8 * blocks), dtype="<u8")
        width, narrow = (flags & 3) + 1, (flags & 15) < 4
        alleles = (flags >> 4) & 3
        if (flags & 15) > 7:
            raise SiteError(f"{path.name}: its header is of an unknown kind", hint="copy it again, or write it anew")
        total, dosages = 0, False
        for block in range(blocks):
            here = min(_BLOCK, variants - block * _BLOCK)
            types = file.read(-(-here // 2) if narrow else here)
            lengths = np.frombuffer(file.read(width * here), dtype=np.uint8)
            if len(lengths) != width * here:
                raise SiteError(f"{path.name} ends inside its table of variants", hint="copy it again")
            if int(offsets[block]) != int(offsets[0]) + total:
                raise SiteError(f"{path.name}: its table of variants contradicts itself", hint="copy it again")
            padded = np.zeros((here, 4), dtype=np.uint8)
            padded[:, :width] = lengths.reshape(here, width)
            total += int(padded.view("<u4").sum(dtype=np.uint64))
            dosages |= not narrow and bool((np.frombuffer(types, dtype=np.uint8) & _HAS_DOSAGE).any())
            file.seek(alleles * here + (-(-here // 8) if flags >> 6 == 3 else 0), 1)
        if blocks and file.tell() != int(offsets[0]):
            raise SiteError(f"{path.name}: its table of variants contradicts itself", hint="copy it again")
        return PgenHeader(people, variants, file.tell() + total, dosages)


def _nonref(flags: int, variants: int) -> int:
    return -(-variants // 8) if flags >> 6 == 3 else 0
