"""Mutated genotype files, thousands a minute: a named error or the right matrix, whatever is done to the bytes.

A worker process makes, reads and judges inputs by number, and says each number before it starts on it; when it dies or
hangs, the parent knows which input did it, and asks the product (`isolated`) for its answer to the same input.
"""

from __future__ import annotations

import gzip
import multiprocessing
import os
import random
import shutil
import struct
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType

import numpy as np

from genome.files import bgzip, matrix_bgen, matrix_vcf, quiet, to_bcf, vcf_text
from sequester.client.compute.genome.plink import PlinkFiles
from sequester.client.compute.genome.source import Reading, open_source
from sequester.client.ingest.convert import GenotypeWriter, convert, write_psam
from sequester.client.ingest.isolated import isolated
from sequester.protocols.errors import SiteError
from sequester.simulate.plink import Line, write_bed

PEOPLE, VARIANTS = 7, 24
KINDS = ("bed", "bim", "fam", "pgen", "pvar", "psam", "vcf", "vcf.gz", "plain.gz", "text-in-gz", "bcf", "payload-in-bcf",
         "bgen", "sample", "dosage-vcf")  # fmt: skip
HANG_S = 30.0
_READERS = "sequester/client/compute/genome/"


@dataclass(slots=True)
class Tally:
    """How inputs ended; `wrong` says what was accepted and is not what the bytes say."""

    ends: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


def corpus(folder: Path) -> None:
    """Small valid files of every format."""
    rng = np.random.default_rng(1)
    counts = rng.integers(0, 3, (PEOPLE, VARIANTS)).astype(np.int8)
    counts[rng.random(counts.shape) < 0.1] = -9
    counts[-1, 0] = 0
    lines = [Line("1" if j < 20 else "X", f"v{j}", 100 + j, "G", "A") for j in range(VARIANTS)]
    people = [f"p{i}" for i in range(PEOPLE)]
    write_bed(folder / "g", people, lines, counts)
    with GenotypeWriter(folder / "h.pgen", PEOPLE, VARIANTS, dosages=True) as writer:
        for j in range(VARIANTS):
            column = counts[:, j]
            writer.add(column if j % 3 else np.where(column < 0, -9, column * 0.93).astype(np.float32))
    write_psam(folder / "h.psam", people, [1, 2, 0, 1, 2, 0, 1])
    (folder / "h.pvar").write_text(
        "#CHROM\tPOS\tID\tREF\tALT\n" + "".join(f"{v.chromosome}\t{v.position}\t{v.id}\tA\tG\n" for v in lines)
    )
    matrix_vcf(folder / "g.vcf", people, lines, counts)
    text = (folder / "g.vcf").read_bytes()
    (folder / "z.vcf.gz").write_bytes(bgzip(text, 512))
    with (folder / "y.vcf.gz").open("wb") as raw, gzip.GzipFile("", "wb", 6, raw, mtime=0) as file:
        file.write(text)
    to_bcf(folder / "g.vcf", folder / "g.bcf")
    matrix_bgen(folder / "g.bgen", people, lines, counts)
    (folder / "g.sample").write_text(
        "ID_1 ID_2 missing sex\n0 0 0 D\n" + "".join(f"0 {p} 0 {1 + i % 2}\n" for i, p in enumerate(people))
    )
    rows = [
        ["1", str(100 + j), f"v{j}", "A", "C,T" if j % 4 == 0 else "C", "PASS", "R2=0.9", "GT:DS",
         *[f"0/1:{'0.5,0.25' if j % 4 == 0 else '1.25'}" for _ in people]]
        for j in range(VARIANTS)
    ]  # fmt: skip
    (folder / "d.vcf").write_text(vcf_text(people, rows))


