"""Deletes each check of the secure sum in turn, in a copy of the tree: a test named after that check has to fail.

A check is a line whose comment begins with its number (`# C12`, spec/secure-aggregation.md, section 9). Where it is an
`if`, each side of its `or` is deleted by itself: the condition becomes False. What is no `if` (a fresh seed, a tag, a
salt, a lock) is in NAMED with the text that takes its place; checks that carry no number in the code stand there too.

    python tests/mutate.py             all of them; exit 1 where one survives
    python tests/mutate.py C12 C18     these two
    python tests/mutate.py --json      for machines

The real tree is never written. Product modules are imported from the copy only, in a process of their own for each mutant.
"""

from __future__ import annotations

import argparse
import ast
import compileall
import importlib
import io
import json
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
import tokenize
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SIDES = ("protocols", "client", "server")
MARKER = re.compile(r"#\s*(C\d+)\b")
TEST = re.compile(r"def test_(C\d+)_")
# what product and tests import and nobody mutates: loaded once here, so that a mutant starts in a fraction of a second
PRELOADED = (
    "numpy", "pytest", "hypothesis", "pydantic", "scipy.special", "rfc8785", "google.protobuf.message", "sqlite3",
    "cryptography.hazmat.primitives.asymmetric.ed25519", "cryptography.hazmat.primitives.asymmetric.x25519",
    "cryptography.hazmat.primitives.ciphers.aead", "dp_accounting", "typer.testing", "ruamel.yaml",
)  # fmt: skip

SECAGG = "protocols/sequester/protocols/secagg"
MEMBER, ROUNDS, OPENING = (f"{SECAGG}/{name}.py" for name in ("member", "member_rounds", "member_opening"))
KEYS, INPUTS, UNMASKING = (f"{SECAGG}/{name}.py" for name in ("keys", "aggregator_inputs", "aggregator_opening"))
WIRE, SESSION = "protocols/sequester/protocols/wire.py", "protocols/sequester/protocols/session.py"
PRIVACY, LAYOUT = "protocols/sequester/protocols/privacy.py", "protocols/sequester/protocols/analyses/analysis.py"
GATE = "client/sequester/client/gate"


@dataclass(frozen=True, slots=True)
class Mutant:
    """Texts of one file and what takes their place; `line` is where the first one stands."""

    check: str
    file: str
    words: str
    swaps: tuple[tuple[str, str], ...] = ()
    line: int = 0
    source: str = ""  # the whole mutated file
    covered_by: str = ""  # no test can fail: why, and the joint mutant that must


def named(check: str, file: str, words: str, *swaps: tuple[str, str]) -> Mutant:
    return Mutant(check, file, words, swaps)


