"""The database of jobs: its tables, how it is reached, and how a row becomes a job."""

import functools
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import sqlalchemy as sql
from sqlalchemy import event, exc

from opensora.contents import shown
from opensora.errors import OpenSoraError
from opensora.generation.request import ClipRequest
from opensora.server.jobs import Job, JobError, JobProgress, JobResult

METADATA = sql.MetaData()
JOBS = sql.Table(
    "jobs",
    METADATA,
    sql.Column("id", sql.String, primary_key=True),
    sql.Column("request", sql.Text, nullable=False),
    sql.Column("owner", sql.String, nullable=False),
    sql.Column("kind", sql.String, nullable=False),
    sql.Column("format", sql.String, nullable=False),
    sql.Column("parent", sql.String),
    sql.Column("state", sql.String, nullable=False),
    sql.Column("priority", sql.Integer, nullable=False),
    sql.Column("position", sql.Float(53)),
    sql.Column("is_held", sql.Boolean, nullable=False),
    sql.Column("attempt", sql.Integer, nullable=False),
    sql.Column("num_lost", sql.Integer, nullable=False),
    sql.Column("worker", sql.String),
    sql.Column("lease_until", sql.Float(53)),
    sql.Column("progress", sql.Text, nullable=False),
    sql.Column("result", sql.Text),
    sql.Column("error", sql.Text),
    sql.Column("created_at", sql.Float(53), nullable=False),
    sql.Column("started_at", sql.Float(53)),
    sql.Column("finished_at", sql.Float(53)),
    sql.Column("expires_at", sql.Float(53)),
    sql.Column("version", sql.BigInteger, nullable=False, index=True),
    sql.Column("idempotency_key", sql.String),
    sql.UniqueConstraint("owner", "idempotency_key"),
    sql.Index("jobs_waiting", "state", "priority", "position"),
    sql.Index("jobs_of_owner", "owner", "created_at"),
    sql.Index("jobs_by_time", "created_at", "id"),
    sql.Index("jobs_expiring", "expires_at"),
)
QUEUE = sql.Table(
    "queue",
    METADATA,
    sql.Column("id", sql.Integer, primary_key=True),
    sql.Column("version", sql.BigInteger, nullable=False),
    sql.Column("is_paused", sql.Boolean, nullable=False),
    sql.Column("schema", sql.Integer, nullable=False),
)
SCHEMA = 2


class StoreAway(OpenSoraError):
    """The database does not answer; it may again in a moment, and nothing was changed that it did not say."""


class NoJob(OpenSoraError):
    """There is no job of that id.

    Args:
        job_id: that was asked for.
    """

    def __init__(self, job_id: str) -> None:
        super().__init__(f"there is no video {shown(job_id)}")


class Database:
    """Transactions on jobs; `JobStore` says which there are. May be used by several threads.

    Args:
        url: "sqlite:///FILE" or "postgresql://USER@HOST/NAME"; tables are made where there are none.
        clock: seconds since 1970; of a database server its own clock counts, as those of hosts may differ.

    Raises:
        OpenSoraError: no such database, a driver that is not installed, or tables of another version.
    """

    def __init__(self, url: str, clock: Callable[[], float] = time.time) -> None:
        self._clock, self._engine = clock, open_engine(url)
        self._writer = self._engine.execution_options(writes=True)
        self._is_sqlite = self._engine.dialect.name == "sqlite"
        try:
            self._make_tables()
        except (StoreAway, exc.DatabaseError) as error:
            reason = error if isinstance(error, StoreAway) else error.orig
            raise OpenSoraError(f"the store {shown_url(url)} cannot be used: {reason}") from error

    def close(self) -> None:
        """Gives connections back."""
        self._engine.dispose()

    @contextmanager
    def reading(self) -> Iterator[sql.Connection]:
        """A transaction that changes nothing."""
        with answering(), self._engine.begin() as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[sql.Connection]:
        """A transaction; another one waits until it is over."""
        with answering(), self._writer.begin() as connection:
            yield connection

    def now(self, connection: sql.Connection) -> float:
        """Seconds since 1970, by the one clock that counts."""
        if self._is_sqlite:
            return self._clock()
        return float(connection.execute(sql.text("SELECT extract(epoch FROM clock_timestamp())")).scalar_one())

    def _make_tables(self) -> None:
        with self.writing() as connection:
            if not self._is_sqlite:
                connection.execute(sql.text("SELECT pg_advisory_xact_lock(7031946)"))  # one process makes them
            METADATA.create_all(connection)
            known = connection.execute(sql.select(QUEUE.c.schema)).scalar()
            if known is None:
                connection.execute(sql.insert(QUEUE).values(id=1, version=0, is_paused=False, schema=SCHEMA))
            elif known != SCHEMA:
                raise OpenSoraError(f"the store is of version {known}, expected {SCHEMA}; give a new one")

    def lock_queue(self, connection: sql.Connection) -> None:
        """Until the transaction ends, no job is added or changed by another."""
        connection.execute(sql.select(QUEUE.c.id).with_for_update())

    def next_version(self, connection: sql.Connection) -> int:
        """Held until the transaction ends, so that whoever sees a version has seen all before it."""
        query = sql.update(QUEUE).values(version=QUEUE.c.version + 1).returning(QUEUE.c.version)
        return connection.execute(query).scalar_one()

    def change(self, job_id: str, change: Callable[[Job, float], Job]) -> Job:
        """Changes a job, told what time it is; raises `NoJob` if there is none."""
        with self.writing() as connection:
            row = connection.execute(sql.select(JOBS).where(JOBS.c.id == job_id).with_for_update()).one_or_none()
            if row is None or row.state == "deleted":
                raise NoJob(job_id)
            job = job_of(row)
            changed = change(job, self.now(connection))
            return job if changed == job else self.put(connection, changed)

    def change_held(self, job: Job, change: Callable[[Job, float], Job]) -> Job | None:
        """Likewise, if the worker that got this job still has it; None if not."""
        with self.writing() as connection:
            held = (JOBS.c.id == job.id) & (JOBS.c.attempt == job.attempt) & (JOBS.c.state == "in_progress")
            row = connection.execute(sql.select(JOBS).where(held).with_for_update()).one_or_none()
            return None if row is None else self.put(connection, change(job_of(row), self.now(connection)))

    def put(self, connection: sql.Connection, job: Job) -> Job:
        """Writes a job under the next version."""
        version = self.next_version(connection)
        job = replace(job, version=version, position=float(version) if job.position is None else job.position)
        connection.execute(sql.update(JOBS).where(JOBS.c.id == job.id).values(values_of(job)))
        return job


