"""The table of damaged files (spec/genomics.md, section 2): each gets one error that names file, place and what to do."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from genome.files import HEADER, bgzip, matrix_bgen, matrix_vcf, quiet, read, to_bcf, vcf_text
from sequester.client.compute.genome.plink import PlinkFiles
from sequester.client.compute.genome.source import EOF_BLOCK, Reading
from sequester.client.ingest.convert import GenotypeWriter, convert, write_psam
from sequester.client.ingest.isolated import isolated
from sequester.protocols.errors import SiteError
from sequester.simulate.plink import Line

PEOPLE = [f"patient{i}" for i in range(6)]
LINES = [Line("1", f"v{j}", 100 + j, "G", "A") for j in range(40)]
COUNTS = np.random.default_rng(2).integers(0, 3, (6, 40)).astype(np.int8)
ROW = ["1", "5", "x", "A", "G", ".", ".", "GT", "0/0", "0/1", "1/1", "0/0", "0/1", "1/1"]


def refused(path: Path, said: str) -> SiteError:
    with pytest.raises(SiteError) as caught:
        read(path)
    text = caught.value.message + " " + caught.value.hint
    assert said in caught.value.message, caught.value.message
    assert caught.value.hint and not any(person in text for person in PEOPLE)
    return caught.value


def changed(**fields: str) -> list[str]:
    row = list(ROW)
    for name, value in fields.items():
        row[("chrom", "pos", "id", "ref", "alt", "filter", "info", "format", "first").index(name)] = value
    return row


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([ROW, ROW[:-1]], "line 10: 14 columns, 15 were expected"),
        ([ROW, [*ROW, "0/0"]], "line 10: 16 columns, 15 were expected"),
        ([ROW, changed(first="x/y")], "row 2"),
        ([ROW, changed(pos="-5")], "line 10: a negative position"),
        ([ROW, changed(pos="99999999999")], "line 10: the position is beyond any chromosome"),
        ([ROW, changed(pos="5e3")], "line 10: the position is not a whole number"),
        ([changed(first="0/0\0")], "line 9 holds a NUL byte"),
        ([ROW, changed(first="0/0\r")], None),
        ([changed(format="GT:DS", first="0/0:2.7")], "a dosage outside 0..2"),
        ([changed(format="GT:DS", first="0/0:")], "line 9: an empty field of a sample"),
        ([changed(format="GT:DS", first="0/0:0X.25")], "line 9: a sample's number begins with 0x"),
        ([ROW, changed(chrom="##1")], "line 10: a header line among the rows"),
        ([], "no variants"),
        ([changed(alt="G", first="0/3")], "name an allele their row does not list"),
    ],
)
def test_a_damaged_row_is_refused_with_its_line(tmp_path: Path, rows: list[list[str]], said: str | None) -> None:
    path = tmp_path / "v.vcf"
    path.write_bytes(vcf_text(PEOPLE, rows).encode())
    refused(path, said or "a carriage return inside the line")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "does not begin with ##fileformat=VCF"),
        (vcf_text(PEOPLE, [ROW], header=""), "does not begin with ##fileformat=VCF"),
        (HEADER, "ends inside its header"),
        (vcf_text([*PEOPLE[:5], PEOPLE[0]], [ROW]), "people 1 and 6 are the same"),
        (vcf_text([], [ROW[:8]]).replace("\tFORMAT\t", "\tFORMAT"), "has no samples"),
        (vcf_text(PEOPLE, [ROW])[:-1], "ends inside line"),
        (vcf_text(PEOPLE, [ROW]) + "\n", "1 columns"),
        (vcf_text(PEOPLE, [ROW]) + "#CHROM\n", "a header line among the rows"),
    ],
)
def test_a_damaged_text_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "v.vcf"
    path.write_text(text)
    refused(path, said)


def test_bytes_that_are_no_text_are_refused_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "v.vcf"
    path.write_bytes(vcf_text(PEOPLE, [ROW, changed(id="caf\xe9")]).encode("latin-1"))
    refused(path, "line 10: not UTF-8")


def test_windows_line_ends_lower_case_and_unknown_contigs_are_read(tmp_path: Path) -> None:
    rows = [ROW, changed(chrom="chr7", ref="a", alt="g")]
    (tmp_path / "v.vcf").write_bytes(vcf_text(PEOPLE, rows).replace("\n", "\r\n").encode())
    keys, genotypes, _ = read(tmp_path / "v.vcf")
    assert keys[1][:2] == ("chr7", 5)
    np.testing.assert_array_equal(genotypes[0], [0, 1, 2, 0, 1, 2])


def _vcf_gz(folder: Path) -> tuple[Path, bytes]:
    path = folder / "v.vcf.gz"
    matrix_vcf(path, PEOPLE, LINES, COUNTS)
    return path, path.read_bytes()


def _block_starts(data: bytes) -> list[int]:
    starts, at = [], 0
    while at < len(data):
        starts.append(at)
        at += int.from_bytes(data[at + 16 : at + 18], "little") + 1
    return starts


def test_a_bgzip_file_cut_between_blocks_is_refused_though_every_reader_would_go_on(tmp_path: Path) -> None:
    path = tmp_path / "v.vcf.gz"
    path.write_bytes(bgzip(vcf_text(PEOPLE, [changed(pos=str(100 + j)) for j in range(60)]).encode(), 512))
    data = path.read_bytes()
    starts = _block_starts(data)
    assert len(starts) > 4 and data.endswith(EOF_BLOCK)
    path.write_bytes(data[: starts[-3]])
    refused(path, "does not end with the empty block of bgzip")


@pytest.mark.parametrize("where", ["inside", "crc", "trailing", "text after"])
def test_a_damaged_bgzip_file_is_refused_and_its_good_rows_discarded(tmp_path: Path, where: str) -> None:
    path, data = _vcf_gz(tmp_path)
    if where == "inside":
        path.write_bytes(data[:300] + EOF_BLOCK)  # what is unpacked there is no row, or cannot be unpacked
        refused(path, "v.vcf.gz")
    elif where == "crc":
        at = _block_starts(data)[1] - 6
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        refused(path, "its check sum is wrong")
    elif where == "trailing":
        path.write_bytes(data + b"\0")
        refused(path, "does not end with the empty block")
    else:
        path.write_bytes(data + bgzip(vcf_text(PEOPLE, [ROW]).encode()))
        refused(path, "a header line among the rows")
    with pytest.raises(SiteError):
        convert(path, tmp_path / "part", Reading(), quiet)
    assert not (tmp_path / "part").exists() and not (tmp_path / "part.new").exists()


def test_a_bcf_file_cut_or_without_bgzip_is_refused(tmp_path: Path) -> None:
    matrix_vcf(tmp_path / "v.vcf", PEOPLE, LINES, COUNTS)
    path = tmp_path / "v.bcf"
    to_bcf(tmp_path / "v.vcf", path)
    data = path.read_bytes()
    path.write_bytes(data[: -len(EOF_BLOCK)])
    refused(path, "does not end with the empty block")
    import gzip

    path.write_bytes(gzip.decompress(data))
    refused(path, "without bgzip")


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (lambda d: d[:-5], "block is cut or damaged"),
        (lambda d: d + b"\0", "1 bytes after its last variant"),
        (lambda d: b"", "ends inside a variant or its header"),
        (lambda d: d[:16] + b"bgem" + d[20:], "does not begin as a .bgen file"),
        (lambda d: d[:12] + b"\xff\xff\xff\x7f" + d[16:], "claims 2147483647 people"),
        (lambda d: d[:8] + b"\xff\0\0\0" + d[12:], "ends inside"),
    ],
)
def test_a_damaged_bgen_file_is_refused(tmp_path: Path, how: Callable[[bytes], bytes], said: str) -> None:
    path = tmp_path / "v.bgen"
    matrix_bgen(path, PEOPLE, LINES, COUNTS)
    path.write_bytes(how(path.read_bytes()))
    refused(path, said)


def test_a_sample_file_of_other_people_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "v.bgen"
    matrix_bgen(path, PEOPLE, LINES, COUNTS)
    sample = path.with_suffix(".sample")
    rows = [f"0 {p} 0" for p in PEOPLE]
    sample.write_text("ID_1 ID_2 missing\n0 0 0\n" + "\n".join(rows[:-1]) + "\n")
    refused(path, "lists 5")
    sample.write_text("ID_1 ID_2 missing\n0 0 0\n" + "\n".join(reversed(rows)) + "\n")
    refused(path, "names other people")


@pytest.fixture
def pgen(tmp_path: Path) -> Path:
    prefix = tmp_path / "h"
    with GenotypeWriter(tmp_path / "h.pgen", 6, 40, dosages=True) as writer:
        for j in range(40):
            writer.add(COUNTS[:, j] if j % 2 else (COUNTS[:, j] * 0.9).astype(np.float32))
    write_psam(tmp_path / "h.psam", PEOPLE, [0] * 6)
    rows = "".join(f"1\t{v.position}\t{v.id}\tA\tG\n" for v in LINES)
    (tmp_path / "h.pvar").write_text("#CHROM\tPOS\tID\tREF\tALT\n" + rows)
    PlinkFiles(str(prefix)).dosages(range(40))
    return prefix


@pytest.mark.parametrize(
    ("suffix", "how", "said"),
    [
        (".pgen", lambda d: d[:-1], "its header promises"),
        (".pgen", lambda d: d + b"\0", "its header promises"),
        (".pgen", lambda d: b"", "does not begin as a .pgen file"),
        (".pgen", lambda d: d[:20], "the table of its 40 variants alone has more"),
        (".pgen", lambda d: b"\0" + d[1:], "does not begin as a .pgen file"),
        (".pgen", lambda d: d[:2] + b"\x77" + d[3:], "storage mode 0x77"),
        (".psam", lambda d: d[: d.rfind(b"patient5")], "h.pgen holds 6 people, h.psam lists 5"),
        (".pvar", lambda d: d + b"1\t999\tx\tA\tG\n", "h.pgen holds 40 variants, h.pvar lists 41"),
        (".pvar", lambda d: d.replace(b"\tG\n", b"\n", 1), "h.pvar line 2: 4 columns, 5 were expected"),
        (".pvar", lambda d: d.replace(b"#CHROM", b"CHROM"), "has no header with #CHROM"),
        (".psam", lambda d: d.replace(b"#IID", b"#FID"), "has no IID column"),
    ],
)
def test_damaged_plink_2_files_are_refused(pgen: Path, suffix: str, how: Callable[[bytes], bytes], said: str) -> None:
    path = pgen.with_suffix(suffix)
    path.write_bytes(how(path.read_bytes()))
    with pytest.raises(SiteError) as caught:
        PlinkFiles(str(pgen)).dosages(range(40))
    assert said in caught.value.message


def test_a_header_or_a_line_without_end_is_refused_before_memory_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gzip

    from sequester.client.compute.genome import plink_text, vcf

    path = tmp_path / "v.vcf.gz"
    path.write_bytes(gzip.compress(b"##fileformat=VCFv4.2\n" + (b"##x=" + b"y" * 996 + b"\n") * 68_000, 1))
    refused(path, "its header is longer than 67108864 bytes")
    monkeypatch.setattr(vcf, "_LONGEST_LINE", 1 << 16)
    path.write_bytes(gzip.compress(HEADER.encode() + b"#CHROM" + b"\t" * (1 << 22), 1))
    refused(path, "longer than 65536 bytes")
    monkeypatch.setattr(plink_text, "LONGEST_LINE", 1 << 10)
    for suffix in ("bed", "bim", "fam"):
        (tmp_path / f"g.{suffix}").write_bytes(b"x" * 5000)
    with pytest.raises(SiteError, match=r"g\.fam line 1: longer than 1024 bytes"):
        PlinkFiles(str(tmp_path / "g"))


def test_control_characters_in_names_are_refused(tmp_path: Path) -> None:
    matrix_bgen(tmp_path / "a.bgen", PEOPLE, [*LINES[:-1], Line("1", "a\tb", 139, "G", "A")], COUNTS)
    with pytest.raises(SiteError, match="variant 40: a control character"):
        convert(tmp_path / "a.bgen", tmp_path / "part", Reading(), quiet)
    matrix_bgen(tmp_path / "b.bgen", [*PEOPLE[:-1], "x\ny"], LINES, COUNTS)
    refused(tmp_path / "b.bgen", "the sample id of person 6 is empty or holds a control character")


def test_a_pipe_is_not_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "p.vcf")
    refused(tmp_path / "p.vcf", "is not a file")
    for suffix in ("bed", "bim", "fam"):
        os.mkfifo(tmp_path / f"g.{suffix}")
    with pytest.raises(SiteError, match="is not a file"):
        PlinkFiles(str(tmp_path / "g"))


def _crash(progress: object) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def _hang(progress: object) -> None:
    time.sleep(60)


def test_a_reader_that_crashes_or_hangs_is_a_named_error() -> None:
    with pytest.raises(SiteError, match=r"the reader of x.vcf ended with SIGSEGV"):
        isolated(_crash, what="x.vcf", progress=quiet)
    with pytest.raises(SiteError, match="made no progress for 1 seconds"):
        isolated(_hang, what="x.vcf", progress=quiet, quiet_s=1.0)


def test_what_a_library_prints_about_people_reaches_no_terminal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "v.vcf"
    path.write_text(vcf_text(PEOPLE, [changed(first="patient3/0")]))
    with pytest.raises(SiteError, match="row 1"):
        isolated(convert, path, tmp_path / "part", Reading(), what=path.name, progress=quiet)
    assert "patient" not in "".join(capfd.readouterr())
