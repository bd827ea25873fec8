"""TenSEAL's CKKS as NVFLARE sets it: one site encrypts, serialises and decrypts one vector."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from answering import serve


def load() -> Any:
    import tenseal as ts

    kinds = {"scheme": ts.SCHEME_TYPE.CKKS, "encryption_type": ts.ENCRYPTION_TYPE.SYMMETRIC}
    context = ts.context(poly_modulus_degree=8192, coeff_mod_bit_sizes=[60, 40, 40], **kinds)
    context.global_scale = 2**40
    held: dict[str, Any] = {}

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        if request["op"] == "inputs":
            held["values"] = np.load(request["path"]).astype(np.float64)
            return {}
        start = time.perf_counter()
        encrypted = ts.ckks_vector(context, held["values"])
        data = encrypted.serialize()
        values = encrypted.decrypt()
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "bytes": len(data), "error": float(np.abs(np.array(values) - held["values"]).max())}

    return ts.__version__, answer


serve(load)
