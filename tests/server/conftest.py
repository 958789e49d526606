"""A store of jobs, in both databases."""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import postgres
import pytest
import sqlalchemy as sql
from server.api_server import Api
from starlette.testclient import TestClient

from opensora.server.jobs import QueueLimits
from opensora.server.settings import ServerSettings
from opensora.server.store import JobStore


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    if postgres.find_programs() is None:
        pytest.skip("PostgreSQL is not installed (apt-get install postgresql)")
    # Not pytest's own folder, which is closed to the user whom the server runs as.
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))
    try:
        with postgres.running(folder) as url:
            yield url
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.multi)])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database without jobs."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'jobs.sqlite3'}"
    url = request.getfixturevalue("postgres_url")
    engine = sql.create_engine(sql.make_url(url).set(drivername="postgresql+psycopg"))
    with engine.begin() as connection:
        connection.execute(sql.text("DROP SCHEMA public CASCADE"))
        connection.execute(sql.text("CREATE SCHEMA public"))
    engine.dispose()
    return url


@pytest.fixture
def open_store(store_url: str, clock: Clock) -> Iterator[Callable[..., JobStore]]:
    """Opens the same database as often as it is called, as processes do."""
    stores: list[JobStore] = []

    def open_it(**limits: int) -> JobStore:
        stores.append(JobStore(store_url, QueueLimits(**limits), clock=clock))
        return stores[-1]

    yield open_it
    for store in stores:
        store.close()


@pytest.fixture
def store(open_store: Callable[..., JobStore]) -> JobStore:
    return open_store()


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    """A server without keys."""
    api = Api(ServerSettings(tmp_path / "server"))
    yield api
    api.store.close()


@pytest.fixture
def client(api: Api) -> TestClient:
    """Somebody who asks it."""
    return api.client()