NAMED = [
    named("C2", KEYS, "pair keys without the roster as salt", ("32, salt=roster, info", "32, salt=None, info")),
    named(
        "C5",
        KEYS,
        "an all-zero shared secret is used",
        (
            "shared = kx.exchange(X25519PublicKey.from_public_bytes(public))",
            "shared = bytes(32) if public == bytes(32) else kx.exchange(X25519PublicKey.from_public_bytes(public))",
        ),
    ),
    *(
        named("C6", KEYS, f"ctx without {what}", ('H("round", roster, round_number, list(active), length, task_hash(task))', new))
        for what, new in (
            ("the round", 'H("round", roster, list(active), length, task_hash(task))'),
            ("the active set", 'H("round", roster, round_number, length, task_hash(task))'),
            ("the length", 'H("round", roster, round_number, list(active), task_hash(task))'),
            ("the task", 'H("round", roster, round_number, list(active), length)'),
        )
    ),
    named("C6", KEYS, "mask keys without ctx", ('prf(pair, "mask", ctx)', 'prf(pair, "mask")')),
    named("C6", KEYS, "boxes without ctx", ('"seal", sender, to, ctx, salt', '"seal", sender, to, salt')),
    named(
        "C7",
        ROUNDS,
        "u from the active set's size",
        (
            "floor = session.floor(self._params, len(start.active))  # C7",
            "floor = max(session.threshold(len(start.active), self._params.max_corrupt), "
            "len(start.active) - self._params.max_absent)  # C7",
        ),
    ),
    named(
        "C7",
        ROUNDS,
        "u of 1",
        ("floor = session.floor(self._params, len(start.active))  # C7", "floor = 1  # C7"),
    ),
    named(
        "C7",
        OPENING,
        "t from the active set's size",
        (
            "t = session.threshold(len(self._params.roster), self._params.max_corrupt)  # C7",
            "t = session.threshold(len(self._current.active), self._params.max_corrupt)  # C7",
        ),
    ),
    named(
        "C7",
        OPENING,
        "t of 1",
        ("t = session.threshold(len(self._params.roster), self._params.max_corrupt)  # C7", "t = 1  # C7"),
    ),
    named(
        "C7",
        f"{GATE}/contribution.py",
        "noise for fewer honest shares than the study's",
        ("if adders < privacy.noise_adders(study):", "if False:"),
    ),
    named("C9", OPENING, "a seed request leaves last_round", ("self.last_round = target.number  # C9", "pass  # C9")),
    named("C9", ROUNDS, "a round leaves last_round", ("self.last_round = start.round\n", "pass\n")),
    named("C10", ROUNDS, "the self-mask is the same every time", ("b = shamir.random_element(self._entropy)", "b = 1")),
    named("C10", ROUNDS, "no self-mask", ("plus.append(keys.self_key(seed, r.ctx))", "pass")),
    *(
        named(check, file, words, (text, "if True"))
        for check, file, words, text in (
            (
                "C11",
                OPENING,
                "acks without signature and set",
                "if ack.index in survivors and keys.is_signed(self._params.roster[ack.index], ack.signature, statement)",
            ),
            (
                "C20",
                ROUNDS,
                "cancels without signature and set",
                "if ack.index in active and keys.is_signed(self._params.roster[ack.index], ack.signature, statement)",
            ),
        )
    ),
    named("C11", OPENING, "acks of sites outside the set", ("if ack.index in survivors and keys", "if keys")),
    named(
        "C11",
        OPENING,
        "an ack counted twice",
        ("if len(valid) < t:  # C11", "if len([a for a in acks if a.index in valid]) < t:  # C11"),
    ),
    named("C20", ROUNDS, "cancels of sites outside the context", ("if ack.index in active and keys", "if keys")),
    named(
        "C16",
        KEYS,
        "boxes without the salt",
        ('AESGCM(prf(pair, "seal", sender, to, ctx, salt))', 'AESGCM(prf(pair, "seal", sender, to, ctx))'),
    ),
    named(
        "C16",
        KEYS,
        "boxes without sender and receiver",
        ('AESGCM(prf(pair, "seal", sender, to, ctx, salt))', 'AESGCM(prf(pair, "seal", ctx, salt))'),
    ),
    named(
        "C16",
        KEYS,
        "d without the salts",
        ('H("survivors", ctx, version, list(survivors), list(salts))', 'H("survivors", ctx, version, list(survivors))'),
    ),
    named(
        "C16",
        OPENING,
        "jointly: any set, and without me in it",
        ("if digest != r.digest:  # C11", "if False:  # C11"),
        (
            "if self._index not in survivors or message.salts[survivors.index(self._index)] != r.salt:",
            "if self._index in survivors and message.salts[survivors.index(self._index)] != r.salt:",
        ),
    ),
    named(
        "C18",
        OPENING,
        "boxes opened without their tag",
        (
            "share = keys.unseal(self._pairs[sender], sender, self._index, self._current.ctx, salt, box)",
            "share = bytes(x ^ y for x, y in zip(keys.seal(self._pairs[sender], sender, self._index, "
            "self._current.ctx, salt, bytes(32)), box))[:32]",
        ),
    ),
    named("C18", OPENING, "shares of P and more", ("shamir.element(share)  # C18", "pass  # C18")),
    named(
        "C19",
        UNMASKING,
        "opened seeds are not compared with their commitments",
        ("hmac.compare_digest(keys.commitment(r.ctx, j, seeds[j]), r.inputs[j].commit)", "True"),
    ),
    named("C21", PRIVACY, "no head-room", ("if reach >= 2.0 ** (codec(study).lane_bits - 1):", "if False:")),
    named(
        "C22",
        OPENING,
        "seeds without a quorum",
        ("self._check_quorum(digest, message.survivors, message.acks)  # C22", "pass  # C22"),
    ),
    named(
        "C23",
        INPUTS,
        "jointly: an input of another site, whoever signed it",
        ("if message.index != sender:  # C23", "if False:  # C23"),
        (
            "statement = keys.input_bytes(r.ctx, r.start.round, sender, message.salt, message.commit)\n"
            "        if not keys.is_signed(self.params.roster[sender], message.signature, statement):",
            "if False:",
        ),
    ),
    named("C24", WIRE, "site indices of any size", ("if value >= MAX_SITES:", "if False:")),
    named("C24", WIRE, "an entry twice in a map", ("if index in found:", "if False:")),
    named("C24", WIRE, "maps of any size", ("if len(rows) > MAX_SITES:", "if False:")),
    named("C24", WIRE, "sets out of order", ("any(a >= b for a, b in pairwise(values))", "False")),
    named("C24", WIRE, "rosters of any size", ("if len(x.advertisements) > MAX_SITES:", "if False:")),
    named(
        "C25",
        MEMBER,
        "a site that comes back masks again",
        (
            "effects.append(Send(self._outbox))  # C25",
            'r, self.state = self._current, "COMPUTING"; self._awaited = Contribute(r.task, r.number, r.active, b"", '
            "r.length, r.length, 1); effects.append(self._awaited)  # C25",
        ),
    ),
    named(
        "C25",
        ROUNDS,
        "jointly: a second vector in one round",
        ("asked, self._awaited = self._awaited, None", "asked = self._awaited"),
        ('if asked is None or self.state != "COMPUTING" or', "if asked is None or"),
    ),
    named(
        "C25",
        ROUNDS,
        "bytes are said before they are stored",
        (
            '[StoreOutbox(self._outbox), Persist(input_record(self._outbox)), Send(self._outbox)]',
            '[Send(self._outbox), StoreOutbox(self._outbox), Persist(input_record(self._outbox))]',
        ),
    ),
    named("C25", f"{GATE}/journal.py", "no lock", ("fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass")),
    named(
        "C26",
        f"{GATE}/approval.py",
        "any number of unknown hospitals",
        ("if len(strangers) <= tolerated:", "if True:"),
    ),
    named(
        "C28",
        f"{GATE}/rules.py",
        "a lower advertisement replaces a higher one",
        ("if held is not None and held.counter >= seen.counter:", "if False:"),
    ),
    named(
        "C30",
        WIRE,
        "a stream may begin with anything",
        ("if not isinstance(message, pb.Hello):", "if False:"),
    ),
    named(
        "C30",
        KEYS,
        "the suite is not in the session's name",
        ("params.max_absent, params.ring_bits, params.mode, params.suite,", "params.max_absent, params.ring_bits, params.mode,"),
    ),
]  # fmt: skip

