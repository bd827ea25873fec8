"""OpenDP's discrete Gaussian: one vector of draws around zero."""

from __future__ import annotations

import time
from typing import Any

from answering import serve


def load() -> Any:
    from importlib.metadata import version

    import opendp.prelude as dp

    dp.enable_features("contrib")

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        space = dp.vector_domain(dp.atom_domain(T=int)), dp.l2_distance(T=float)
        draw = dp.m.make_gaussian(*space, scale=float(request["sigma"]))
        zeros = [0] * int(request["size"])
        start = time.perf_counter()
        draws = draw(zeros)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "square": sum(d * d for d in draws) / len(draws)}

    return version("opendp"), answer


serve(load)
