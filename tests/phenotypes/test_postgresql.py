"""The same cohort from a real PostgreSQL server: its own process, a Unix socket in a temporary folder, ended by its id."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import pytest
import sqlalchemy as sa

from phenotypes.generated import facts, omop_frames
from phenotypes.test_cohorts import DATED, check, plain
from sequester.client.ingest.phenotypes.omop_tables import Database
from sequester.client.ingest.phenotypes.produce import Wish, produce
from sequester.protocols.errors import SiteError

pytestmark = [
    pytest.mark.skipif(shutil.which("initdb") is None, reason="no PostgreSQL server on this machine"),
    pytest.mark.skipif(importlib.util.find_spec("psycopg") is None, reason="no psycopg (`sequester[postgresql]`)"),
]
_OTHER = {"user": "nobody"} if os.geteuid() == 0 else {}  # PostgreSQL refuses to run as root


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A server of its own, and its URL."""
    folder = Path(tempfile.mkdtemp(prefix="pg"))  # short: a socket's path has at most 107 bytes
    folder.chmod(0o777)
    data = folder / "data"
    subprocess.run(
        ["initdb", "-D", data, "-U", "reader", "-A", "trust", "-E", "UTF8", "--no-locale", "--no-sync"],
        check=True, capture_output=True, timeout=120, cwd=folder, **_OTHER,
    )  # fmt: skip
    server = subprocess.Popen(
        ["postgres", "-D", data, "-k", folder, "-c", "listen_addresses=", "-c", "fsync=off"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=folder, **_OTHER,
    )  # fmt: skip
    try:
        for _ in range(100):
            if subprocess.run(["pg_isready", "-h", folder], capture_output=True).returncode == 0:
                break
            assert server.poll() is None
        yield f"postgresql://reader@/postgres?host={folder}"
    finally:
        server.send_signal(signal.SIGINT)  # do not wait for clients
        server.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


def test_a_cohort_from_postgresql_equals_plain_pandas_and_nothing_can_be_written(url: str, tmp_path: Path) -> None:
    given = facts(1, 1_200)
    engine = sa.create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    for name, frame in omop_frames(given).items():
        dates = {c: sa.Date() for c in frame.columns if c.endswith("_date")}
        frame = frame.assign(**{c: [None if v is None else date.fromisoformat(v) for v in frame[c]] for c in dates})
        frame.to_sql(name, engine, index=False, dtype=dates)
    engine.dispose()
    out = tmp_path / "out.parquet"
    account = produce(Wish(f"omop:{url}", out, DATED, "person_source_value"), "patient")
    wanted, steps = plain(given, given.periods, DATED)
    check(out, account, wanted, steps)
    database = Database(url)
    with pytest.raises(sa.exc.DBAPIError, match="read-only transaction"):
        database._connection.execute(sa.text("DELETE FROM person"))
    database.close()
    with pytest.raises(SiteError, match="cannot be opened") as caught:
        Database(url.replace("/postgres?", "/nothing?").replace("reader@", "reader:secret@"))
    assert "secret" not in caught.value.message + caught.value.hint