# a side of an `or` that another check makes unreachable: it cannot fail alone, the joint mutant in NAMED must
COVERED = {
    (
        OPENING,
        "C16",
        "self._index not in survivors",
    ): "C11 and version 0 let no set without me pass: see the joint mutant",
}
# numbered lines of an `if` that lets pass instead of refusing: only their mutation in NAMED is a deletion
PASSES = {(UNMASKING, "C19")}


# ---- finding the checks ---------------------------------------------------------------------------------------------


def marked(source: str) -> dict[int, str]:
    """Line -> number of the check that its comment begins with."""
    found = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and (match := MARKER.match(token.string)):
            found[token.start[0]] = match[1]
    return found


def mutants_of(file: str, source: str) -> list[Mutant]:
    """Every mutant of one file; `LookupError` where a numbered line has none, or a named text is not there once."""
    found = []
    owned: set[int] = set()
    for mutant in NAMED:
        if mutant.file != file:
            continue
        changed = source
        for old, new in mutant.swaps:
            if changed.count(old) != 1:
                raise LookupError(f"{file}: {old!r} stands there {changed.count(old)} times, once was expected")
            changed = changed.replace(old, new)
        first, old = source[: source.index(mutant.swaps[0][0])].count("\n") + 1, mutant.swaps[0][0]
        if not mutant.words.startswith("jointly"):
            owned |= {(line, mutant.check) for line in range(first, first + old.count("\n") + 1)}  # type: ignore[misc]
        found.append(replace(mutant, line=first, source=changed))
    tree = ast.parse(source)
    for line, check in marked(source).items():
        statement = guarding(tree, line)
        if statement is not None and (file, check) not in PASSES:
            found += without_condition(file, source, statement, check)
        elif (line, check) not in owned:  # type: ignore[comparison-overlap]
            raise LookupError(f"{file}:{line}: {check} is no `if` and has no mutation in NAMED")
    return found


