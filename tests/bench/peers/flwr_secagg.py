"""Flower's own SecAgg+ functions: one site's masked vector, and the server's sum and opening.

Client stages are `secaggplus_mod`'s functions; the server's part is the two loops of `SecAggPlusWorkflow` over Flower's own
arithmetic, without its messages. Above 3 million masked values in a round one site's vector stands for all of them.
"""

from __future__ import annotations

import importlib
import time
from typing import Any

import numpy as np

from answering import serve

CLIP, TARGET, MODULUS, MAX_WEIGHT, EXAMPLES = 8.0, 1 << 22, 1 << 32, 1000, 100


def load() -> Any:
    import flwr
    from flwr.common import bytes_to_ndarray, ndarrays_to_parameters
    from flwr.common.secure_aggregation.crypto.shamir import combine_shares
    from flwr.common.secure_aggregation.crypto.symmetric_encryption import generate_shared_key
    from flwr.common.secure_aggregation.ndarrays_arithmetic import (
        factor_extract,
        get_parameters_shape,
        parameters_addition,
        parameters_mod,
        parameters_subtraction,
    )
    from flwr.common.secure_aggregation.quantization import dequantize
    from flwr.common.secure_aggregation.secaggplus_constants import Key
    from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen
    from flwr.supercore.primitives.asymmetric import bytes_to_private_key, bytes_to_public_key

    # the package exports a function of the module's name, so the module is asked for by its path
    site = importlib.import_module("flwr.client.mod.secure_aggregation.secaggplus_mod")
    held: dict[str, Any] = {}

    def set_up(n: int, threshold: int) -> dict[str, Any]:
        """Keys and shares of n sites: every round for Flower, not counted against it."""
        states = [site.SecAggPlusState(nid=i + 1) for i in range(n)]
        config = {
            Key.SAMPLE_NUMBER: n, Key.SHARE_NUMBER: n, Key.THRESHOLD: threshold, Key.CLIPPING_RANGE: CLIP,
            Key.TARGET_RANGE: TARGET, Key.MOD_RANGE: MODULUS, Key.MAX_WEIGHT: float(MAX_WEIGHT),
        }  # fmt: skip
        start = time.perf_counter()
        public = {}
        up = [0] * n
        for i, state in enumerate(states):
            said = site._setup(state, dict(config))
            public[str(i + 1)] = (said[Key.PUBLIC_KEY_1], said[Key.PUBLIC_KEY_2])
            up[i] += sum(map(len, said.values()))
        inbox: dict[int, list[tuple[int, bytes]]] = {i + 1: [] for i in range(n)}
        for i, state in enumerate(states):
            said = site._share_keys(state, dict(public))
            for to, text in zip(said[Key.DESTINATION_LIST], said[Key.CIPHERTEXT_LIST], strict=True):
                inbox[to].append((i + 1, text))
                up[i] += len(text)
        held.update(n=n, threshold=threshold, states=states, public=public, inbox=inbox, up=up, masked={})
        return {"seconds": (time.perf_counter() - start) / n}

    def vector(state: Any, values: Any) -> tuple[float, list[bytes]]:
        box = held["inbox"][state.nid]
        config = {Key.SOURCE_LIST: [s for s, _ in box], Key.CIPHERTEXT_LIST: [c for _, c in box]}
        start = time.perf_counter()
        said = site._collect_masked_vectors(state, config, EXAMPLES, values)
        return time.perf_counter() - start, said[Key.MASKED_PARAMETERS]

    def inputs(path: str) -> dict[str, Any]:
        values = ndarrays_to_parameters([np.load(path)])
        held.update(values=values, masked={})
        return {}

    def site_side() -> dict[str, Any]:
        seconds, said = vector(held["states"][0], held["values"])
        held["masked"][0] = said
        return {"seconds": seconds, "bytes": sum(map(len, said)) + held["up"][0]}

    def server_side(absent: int) -> dict[str, Any]:
        n, states, m = held["n"], held["states"], None
        few = ndarrays_to_parameters([np.zeros(8, np.float32)])
        for i in range(n - absent):
            if i in held["masked"]:
                continue
            if m is not None and m * n > 3_000_000:
                vector(states[i], few)  # opens the shares it was sent, as it would
                held["masked"][i] = held["masked"][0]
            else:
                held["masked"][i] = vector(states[i], held["values"])[1]
            m = sum(map(len, held["masked"][i])) // 8
        active, dead = list(range(1, n - absent + 1)), list(range(n - absent + 1, n + 1))
        answers = [
            site._unmask(states[i - 1], {Key.ACTIVE_NODE_ID_LIST: active, Key.DEAD_NODE_ID_LIST: dead}) for i in active
        ]
        start = time.perf_counter()
        total = None
        for i in active:
            arrays = [bytes_to_ndarray(b) for b in held["masked"][i - 1]]
            total = arrays if total is None else parameters_addition(total, arrays)
        total = parameters_mod(total, MODULUS)
        collected: dict[int, list[bytes]] = {i: [] for i in range(1, n + 1)}
        for said in answers:
            for owner, share in zip(said[Key.NODE_ID_LIST], said[Key.SHARE_LIST], strict=True):
                collected[owner].append(share)
        for owner, shares in collected.items():
            secret = combine_shares(shares)
            if owner in active:
                mask = pseudo_rand_gen(secret, MODULUS, get_parameters_shape(total))
                total = parameters_subtraction(total, mask)
                continue
            for other in active:
                key = generate_shared_key(
                    bytes_to_private_key(secret), bytes_to_public_key(held["public"][str(other)][0])
                )
                mask = pseudo_rand_gen(key, MODULUS, get_parameters_shape(total))
                total = parameters_addition(total, mask) if owner > other else parameters_subtraction(total, mask)
        total = parameters_mod(total, MODULUS)
        weight, total = factor_extract(total)
        decoded = dequantize(total, CLIP, TARGET)
        for part in decoded:
            part += -(len(active) - 1) * CLIP
            part *= TARGET / weight if weight else 1.0
        return {"seconds": time.perf_counter() - start, "first": float(decoded[0][0])}

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        operation = request.pop("op")
        return {"set_up": set_up, "inputs": inputs, "site": site_side, "server": server_side}[operation](**request)

    return flwr.__version__, answer


serve(load)
