"""Events: every page is told what changes, in order, and nothing twice or never."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from server.api_server import OTHER_PROMPT, PROMPT, Api

from opensora.generation.request import ClipRequest
from opensora.server.database import StoreAway
from opensora.server.http import events
from opensora.server.http.events import Changes
from opensora.server.jobs import Job
from opensora.server.service import NewJob
from opensora.server.settings import Key, ServerSettings

PATIENCE_S = 20


@dataclass
class Event:
    name: str
    id: int
    data: dict


def read(text: bytes) -> Event:
    lines = dict(line.split(": ", 1) for line in text.decode().strip().splitlines())
    return Event(lines["event"], int(lines["id"]), json.loads(lines["data"]))


class Page:
    """One stream, read event by event."""

    def __init__(self, stream: AsyncIterator[bytes]) -> None:
        self._stream = stream

    async def next(self) -> Event:
        async with asyncio.timeout(PATIENCE_S):
            while (text := await anext(self._stream)).startswith(b":"):
                pass
        return read(text)

    async def next_of(self, name: str) -> Event:
        while (event := await self.next()).name != name:
            pass
        return event


def told(api: Api, scenario: Callable[[Changes], Awaitable[None]]) -> None:
    """Runs a scenario while the app of the server tells what changes."""

    @asynccontextmanager
    async def telling() -> AsyncIterator[Changes]:
        changes: Changes = api.app.state.changes
        reading = asyncio.create_task(changes.run())
        try:
            yield changes
        finally:
            reading.cancel()
            with suppress(asyncio.CancelledError):
                await reading

    async def run() -> None:
        async with telling() as changes:
            await scenario(changes)

    asyncio.run(run())


def ask(api: Api, prompt: str = PROMPT, owner: str | None = None) -> Job:
    return api.service.create(owner, NewJob(ClipRequest(prompt)))


@pytest.fixture(autouse=True)
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "LOOK_S", 0.01)


def test_a_page_is_told_what_changes(api: Api) -> None:
    async def scenario(changes: Changes) -> None:
        page = Page(changes.stream(None, None))
        ready = await page.next()
        assert (ready.name, ready.data) == ("ready", {"version": ready.id, "is_paused": False})
        job = ask(api)
        added = await page.next()
        assert (added.name, added.data["id"], added.data["status"]) == ("video", job.id, "queued")
        api.finish(api.begin())
        while (event := await page.next()).data["status"] != "completed":
            assert event.id == event.data["version"]
        api.service.delete(None, job.id)
        gone = await page.next()
        assert (gone.name, gone.data["id"], gone.data["deleted"]) == ("video.deleted", job.id, True)
        api.service.pause(None)
        paused = await page.next()
        assert (paused.name, paused.data["is_paused"]) == ("queue", True)
        assert gone.id < paused.id == api.store.head()[0]
        assert (await Page(changes.stream(None, None)).next()).data["is_paused"] is True

    told(api, scenario)


def test_whoever_comes_again_is_told_what_was_missed(api: Api) -> None:
    async def scenario(changes: Changes) -> None:
        first = ask(api)
        stream = changes.stream(None, None)
        seen = (await Page(stream).next()).id
        await stream.aclose()
        second = ask(api)
        api.service.delete(None, first.id)
        again = Page(changes.stream(None, seen))
        assert (await again.next()).name == "ready"
        missed = [await again.next(), await again.next()]
        assert [(event.name, event.data["id"]) for event in missed] == [
            ("video", second.id),
            ("video.deleted", first.id),
        ]
        third = ask(api)
        assert (await again.next()).data["id"] == third.id

    told(api, scenario)


def test_nothing_is_told_twice_or_never_while_pages_come_and_go(api: Api) -> None:
    """A page that leaves and comes again, at every version, sees each version of the jobs once and in order."""

    async def scenario(changes: Changes) -> None:
        job = ask(api)
        stream = changes.stream(None, 0)
        seen = [(await Page(stream).next_of("video")).id]
        for number in range(20):
            api.store.prioritize(job.id, number % 2 + 1)
            if number % 3 == 0:
                await stream.aclose()
                stream = changes.stream(None, seen[-1])
            seen.append((await Page(stream).next_of("video")).id)
        assert seen == sorted(set(seen)) and seen[-1] == api.store.head()[0]

    told(api, scenario)


def test_a_page_is_told_of_its_own_videos(tmp_path: Path) -> None:
    api = Api(ServerSettings(tmp_path, keys=(Key("ada", "a" * 20), Key("bob", "b" * 20))))

    async def scenario(changes: Changes) -> None:
        ada = Page(changes.stream("ada", None))
        await ada.next()
        ask(api, OTHER_PROMPT, "bob")
        adas = ask(api, PROMPT, "ada")
        assert (await ada.next()).data["id"] == adas.id
        late = Page(changes.stream("ada", 0))
        await late.next()
        assert (await late.next()).data["id"] == adas.id

    told(api, scenario)


def test_one_reader_serves_all_pages(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    changed = api.store.changed
    monkeypatch.setattr(api.store, "changed", lambda since: asked.append(since) or changed(since))

    async def scenario(changes: Changes) -> None:
        pages = [Page(changes.stream(None, None)) for _ in range(50)]
        for page in pages:
            await page.next()
        assert changes.num_listeners == 50
        job = ask(api)
        assert {(await page.next()).data["id"] for page in pages} == {job.id}

    told(api, scenario)
    assert len(asked) <= 2  # what there is, and that there is no more


def test_a_page_that_does_not_keep_up_is_let_go(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "MOST_BEHIND", 3)

    async def scenario(changes: Changes) -> None:
        slow, quick = changes.stream(None, None), Page(changes.stream(None, None))
        await Page(slow).next()
        await quick.next()
        job = ask(api)
        await quick.next()
        for priority in range(1, 7):
            api.store.prioritize(job.id, priority)
            assert (await quick.next()).data["priority"] == priority
        told_before = [read(text) async for text in slow]
        assert len(told_before) < 4 and changes.num_listeners == 1
        again = Page(changes.stream(None, told_before[-1].id))
        await again.next()
        assert (await again.next()).data["priority"] == 6

    told(api, scenario)


def test_streams_say_that_they_live_and_end_when_told_to(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "HEARTBEAT_S", 0.01)

    async def scenario(changes: Changes) -> None:
        stream = changes.stream(None, None)
        await Page(stream).next()
        assert (await anext(stream)).startswith(b":")
        changes.end()
        async with asyncio.timeout(PATIENCE_S):
            assert [text async for text in stream if not text.startswith(b":")] == []
        assert changes.num_listeners == 0

    told(api, scenario)


def test_a_store_that_is_away_for_a_while_costs_nothing(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    head, away = api.store.head, []

    def failing() -> tuple[int, bool]:
        if len(away) < 3:
            away.append(1)
            raise StoreAway("the database does not answer")
        return head()

    async def scenario(changes: Changes) -> None:
        page = Page(changes.stream(None, 0))
        await page.next()
        monkeypatch.setattr(api.store, "head", failing)
        job = ask(api)
        assert (await page.next()).data["id"] == job.id and len(away) == 3

    told(api, scenario)