# which files an input of a kind consists of, and the one that is changed
_FILES = {
    "bed": (("g.bed", "g.bim", "g.fam"), "g.bed"), "bim": (("g.bed", "g.bim", "g.fam"), "g.bim"),
    "fam": (("g.bed", "g.bim", "g.fam"), "g.fam"), "pgen": (("h.pgen", "h.pvar", "h.psam"), "h.pgen"),
    "pvar": (("h.pgen", "h.pvar", "h.psam"), "h.pvar"), "psam": (("h.pgen", "h.pvar", "h.psam"), "h.psam"),
    "vcf": (("g.vcf",), "g.vcf"), "vcf.gz": (("z.vcf.gz",), "z.vcf.gz"), "plain.gz": (("y.vcf.gz",), "y.vcf.gz"),
    "text-in-gz": (("z.vcf.gz",), "z.vcf.gz"), "bcf": (("g.bcf",), "g.bcf"), "payload-in-bcf": (("g.bcf",), "g.bcf"),
    "bgen": (("g.bgen", "g.sample"), "g.bgen"), "sample": (("g.bgen", "g.sample"), "g.sample"),
    "dosage-vcf": (("d.vcf",), "d.vcf"),
}  # fmt: skip
_INTERESTING = (b"\xff" * 4, b"\0" * 4, b"\xff\xff\xff\x7f", b"\x01\0\0\0", b"\0\0\0\x80", b"\xff\xff")
_TEXTS = (
    b"\t", b"\n", b"\r\n", b"\r", b"\0", b"\xff\xfe", b"99999999999", b"-5", b"0", b".", b"<DEL>", b"*", b"1/2", b"./1",
    b"0/1/1", b"x/y", b"GT", b"chr", b"A,C,G", b"p1", b" ", b"\xc2\xa0", b"#CHROM", b"##", b"1e5", b"\n\n", b"NaN", b":",
)  # fmt: skip