def guarding(tree: ast.AST, line: int) -> ast.If | None:
    """The `if` that the numbered line heads, or whose `raise` or `return` it is."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.body[-1], ast.Raise | ast.Return):
            last = node.body[-1]
            if node.lineno <= line < node.body[0].lineno or last.lineno <= line <= (last.end_lineno or 0):
                return node
    return None


def without_condition(file: str, source: str, statement: ast.If, check: str) -> Iterator[Mutant]:
    """One mutant for each side of the condition's `or`, or one for all of it."""
    test = statement.test
    sides = test.values if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.Or) else [test]
    for side in sides:
        text = ast.unparse(side)
        changed = swapped(source, side, "False")
        yield Mutant(
            check, file, f"without `{text}`", line=side.lineno, source=changed,
            covered_by=COVERED.get((file, check, text), ""),
        )  # fmt: skip


def swapped(source: str, node: ast.expr, new: str) -> str:
    """The source with one expression replaced. Columns of `ast` count UTF-8 bytes."""
    lines = [line.encode() for line in source.splitlines(keepends=True)]
    assert node.end_lineno is not None and node.end_col_offset is not None
    head = b"".join(lines[: node.lineno - 1]) + lines[node.lineno - 1][: node.col_offset]
    tail = lines[node.end_lineno - 1][node.end_col_offset :] + b"".join(lines[node.end_lineno :])
    return (head + new.encode() + tail).decode()


def all_mutants() -> list[Mutant]:
    """Every mutant of the product, by number of the check."""
    files = sorted(path for side in SIDES for path in (ROOT / side).rglob("*.py") if not path.name.endswith("_pb2.py"))
    found = [mutant for path in files for mutant in mutants_of(str(path.relative_to(ROOT)), path.read_text("utf-8"))]
    missing = {(m.file, m.words) for m in NAMED} - {(m.file, m.words) for m in found}
    if missing:
        raise LookupError(f"named mutations without a file: {sorted(missing)}")
    return sorted(found, key=lambda m: (int(m.check[1:]), m.file, m.line))


def tests_by_check() -> dict[str, list[str]]:
    """Check -> files with tests that are named after it."""
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for check in sorted(set(TEST.findall(path.read_text("utf-8")))):
            found.setdefault(check, []).append(str(path))
    return found


# ---- running the tests of one mutant --------------------------------------------------------------------------------


class Failed:
    """pytest's own word on what failed and how many ran."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.ran = 0

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.ran += report.when == "call"
        if report.failed:
            self.names.append(report.nodeid)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.names.append(f"collection of {report.nodeid}")


def child(answer: Connection, copy: Path, checks: Sequence[str], files: Sequence[str]) -> None:
    """In a forked process: the tests named after `checks`, on the product in `copy`."""
    import pytest

    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    os.chdir(ROOT)
    sys.dont_write_bytecode = True
    ours = [str(copy / side) for side in SIDES]
    sys.path[:0] = ours
    os.environ["PYTHONPATH"] = os.pathsep.join(ours)
    failed = Failed()
    words = " or ".join(f"test_{check}_" for check in checks)
    options = ["-q", "-x", "-p", "no:cacheprovider", "-o", "timeout=60", "-m", "not nightly", "-k", words]
    pytest.main([*options, *files], plugins=[failed])
    where = str(Path(sys.modules["sequester.protocols"].__file__ or "").resolve())
    answer.send((failed.ran, failed.names, where.startswith(str(copy.resolve()))))
    answer.close()
    os._exit(0)


@contextmanager
def copies(n: int) -> Iterator[list[Path]]:
    """n copies of the product, compiled, in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        made = []
        for i in range(n):
            copy = Path(folder) / str(i)
            for side in SIDES:
                shutil.copytree(ROOT / side, copy / side, ignore=shutil.ignore_patterns("__pycache__"))
            compileall.compile_dir(copy, quiet=2)
            made.append(copy)
        yield made


def put(copy: Path, file: str, source: str) -> None:
    """Write one file of the copy and drop what was compiled from it."""
    path = copy / file
    path.write_text(source, "utf-8")
    for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
        compiled.unlink()