def open_engine(url: str) -> sql.Engine:
    """How a database is reached."""
    try:
        parsed = sql.make_url(url)
        if parsed.drivername in ("postgresql", "postgres"):
            parsed = parsed.set(drivername="postgresql+psycopg")
        if parsed.get_backend_name() not in ("sqlite", "postgresql"):
            raise OpenSoraError(f"the store is {shown_url(url)}, expected postgresql://USER@HOST/NAME")
        engine = sql.create_engine(parsed, pool_pre_ping=parsed.get_backend_name() == "postgresql")
    except exc.ArgumentError:
        raise OpenSoraError(f"the store is {shown_url(url)}, expected postgresql://USER@HOST/NAME") from None
    except ImportError as error:
        raise OpenSoraError(f"a store in PostgreSQL needs {error.name}: pip install 'opensora[postgres]'") from None
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    return engine


@contextmanager
def answering() -> Iterator[None]:
    """Within it a database that does not answer is `StoreAway`."""
    try:
        yield
    except exc.OperationalError as error:
        raise StoreAway(f"the database does not answer: {' '.join(str(error.orig).split())}") from error


def _prepare_sqlite(connection: Any, _: Any) -> None:
    connection.isolation_level = None  # so that transactions begin where `_begin_sqlite` says
    for pragma in ("busy_timeout=30000", "journal_mode=WAL", "synchronous=FULL"):
        connection.execute(f"PRAGMA {pragma}").close()


def _begin_sqlite(connection: sql.Connection) -> None:
    """What will write says so at once: one that began by reading could not go on if another wrote meanwhile."""
    writes = connection.get_execution_options().get("writes")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def shown_url(url: str) -> str:
    """Without its password."""
    try:
        return sql.make_url(url).render_as_string(hide_password=True)
    except exc.ArgumentError:
        return repr(url)


def job_of(row: Any) -> Job:
    """The job of a row."""
    values = dict(row._mapping)
    del values["idempotency_key"]
    values["request"] = _request_of(values["request"])
    values["progress"] = JobProgress(**json.loads(values["progress"]))
    for name, kind in (("result", JobResult), ("error", JobError)):
        if values[name] is not None:
            values[name] = kind(**json.loads(values[name]))
    return Job(**values)


@functools.lru_cache(1024)
def _request_of(text: str) -> ClipRequest:
    """Read once, as rows are read far more often than written."""
    return ClipRequest.from_json(text)


def values_of(job: Job) -> dict[str, Any]:
    """Its columns."""
    values = {name: getattr(job, name) for name in Job.__dataclass_fields__}
    values["request"] = job.request.to_json()
    values["progress"] = json.dumps(asdict(job.progress))
    for name in ("result", "error"):
        if values[name] is not None:
            values[name] = json.dumps(asdict(values[name]))
    return values
