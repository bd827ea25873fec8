"""Where OMOP tables lie: a folder of files by extension, or a database by URL, read in a read-only transaction."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from sequester.client.ingest.phenotypes.omop import Row
from sequester.protocols.errors import SiteError

SUFFIXES = (".csv", ".tsv", ".parquet")
_AT_ONCE = 500  # values in one IN list; SQLite takes at most 999 parameters


class Folder:
    """Tables as files `person.csv`, `measurement.parquet`, ...; names in any case."""

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Path] = {}
        if not folder.is_dir():
            raise SiteError(f"{folder} is not a folder", hint="a folder of person.csv, condition_occurrence.csv, ...")
        for path in sorted(folder.iterdir()):
            if path.suffix.lower() in SUFFIXES:
                name = path.stem.lower()
                if name in self._files:
                    raise SiteError(f"{self._files[name].name} and {path.name} are the same table", hint="keep one")
                self._files[name] = path

    def has(self, table: str) -> bool:
        """Whether there is a file of that table."""
        return table in self._files

    def place(self, table: str, number: int) -> str:
        """File and row; the header of a text file is row 1."""
        return f"{self._files[table].name} row {number}"

    def rows(
        self, table: str, columns: Sequence[str], optional: Sequence[str] = (), among: dict[str, set[str]] | None = None
    ) -> Iterator[Row]:
        """Rows in file order, numbered as in the file."""
        path = self._files.get(table)
        if path is None:
            raise SiteError(f"there is no {table}.csv, .tsv or .parquet", hint="export that table too")
        try:
            frame = self._frame(path)
            names = frame.collect_schema().names()
            _check(path.name, names, columns)
            present = [*columns, *(name for name in optional if name in names)]
            frame = frame.with_row_index("row number", offset=1 if path.suffix.lower() == ".parquet" else 2)
            if among is not None:
                tests = [pl.col(name).is_in(sorted(values)) for name, values in among.items() if name in names]
                frame = frame.filter(pl.any_horizontal(tests).fill_null(False))
            found = frame.select("row number", *present).collect(engine="streaming")
        except pl.exceptions.PolarsError:
            raise SiteError(f"{path.name} is not a table", hint="CSV, TSV or Parquet, UTF-8") from None
        except OSError as error:
            raise SiteError(
                f"{path.name}: {error.strerror or 'cannot be read'}", hint="check who may read it"
            ) from None
        for row in found.iter_rows():
            yield row[0], {name: (cell or "").strip() for name, cell in zip(present, row[1:], strict=True)}

    def _frame(self, path: Path) -> pl.LazyFrame:
        if path.suffix.lower() == ".parquet":
            frame = pl.scan_parquet(path)
        else:
            separator = "\t" if path.suffix.lower() == ".tsv" else ","
            frame = pl.scan_csv(path, separator=separator, infer_schema=False)
        names = frame.collect_schema().names()
        frame = frame.rename({name: name.strip().lower() for name in names}).with_columns(pl.all().cast(pl.String))
        # an id column with gaps is written as 8507.0 by programs that know no missing whole numbers
        return frame.with_columns(pl.col("^.*_id$").str.strip_chars().str.replace(r"^(\d+)\.0$", "$1"))


class Database:
    """Tables of a SQLite file or a PostgreSQL database. Nothing is written: the transaction is read-only."""

    def __init__(self, url: str) -> None:
        import sqlalchemy as sa

        try:
            parsed = sa.engine.make_url(url)
            kind = parsed.get_backend_name()
        except sa.exc.ArgumentError:
            raise SiteError("the source is not a database URL", hint="postgresql://host/database") from None
        if kind not in ("sqlite", "postgresql"):
            raise SiteError(f"a database of kind {kind}", hint="sqlite or postgresql; or export the tables to files")
        try:
            if kind == "sqlite":
                if not parsed.database or not Path(parsed.database).is_file():
                    raise SiteError("the SQLite file of the URL is not there", hint="sqlite:////absolute/path.db")
                file = Path(parsed.database).absolute().as_uri()
                engine = sa.create_engine(sa.engine.make_url(f"sqlite:///{file}?mode=ro&uri=true"))
                self._connection = engine.connect()
            else:
                if parsed.drivername == "postgresql":
                    parsed = parsed.set(drivername="postgresql+psycopg")
                engine = sa.create_engine(parsed)
                self._connection = engine.connect().execution_options(postgresql_readonly=True)
            inspector = sa.inspect(self._connection)
            # views too: a hospital is best served by a view of the columns this needs
            names = [*inspector.get_table_names(), *inspector.get_view_names()]
            self._names = {name.lower(): name for name in names}
            self._columns: dict[str, dict[str, str]] = {}
            self._inspector: Any = inspector
        except ModuleNotFoundError:
            raise SiteError(
                "there is no driver for PostgreSQL here", hint="pip install 'sequester[postgresql]'"
            ) from None
        except sa.exc.SQLAlchemyError:
            # the driver's own words may hold the password
            raise SiteError(
                "the database cannot be opened", hint="check host, name, user and ~/.pgpass; a reader is enough"
            ) from None

    def close(self) -> None:
        """End the transaction and the connection."""
        self._connection.close()
        self._connection.engine.dispose()

    def has(self, table: str) -> bool:
        """Whether the reader sees such a table or view."""
        return table in self._names

    def place(self, table: str, number: int) -> str:
        """Table and row, in the order the database gives them."""
        return f"table {table} row {number}"

    def rows(
        self, table: str, columns: Sequence[str], optional: Sequence[str] = (), among: dict[str, set[str]] | None = None
    ) -> Iterator[Row]:
        """Rows as the database gives them."""
        import sqlalchemy as sa

        if table not in self._names:
            raise SiteError(f"the database shows no table `{table}`", hint="is the schema in the search path?")
        if table not in self._columns:
            listed = self._inspector.get_columns(self._names[table])
            self._columns[table] = {column["name"].lower(): column["name"] for column in listed}
        names = self._columns[table]
        _check(table, list(names), columns)
        present = [*columns, *(name for name in optional if name in names)]
        of = sa.table(self._names[table], *(sa.column(real) for real in names.values()))
        chosen = [of.c[names[name]] for name in present]
        number = 0
        try:
            for where in _conditions(of, names, among):
                query = sa.select(*chosen) if where is None else sa.select(*chosen).where(where)
                for row in self._connection.execute(query.execution_options(yield_per=10_000)):
                    number += 1
                    yield number, {name: _text(cell) for name, cell in zip(present, row, strict=True)}
        except sa.exc.SQLAlchemyError:
            raise SiteError(f"table {table} cannot be read", hint="may the reader select from it?") from None


def _conditions(of: Any, names: dict[str, str], among: dict[str, set[str]] | None) -> Iterator[Any]:
    """WHERE clauses that together give each row once: a row found by an earlier column is not given by a later one."""
    import sqlalchemy as sa

    if among is None:
        yield None
        return
    earlier: list[tuple[Any, list[Any]]] = []
    for name, values in among.items():
        if name not in names:
            continue
        column = of.c[names[name]]
        listed = sorted(int(v) if v.isdigit() else v for v in values)
        for start in range(0, len(listed), _AT_ONCE):
            yield sa.and_(column.in_(listed[start : start + _AT_ONCE]), *_not_in(earlier))
        earlier.append((column, listed))


def _not_in(earlier: list[tuple[Any, list[Any]]]) -> Iterator[Any]:
    import sqlalchemy as sa

    for column, listed in earlier:
        for start in range(0, len(listed), _AT_ONCE):
            part = listed[start : start + _AT_ONCE]
            yield sa.or_(column.is_(None), column.not_in(part))


def _text(cell: Any) -> str:
    return "" if cell is None else str(cell).strip()


def _check(table: str, names: list[str], columns: Sequence[str]) -> None:
    for column in columns:
        if column not in names:
            raise SiteError(f"{table} has no column `{column}`", hint="OMOP CDM 5.4 names its columns")