@dataclass(frozen=True, slots=True)
class Verdict:
    mutant: Mutant
    killed_by: str

    @property
    def is_well(self) -> bool:
        return bool(self.killed_by) or bool(self.mutant.covered_by)

    def row(self) -> dict[str, str]:
        m = self.mutant
        end = self.killed_by or (f"covered: {m.covered_by}" if m.covered_by else "SURVIVED")
        return {"check": m.check, "where": f"{m.file}:{m.line}", "mutation": m.words, "failed": end}


def judge(mutants: Sequence[Mutant], made: list[Path], files: dict[str, list[str]]) -> Iterator[Verdict]:
    """Every mutant's verdict as it comes; one process for each mutant, as many at a time as there are copies."""
    fork = multiprocessing.get_context("fork")
    free, queue = list(made), list(mutants)
    running: dict[Connection, tuple[Mutant, Path, Any]] = {}
    while queue or running:
        while queue and free:
            mutant, copy = queue.pop(0), free.pop()
            put(copy, mutant.file, mutant.source)
            ours, theirs = fork.Pipe(duplex=False)
            process = fork.Process(target=child, args=(theirs, copy, [mutant.check], files.get(mutant.check, [])))
            process.start()
            theirs.close()
            running[ours] = mutant, copy, process
        for ready in wait(list(running)):
            assert isinstance(ready, Connection)
            mutant, copy, process = running.pop(ready)
            try:
                _, names, is_ours = ready.recv()
            except EOFError:  # the process ended without a word: no test of ours said why
                names, is_ours = [], True
            process.join()
            ready.close()
            if not is_ours:
                raise RuntimeError("the tests did not run on the copy")
            put(copy, mutant.file, (ROOT / mutant.file).read_text("utf-8"))
            free.append(copy)
            yield Verdict(mutant, names[0].split("tests/")[-1] if names else "")


def unmutated(copy: Path, checks: Sequence[str], files: dict[str, list[str]]) -> tuple[int, list[str]]:
    """How many named tests ran on the untouched copy, and which failed."""
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe(duplex=False)
    wanted = sorted({file for check in checks for file in files.get(check, [])})
    process = fork.Process(target=child, args=(theirs, copy, checks, wanted))
    process.start()
    theirs.close()
    ran, names, is_ours = ours.recv()
    process.join()
    if not is_ours:
        raise RuntimeError("the tests did not run on the copy")
    return ran, names


def main() -> int:
    parser = argparse.ArgumentParser(description="Deletes each check in turn; a test named after it has to fail.")
    parser.add_argument("checks", nargs="*", help="C1 ... C30; all where none is given")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    for name in PRELOADED:
        importlib.import_module(name)
    began = time.monotonic()
    files = tests_by_check()
    wanted = asked.checks or [f"C{i}" for i in range(1, 31)]
    mutants = [m for m in all_mutants() if m.check in wanted]
    faults = [f"{check} has no test named test_{check}_..." for check in wanted if check not in files]
    faults += [f"{check} has no mutant" for check in wanted if check not in {m.check for m in mutants}]
    verdicts = []
    with copies(asked.jobs) as made:
        ran, failed = unmutated(made[0], wanted, files)
        faults += [f"{name} fails on the untouched tree" for name in failed]
        if not failed:
            for verdict in judge(mutants, made, files):
                verdicts.append(verdict)
                if not asked.json and sys.stderr.isatty():
                    print(f"\r{len(verdicts)} of {len(mutants)} mutants", end="", file=sys.stderr, flush=True)
    verdicts.sort(key=lambda v: mutants.index(v.mutant))
    survived = [v for v in verdicts if not v.is_well]
    if asked.json:
        print(json.dumps({"tests": ran, "faults": faults, "mutants": [v.row() for v in verdicts]}, indent=1))
    else:
        for row in (v.row() for v in verdicts):
            print(" | ".join(row.values()))
        for fault in faults:
            print(fault)
        print(
            f"{len(verdicts)} mutants, {len(survived)} survived; {ran} named tests pass on the untouched copy; "
            f"{time.monotonic() - began:.0f} s"
        )
    return 1 if survived or faults else 0


if __name__ == "__main__":
    sys.exit(main())
