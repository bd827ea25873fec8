"""Every analysis of a yes-or-no trait in order on 1,033 real people in five hospitals; then of a time, and of a count.

The studies, and what is compared with what, are those of `deploy/examples/hapmap`; through real processes they run in
`tests/system`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import real_studies
from sequester.one_machine.consortium import Site

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(real_studies.missing("hapmap")), reason=real_studies.missing("hapmap")),
]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Site], Mapping[str, Mapping[str, Any]]]:
    folder = tmp_path_factory.mktemp("hapmap")
    return folder, *real_studies.prepared("hapmap", folder)


@pytest.mark.parametrize("name", ["exact", "time", "count"])
def test_every_analysis_in_order_is_what_other_programs_say(prepared: Any, name: str) -> None:
    folder, sites, studies = prepared
    study = real_studies.study_of("hapmap", sites, studies[name])
    of = real_studies.in_a_plain_loop("hapmap", folder, study, sites)
    real_studies.check("hapmap", name, of)
    if name == "exact":
        assert len(of.people("all").y) == 1033 and len(study.variants) == 952
        assert len(of.result("variants")["passing"]) > 0.7 * len(study.variants)
