"""The model as a PGS Catalog scoring file, format 2.0, gzip; validates with pgscatalog-core.

Weights are the released ones, per copy of the effect allele on the log-odds (or outcome) scale, four significant digits.
Source: https://www.pgscatalog.org/downloads/#dl_ftp_scoring (format 2.0); spec/genomics.md, section 8.
"""

from __future__ import annotations

import gzip
import io
from collections.abc import Mapping, Sequence

from sequester.protocols.study import Study

_COLUMNS = "rsID\tchr_name\tchr_position\teffect_allele\tother_allele\teffect_weight\tallelefrequency_effect"


def licence(study: Study) -> str:
    """Under which the model may be used: what the study says, else whose agreement decides."""
    if study.licence is not None:
        return " ".join(study.licence.split())
    return f"none stated; the agreement decides ({'; '.join(' '.join(r.reference.split()) for r in study.agreement)})"


def scoring_file(
    study: Study, digest: str, weights: Mapping[str, float], epsilon: str, more: Sequence[str] = ()
) -> bytes | None:
    """The gzipped file of the study's variants, None where the model uses none.

    `weights` maps variant id to weight per copy of the effect allele; every variant of the study must be in it. `more` are
    further header lines.
    """
    if not study.variants:
        return None
    scale = {"binary": "log(OR)", "time": "log(HR)"}.get(study.phenotype.kind, "beta")
    title = study.title.get("en") or next(iter(study.title.values()))
    head = [
        "###PGS CATALOG SCORING FILE - see https://www.pgscatalog.org/downloads/#dl_ftp_scoring for additional information",
        "#format_version=2.0",
        "##POLYGENIC SCORE (PGS) INFORMATION",
        f"#pgs_id=SQ{digest[:12]}",
        f"#pgs_name={study.lineage}",
        f"#trait_reported={title}",
        f"#trait_mapped={study.phenotype.name}",
        "#trait_efo=NR",
        f"#genome_build={study.genome_build}",
        f"#variants_number={len(study.variants)}",
        f"#weight_type={scale}",
        "##SOURCE INFORMATION",
        "#pgp_id=NR",
        f"#citation=Sequester study {digest}",
        f"#license={licence(study)}",
        "##PRIVACY",
        f"#study_digest={digest}",
        f"#epsilon={epsilon}",
        f"#delta={study.privacy.delta}",
        f"#adjacency={study.privacy.adjacency}",
        "#match_rule=chromosome, position and allele pair; palindromic variants are not used",
        *more,
    ]
    rows = [_COLUMNS]
    for v in study.variants:
        weight = f"{weights[v.id]:.4g}"
        rows.append(f"{v.id}\t{v.chromosome}\t{v.position}\t{v.effect}\t{v.other}\t{weight}\t{v.frequency}")
    raw = io.BytesIO()
    # a fixed time in the gzip header: the same model gives the same bytes
    with gzip.GzipFile(fileobj=raw, mode="wb", mtime=0, filename="") as file:
        file.write("\n".join([*head, *rows, ""]).encode())
    return raw.getvalue()