def mutate(data: bytes, rng: random.Random, *, is_text: bool) -> bytes:
    """One to three changes."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at = rng.randrange(len(out) + 1)
        match rng.randrange(9 if is_text else 7):
            case 0:
                del out[at:]
            case 1 if at < len(out):
                out[at] ^= 1 << rng.randrange(8)
            case 2:
                piece = rng.choice(_INTERESTING)
                out[at : at + len(piece)] = piece
            case 3:
                del out[at : at + rng.choice((1, 2, 4, 8, 64))]
            case 4:
                out[at:at] = bytes(rng.randrange(256) for _ in range(rng.choice((1, 2, 28))))
            case 5 if out:
                end = at + rng.choice((4, 32, 200))
                other = rng.randrange(len(out))
                out[other:other] = out[at:end]
            case 6:
                head = min(len(out), 64)
                if head:
                    out[rng.randrange(head)] = rng.choice((0, 1, 2, 127, 128, 255))
            case 7:
                out[at:at] = rng.choice(_TEXTS)
            case 8:
                lines = bytes(out).split(b"\n")
                line = rng.randrange(len(lines))
                match rng.randrange(4):
                    case 0:
                        del lines[line]
                    case 1:
                        lines.insert(line, lines[rng.randrange(len(lines))])
                    case 2:
                        fields = lines[line].split(b"\t")
                        fields[rng.randrange(len(fields))] = rng.choice(_TEXTS)
                        lines[line] = b"\t".join(fields)
                    case 3:
                        lines[line] += b"\r"
                out = bytearray(b"\n".join(lines))
            case _:
                pass
    return bytes(out)


def prepare(number: int, clean: Path, folder: Path, pool: Path | None = None) -> tuple[str, Path]:
    """Write input `number` into an empty folder; its kind, and the path or prefix to read.

    With a pool, most inputs are mutations of one of its files instead of the clean one.
    """
    rng = random.Random(number)
    kind = KINDS[number % len(KINDS)]
    grown = sorted(pool.glob(f"{kind}@*")) if pool is not None else []
    base = rng.choice(grown) if grown and rng.random() < 0.8 else None
    names, changed = _FILES[kind]
    for path in folder.iterdir():
        path.unlink()
    for name in names:
        data = (clean / name).read_bytes()
        if name == changed:
            data = data if base is None else base.read_bytes()
            is_text = kind in ("bim", "fam", "pvar", "psam", "vcf", "text-in-gz", "sample", "dosage-vcf")
            if kind in ("text-in-gz", "payload-in-bcf"):
                data = bgzip(mutate(gzip.decompress(data), rng, is_text=is_text), 512)
            else:
                data = mutate(data, rng, is_text=is_text)
        (folder / name).write_bytes(data)
    first = folder / names[0]
    return kind, first.with_suffix("") if first.suffix in (".bed", ".pgen") else first


def judge(kind: str, path: Path, clean: Path) -> str:
    """How one input ends: `refused`, `read`, or `WRONG` and why."""
    try:
        if kind in ("bed", "bim", "fam", "pgen", "pvar", "psam"):
            files = PlinkFiles(str(path))
            got = np.concatenate([b.copy() for _, b in files.blocks(size=5)])
            dosages = files.dosages(range(len(files.variants))).T
        else:
            source = open_source(path, Reading(keep_filtered=True))
            entries = list(source.entries(source.scan()))
            got = np.array([e.genotypes for e in entries])
            dosages = got
    except SiteError as error:
        return "refused" if error.message and "p1" not in error.message.split() else "WRONG: an id in the message"
    if not np.isin(dosages[dosages != -9], (0, 1, 2)).all() and (dosages[dosages != -9] < 0).any():
        return "WRONG: a genotype below 0"
    if (dosages > 2).any() or np.isnan(dosages).any():
        return "WRONG: a genotype above 2, or none at all"
    expected = _TWINS[kind](path, clean)
    if expected is not None and (expected.shape != got.shape or (np.abs(expected - got) > 1e-5).any()):
        return "WRONG: another matrix"
    return "read"


def _bed_twin(path: Path, _: Path) -> np.ndarray:
    """Genotypes of a .bed file by its bits (PLINK 1.9 file formats)."""
    people = sum(1 for _ in path.with_suffix(".fam").open("rb"))
    variants = sum(1 for _ in path.with_suffix(".bim").open("rb"))
    data = np.frombuffer(path.with_suffix(".bed").read_bytes()[3:], np.uint8).reshape(variants, -1)
    codes = np.stack([(data >> s) & 3 for s in (0, 2, 4, 6)], axis=2).reshape(variants, -1)[:, :people]
    return np.array([2, -9, 1, 0], dtype=np.int8)[codes]


def _vcf_twin(path: Path, _: Path) -> np.ndarray:
    """Genotypes of a VCF by its text; DS where it stands, else copies of each ALT."""
    data = path.read_bytes()
    text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8", "replace")
    rows = []
    head = text.partition("\n#CHROM")[0]
    declared = "##FORMAT=<ID=DS," in head
    for line in text.split("\n"):
        if not line or line.startswith("#"):
            continue
        f = line.removesuffix("\r").split("\t")
        form = [name if declared or name != "DS" else "" for name in f[8].split(":")]
        alternatives = f[4].split(",")
        bare = f[0][3:] if f[0][:3].lower() == "chr" else f[0]
        hemizygous = bare.upper() in ("X", "23", "Y", "24")
        for k in range(1, len(alternatives) + 1):
            cells = [_cell(c.split(":"), form, k, len(alternatives), hemizygous) for c in f[9:]]
            if any(c is None for c in cells):
                cells = [-9.0] * len(cells)
            rows.append(cells)
    return np.array(rows, dtype=np.float64)


def _cell(cell: list[str], form: list[str], k: int, alternatives: int, hemizygous: bool) -> float | None:
    value = None
    if "GT" in form:
        i = form.index("GT")
        call = cell[i] if i < len(cell) else "."
        alleles = call.replace("|", "/").split("/")
        called = [int(a) for a in alleles if a not in (".", "")]
        value = -9.0
        if all(a <= alternatives for a in called):
            if len(alleles) == 2 and len(called) == 2:
                value = float(called.count(k))
            elif hemizygous and len(called) == 1:
                value = 2.0 * called.count(k)
    if "DS" in form:
        i = form.index("DS")
        numbers = cell[i].split(",") if i < len(cell) else ["."]
        if len(numbers) >= k and numbers[k - 1] not in (".", ""):
            return min(2.0, max(0.0, float(np.float32(numbers[k - 1]))))
        return -9.0 if value is None else value  # a row of dosages only, and this person has none
    return value


def _bgen_twin(path: Path, _: Path) -> np.ndarray | None:
    """Dosages of the second allele of a BGEN 1.2 file (its specification), unphased or phased, any bit depth."""
    data = path.read_bytes()
    offset, _, variants, people = struct.unpack("<IIII", data[:16])
    (flags,) = struct.unpack("<I", data[data[4] + 0 : data[4] + 4]) if data[4] == 20 else (0,)
    if flags & 3 != 1:
        return None
    at = offset + 4
    rows = []
    for _v in range(variants):
        for _s in range(3):
            at += 2 + struct.unpack("<H", data[at : at + 2])[0]
        (k,) = struct.unpack("<H", data[at + 4 : at + 6])
        at += 6
        for _a in range(k):
            at += 4 + struct.unpack("<I", data[at : at + 4])[0]
            (length,) = struct.unpack("<I", data[at : at + 4])
        block = zlib.decompress(data[at + 8 : at + 4 + length])
        at += 4 + length
        ploidy = np.frombuffer(block[8 : 8 + people], np.uint8)
        phased, bits = block[8 + people], block[9 + people]
        if k != 2 or phased or bits != 8 or (ploidy & 63 != 2).any():
            return None
        p = np.frombuffer(block[10 + people : 10 + 3 * people], np.uint8).reshape(people, 2) / 255
        rows.append(np.where(ploidy & 128, -9.0, p[:, 1] + 2 * (1 - p.sum(axis=1))))
    return np.array(rows)


def _same(path: Path, clean: Path) -> np.ndarray:
    """A compressed file whose check sums hold is the clean one."""
    return _vcf_twin(clean / "g.vcf", clean)


def _none(path: Path, clean: Path) -> None:
    """Bytes that no check sum guards: shape and range is all that can be said."""


_TWINS: dict[str, Callable[[Path, Path], np.ndarray | None]] = {
    "bed": _bed_twin, "bim": _bed_twin, "fam": _bed_twin, "pgen": _none, "pvar": _none, "psam": _none,
    "vcf": _vcf_twin, "vcf.gz": _vcf_twin, "plain.gz": _vcf_twin, "text-in-gz": _vcf_twin, "bcf": _same,
    "payload-in-bcf": _none, "bgen": _bgen_twin, "sample": _bgen_twin, "dosage-vcf": _vcf_twin,
}  # fmt: skip


def _work(pipe: Connection, clean: Path, folder: Path, start: int, stop: int, pool: Path | None) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    covered: set[tuple[str, int]] = set()
    for number in range(start, stop):
        pipe.send(number)
        kind, path = prepare(number, clean, folder, pool)
        lines: set[tuple[str, int]] = set()
        if pool is not None:
            sys.settrace(_tracer(lines))
        try:
            end = judge(kind, path, clean)
        except Exception as error:  # what no reader may let out
            end = f"WRONG: {type(error).__name__}: {error}"
        finally:
            sys.settrace(None)
        if pool is not None and not lines <= covered:
            covered |= lines
            shutil.copyfile(folder / _FILES[kind][1], pool / f"{kind}@{number}")
        pipe.send((kind, end))
    pipe.close()


def _tracer(lines: set[tuple[str, int]]) -> Callable[..., object]:
    """Notes each line of our readers that runs."""

    def local(frame: FrameType, event: str, _: object) -> object:
        if event == "line":
            lines.add((frame.f_code.co_filename, frame.f_lineno))
        return local

    return lambda frame, event, _: local if _READERS in frame.f_code.co_filename else None


def fuzz(first: int, count: int, workplace: Path, *, guided: bool = False) -> Tally:
    """Inputs first .. first + count; a death or a hang is put to the product, which must answer with a SiteError.

    `guided` keeps each input that reached a line of our readers no other had reached, and mutates it further.
    """
    clean = workplace / "clean"
    clean.mkdir()
    pool = workplace / "pool" if guided else None
    if pool is not None:
        pool.mkdir()
    corpus(clean)
    tally = Tally()
    context = multiprocessing.get_context("fork")
    number, stop = first, first + count
    while number < stop:
        folder = Path(tempfile.mkdtemp(dir=workplace))
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(target=_work, args=(theirs, clean, folder, number, stop, pool), daemon=True)
        child.start()
        theirs.close()
        begun = None
        try:
            while ours.poll(HANG_S):
                said = ours.recv()
                if isinstance(said, int):
                    begun = said
                    continue
                kind, end = said
                tally.ends[f"{kind} {end.split(':')[0]}"] += 1
                if end.startswith("WRONG"):
                    tally.wrong.append(f"input {begun} ({kind}): {end}")
                number, begun = number + 1, None
        except EOFError:
            pass
        child.kill()
        child.join()
        ours.close()
        if begun is not None:
            _ask_the_product(begun, clean, folder, pool, tally)
            number = begun + 1
        shutil.rmtree(folder)
    return tally


def _ask_the_product(number: int, clean: Path, folder: Path, pool: Path | None, tally: Tally) -> None:
    kind, path = prepare(number, clean, folder, pool)
    try:
        if kind in ("bed", "bim", "fam", "pgen", "pvar", "psam"):
            isolated(read_plink, str(path), what=path.name, progress=quiet, quiet_s=HANG_S)
        else:
            isolated(convert, path, folder / "out", Reading(), what=path.name, progress=quiet, quiet_s=HANG_S)
    except SiteError:
        tally.ends[f"{kind} killed its reader, refused"] += 1
    else:
        tally.wrong.append(f"input {number} ({kind}): killed a reader once and not twice")


def read_plink(prefix: str, progress: object) -> int:
    """Every genotype of a PLINK set: how many were read."""
    return sum(block.size for _, block in PlinkFiles(prefix).blocks())
