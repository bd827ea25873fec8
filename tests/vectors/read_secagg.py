"""An independent reader of the secure sum's vectors: the standard library, PyNaCl, pycryptodome, and the specification.

    python tests/vectors/read_secagg.py tests/vectors/secagg/v1

It imports nothing of Sequester. It recomputes every value, refuses every bad one, and exits 1 where anything differs.
"""

import hashlib
import hmac
import json
import math
import struct
import sys
from pathlib import Path

from Crypto.Cipher import AES
from nacl.bindings import crypto_scalarmult, crypto_scalarmult_base
from nacl.exceptions import CryptoError
from nacl.signing import VerifyKey

# fmt: off
L, P = b"sequester-secagg/v1/", 2**255 - 19


def enc(parts):
    kinds = {int: (b"i", lambda x: struct.pack(">Q", x)), str: (b"s", str.encode), bytes: (b"b", bytes), list: (b"t", enc)}
    out = b""
    for part in parts:
        tag, body = kinds[type(part)]
        out += tag + struct.pack(">I", len(body(part))) + body(part)
    return out


def said(label, *parts): return enc([L + label.encode(), *parts])
def H(label, *parts): return hashlib.sha256(said(label, *parts)).digest()
def prf(key, label, *parts): return hmac.new(key, said(label, *parts), hashlib.sha256).digest()
def un(text): return bytes.fromhex(text)
def real(text): return struct.unpack(">d", un(text))[0]
def number(text): return int.from_bytes(un(text), "little")
def tagged(parts): return [un(v) if t == "b" else tagged(v) if t == "t" else v for p in parts for t, v in p.items()]


