"""The files beside report.html, each with a sentence; those that `study weights` made later among them."""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterable
from pathlib import Path

MOST_HEAD = 65_536  # bytes of a scoring file's header that are looked at
_WORDS = (
    (r"results\.json", "every figure of this page, and those that are too many for it"),
    (r"certificate\.json", "the privacy certificate, for programs"),
    (r"prs_rs\.json", "the reporting items of a risk score"),
    (r"study\.json", "the signed study"),
    (r"release\.json", "the verdicts of the hospitals' release gates"),
    (r"audit\.json", "the coordinator's own trial"),
    (r"receipts/.*", "what the hospital signed of what left it"),
    (r"model_card.*\.md", "a model card: what the model is for, and how it does in each group"),
    (r".*_scoring_file\.txt\.gz", "the model's weights, in the format of the PGS Catalog"),
    (r".*\.glm\.[a-z.]+", "the scan of variants, with PLINK 2's columns"),
    (r".*\.genes\.tsv", "the tests of genes, one row a gene"),
)


def rows(names: Iterable[str], folder: Path, digest: str) -> list[tuple[str, str]]:
    """(file, sentence) of what is written with the page, and of joint weights that lie in the folder already."""
    told = [(name, next(words for pattern, words in _WORDS if re.fullmatch(pattern, name))) for name in names]
    return told + joint_weights(folder, digest)


def joint_weights(folder: Path, digest: str) -> list[tuple[str, str]]:
    """(file, what it was made from) of each scoring file of joint weights of this study; others are passed over."""
    found = []
    for path in sorted(folder.glob("*.txt.gz")):
        head = dict(line[1:].split("=", 1) for line in _head(path) if re.match(r"#\w+=", line))
        if head.get("study_digest") == digest and "method" in head:
            reference = f"; linkage of {head['linkage_reference']}" if "linkage_reference" in head else ""
            said = f"joint weights by {head['method']}{reference}; how well they predict is not known here"
            found.append((path.name, said))
    return found


def _head(path: Path) -> list[str]:
    """The lines of a scoring file before its columns; none of a file that is no gzip."""
    try:
        with gzip.open(path, "rb") as file:
            text = file.read(MOST_HEAD).decode("utf-8", "replace")
    except (OSError, EOFError):
        return []
    return [line for line in text.splitlines() if line.startswith("#")]