def words(key, count, bits):
    data = AES.new(key, AES.MODE_CTR, nonce=b"", initial_value=bytes(16)).encrypt(bytes(count * bits // 8))
    return struct.unpack(f"<{count}{'I' if bits == 32 else 'Q'}", data)


def task_hash(t):
    return H("task", un(t["study_digest"]), t["analysis"], t["step"], t["attempt"], un(t["broadcast"]), un(t["layout"]),
             t["codec"], t["clip"], t["noise"], t["event"])  # fmt: skip


def session_id(p):
    return H("session", un(p["study_digest"]), p["epoch"], [un(k) for k in p["roster"]], p["max_corrupt"],
             p["min_active"], p["max_absent"], p["ring_bits"], p["mode"], p["suite"])  # fmt: skip


def pair(private, i, j, public, roster_hash):
    if i == j:
        return prf(private, "own", roster_hash)
    inner = hmac.new(roster_hash, crypto_scalarmult(private, public), hashlib.sha256).digest()
    return hmac.new(inner, enc([L + b"pair", min(i, j), max(i, j)]) + b"\1", hashlib.sha256).digest()


def verifies(key, message, signature): return not refuses(VerifyKey(key).verify, message, signature)


def lagrange(xs):
    if len(set(xs)) != len(xs) or 0 in xs:
        raise ValueError("indices")
    return [math.prod(j * pow(j - i, -1, P) for j in xs if j != i) % P for i in xs]


def unseal(key, i, j, ctx, salt, box, label="seal"):
    cipher = AES.new(prf(key, label, i, j, ctx, salt), AES.MODE_GCM, nonce=bytes(12))
    return cipher.decrypt_and_verify(box[:32], box[32:])


def refuses(act, *arguments):
    try:
        act(*arguments)
    except (ValueError, KeyError, struct.error, CryptoError):
        return True
    return False


def check(folder):
    v = {path.stem: json.loads(path.read_text("utf-8")) for path in folder.glob("*.json")}
    e, k, s, m, c, t, bad = (v[n] for n in ("encoding", "keys", "shamir", "masks", "codec", "transcript", "bad"))
    yield from (enc(tagged(row["parts"])) == un(row["enc"]) for row in e["good"])
    yield from (refuses(enc, list(part.values())) for part in e["bad"])
    # keys
    sid, publics, ctx, signer = session_id(k["params"]), [un(x) for x in k["kx_public"]], un(k["ctx"]), un(k["signer"])
    rh = H("roster", sid, publics)
    yield sid == un(k["session_id"]) and rh == un(k["roster_hash"]) and task_hash(k["task"]) == un(k["task_hash"])
    yield H("round", rh, k["round"], k["active"], k["length"], task_hash(k["task"])) == ctx
    K = [[pair(un(a), i, j, publics[j], rh) for j in range(len(publics))] for i, a in enumerate(k["kx"])]
    yield [crypto_scalarmult_base(un(a)) for a in k["kx"]] == publics
    yield from (K[i][int(j)] == un(x) for i, row in enumerate(k["pairs"]) for j, x in row.items())
    yield from (prf(K[int(ij[0])][int(ij[2])], "mask", ctx) == un(x) for ij, x in k["mask_keys"].items())
    yield prf(un(k["seed"]), "self", ctx) == un(k["self_key"])
    yield H("commit", ctx, k["commit"]["index"], un(k["seed"])) == un(k["commit"]["value"])
    yield un(k["commit"]["value"]) != un(bad["lane_of_the_seed"]["not_the_commit"])
    b, u = k["seal"], k["survivors"]
    yield unseal(K[b["from"]][b["to"]], b["from"], b["to"], ctx, un(b["salt"]), un(b["box"])) == un(b["share"])
    yield H("survivors", ctx, u["version"], u["set"], [un(x) for x in u["salts"]]) == un(u["digest"])
    yield H("seen", *tagged(k["seen"]["of"]), un(k["seen"]["signature"])) == un(k["seen"]["hash"])
    for name, row in k["signed"].items():
        yield verifies(signer, said(row.get("label", name), *tagged(row["parts"])), un(row["signature"]))
    for row in ({**k["signed"][x["signed"]], "label": x["signed"].split(",")[0], **x} for x in bad["signatures"]):
        yield not verifies(signer, said(row["label"], *tagged(row["parts"])), un(row["signature"]))
    for x in bad["boxes"]:
        where = un(x.get("ctx", k["ctx"]))
        yield refuses(unseal, K[1][3], x["from"], x["to"], where, un(x["salt"]), un(x["box"]), x.get("label", "seal"))
    yield from (refuses(crypto_scalarmult, un(k["kx"][0]), un(x)) for x in bad["small_order_kx"])
    # shares
    for row in s["good"]:
        f = [number(x) for x in row["coefficients"]]
        yield [sum(a * i**d for d, a in enumerate(f)) % P for i in row["indices"]] == [number(x) for x in row["shares"]]
        yield lagrange(row["quorum"]) == [number(x) for x in row["lagrange"]]
        at = dict(zip(row["indices"], map(number, row["shares"]), strict=True))
        yield sum(w * at[i] for w, i in zip(lagrange(row["quorum"]), row["quorum"], strict=True)) % P == f[0]
    yield all(len(un(x)) != 32 or number(x) >= P for x in s["bad_elements"])
    yield from (refuses(lagrange, xs) for xs in s["bad_quorums"])
    # masks and codec
    for row in m["sums"]:
        bits, n = row["ring_bits"], row["words"]
        plus, minus = words(un(m["plus"]), n, bits), words(un(m["minus"]), n, bits)
        out = b"".join(
            ((i + a - b) % 2**bits).to_bytes(bits // 8, "little") for i, a, b in zip(range(n), plus, minus, strict=True))
        yield [out[: bits // 8], out[-bits // 8 :]] == [un(row["first"]), un(row["last"])]
        yield hashlib.sha256(out).digest() == un(row["sha256"])
    for row in c["good"]:
        n, lanes, bits = len(row["sum"]), row["lanes"], row["ring_bits"]
        width, size = bits // lanes, -(-n // lanes)
        ints = [[round(real(x) * 2 ** row["fraction_bits"]) for x in r] for r in row["values"]]  # ties to even
        rings = [[sum(q << width * (i // size) for i, q in enumerate(r) if i % size == w) % 2**bits for w in range(size)]
                 for r in ints]
        yield ints == row["integers"] and rings == row["words"]
        yield [sum(col) % 2**bits for col in zip(*rings, strict=True)] == row["sum_words"]
        yield [sum(col) for col in zip(*ints, strict=True)] == row["sum"]
    yield from (not abs(real(x)) * 16 < 2**53 for x in c["refused_with_4_fraction_bits"])
    yield from play(t)


def play(t):
    ids, publics = [un(x) for x in t["params"]["roster"]], [un(a["kx"]) for a in t["advertisements"]]
    sid, n, N, U, A = session_id(t["params"]), t["length"], len(ids), t["survivors"], t["active"]
    rh, need = H("roster", sid, publics), (N + t["params"]["max_corrupt"]) // 2 + 1
    yield hashlib.sha256(un(t["broadcast"])).digest() == un(t["task"]["broadcast"])
    for i, (a, r) in enumerate(zip(t["advertisements"], t["ratifications"], strict=True)):
        advert = said("adv", sid, i, un(a["kx"]), a["data_set"], a["counter"], un(a["head"]))
        yield verifies(ids[i], advert, un(a["signature"])) and crypto_scalarmult_base(un(t["kx"][i])) == publics[i]
        yield verifies(ids[i], said("ratify", sid, rh, [un(x) for x in r["seen"]]), un(r["signature"]))
    ctx = H("round", rh, t["round"], A, n, task_hash(t["task"]))
    yield ctx == un(t["ctx"])
    K = [[pair(un(x), i, j, publics[j], rh) for j in range(N)] for i, x in enumerate(t["kx"])]
    d = H("survivors", ctx, t["version"], U, [un(x["salt"]) for x in t["inputs"]])
    yield need <= sum(verifies(ids[a["index"]], said("ack", d), un(a["signature"])) for a in t["acks"])
    total = [0] * n
    for sent in t["inputs"]:
        i, salt, commit, x = sent["index"], un(sent["salt"]), un(sent["commit"]), t["x"][str(sent["index"])]
        yield verifies(ids[i], said("input", ctx, t["round"], i, salt, commit), un(sent["signature"]))
        share = {j: unseal(K[j][i], i, j, ctx, salt, un(sent["seals"][str(j)])) for j in A}
        yield all(share[j] == un(t["answers"][str(j)]["shares"][str(i)]) for j in U)
        weights = zip(lagrange([j + 1 for j in U[:need]]), U[:need], strict=True)
        b = (sum(w * int.from_bytes(share[j], "little") for w, j in weights) % P).to_bytes(32, "little")
        yield H("commit", ctx, i, b) == commit
        y = [v + w for v, w in zip(x, words(prf(b, "self", ctx), n, 32), strict=True)]
        for j in (j for j in A if j != i):
            y = [v + (w if j > i else -w) for v, w in zip(y, words(prf(K[i][j], "mask", ctx), n, 32), strict=True)]
            yield j in U or prf(K[i][j], "mask", ctx) == un(t["answers"][str(i)]["pair_seeds"][str(j)])
        yield [v % 2**32 for v in y] == sent["y"]
        total = [(v + w) % 2**32 for v, w in zip(total, x, strict=True)]
    yield total == t["sum"]


if __name__ == "__main__":
    results = list(check(Path(sys.argv[1])))
    print(f"{sum(results)} of {len(results)} checks hold")
    sys.exit(not results or not all(results))
