"""Jobs: none is lost, none is made twice, and everybody sees what changed."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from opensora.errors import OpenSoraError
from opensora.generation.request import Adapter, ClipRequest
from opensora.server.jobs import Job, JobError, JobProgress, JobResult, QueueLimits
from opensora.server.store import JobStore, KeyUsed, NotPossible, QueueFull, new_id

LEASE_S = 10.0
RESULT = JobResult("clip.mp4", 1000, 64, 64, 17, 8.0, 1.5)


def job(prompt: str = "a ball", **more) -> Job:
    return Job(new_id(), ClipRequest(prompt), **more)


def test_a_job_is_kept_as_it_was_asked_for(store: JobStore) -> None:
    request = ClipRequest(
        "a ball", seed=7, image=Path("inputs/0.png"), cfg_channels=[0, 2], scores={"motion": 3.0}, num_frames="2s"
    )
    request = replace(request, adapters=(Adapter(Path("lora"), 0.5),))
    added = store.add(Job(new_id(), request, owner="ann", kind="extend", parent=new_id(), format="gif", priority=2))
    assert store.get(added.id) == added
    assert added.request == request
    assert (added.state, added.attempt, added.progress.percent) == ("queued", 0, 0)


def test_ids_cannot_be_guessed_and_others_are_none(store: JobStore) -> None:
    store.add(job())
    assert store.get("video_0") is None
    assert len({new_id() for _ in range(100)}) == 100


def test_jobs_of_one_instant_are_listed_in_the_order_they_came(store: JobStore, clock) -> None:
    ids = [store.add(job()).id for _ in range(5)]
    assert [one.id for one in store.jobs()] == ids[::-1]
    assert [one.id for one in store.jobs(newest_first=False, after=ids[2])] == ids[3:]


def test_jobs_are_begun_in_the_order_they_came_and_by_priority(store: JobStore, clock) -> None:
    added = []
    for priority in (0, 0, 5):
        added.append(store.add(job(priority=priority)))
        clock.now += 1
    order = [added[2].id, added[0].id, added[1].id]
    assert [one.id for one in store.queue()] == order
    claimed = [store.claim("w", LEASE_S) for _ in range(3)]
    assert [one.id for one in claimed if one] == order
    assert store.claim("w", LEASE_S) is None


def test_a_job_moves_before_another_and_to_the_end(store: JobStore) -> None:
    first, second, third = [store.add(job()) for _ in range(3)]
    store.move(third.id, before=first.id)
    assert [one.id for one in store.queue()] == [third.id, first.id, second.id]
    store.move(third.id, before=second.id)
    assert [one.id for one in store.queue()] == [first.id, third.id, second.id]
    store.move(first.id, before=None)
    assert [one.id for one in store.queue()] == [third.id, second.id, first.id]
    store.prioritize(second.id, 1)
    store.move(first.id, before=second.id)
    assert [one.id for one in store.queue()] == [first.id, second.id, third.id]


def test_what_is_held_or_paused_is_not_begun(store: JobStore) -> None:
    held = store.hold(store.add(job()).id)
    assert held.is_held and store.claim("w", LEASE_S) is None
    store.hold(held.id, False)
    store.pause()
    assert store.summary().is_paused and store.claim("w", LEASE_S) is None
    store.pause(False)
    assert (claimed := store.claim("w", LEASE_S)) and claimed.id == held.id


def test_a_worker_takes_clips_of_its_models_only(store: JobStore) -> None:
    other = store.add(Job(new_id(), ClipRequest("a ball", model="other")))
    store.add(job())
    claimed = store.claim("w", LEASE_S, models=["toybox"])
    assert claimed and claimed.request.model_name == "toybox"
    assert store.claim("w", LEASE_S, models=["toybox"]) is None
    assert (claimed := store.claim("w", LEASE_S, models=["other"])) and claimed.id == other.id


def test_a_clip_is_there_with_its_job_or_not_at_all(store: JobStore) -> None:
    added = store.add(job())
    claimed = store.claim("w", LEASE_S)
    assert claimed and store.renew(claimed, LEASE_S, JobProgress("denoising", 10, 20))
    assert store.get(added.id).progress.percent == 50
    assert store.complete(claimed, RESULT, keep_s=60)
    done = store.get(added.id)
    assert (done.state, done.result, done.error) == ("completed", RESULT, None)
    assert done.expires_at == pytest.approx(done.finished_at + 60)
    assert store.complete(claimed, RESULT), "an answer that was lost on its way is asked for once more"
    assert not store.complete(claimed, replace(RESULT, file="other.mp4"))
    assert not store.fail(claimed, JobError("internal_error", "late"))


def test_a_job_whose_worker_says_nothing_is_begun_again_by_another(store: JobStore, clock) -> None:
    store.add(job())
    lost = store.claim("lost", lease_s=-1.0)
    again = store.claim("other", LEASE_S)
    assert lost and again and again.id == lost.id
    assert (again.attempt, again.num_lost, again.worker) == (2, 1, "other")
    assert not store.is_wanted(lost) and not store.renew(lost, LEASE_S) and not store.complete(lost, RESULT)
    assert store.complete(again, RESULT)


def test_a_job_that_loses_workers_fails_in_the_end(open_store: Callable[..., JobStore]) -> None:
    store = open_store(most_lost=2)
    added = store.add(job())
    for worker in ("a", "b"):
        assert store.claim(worker, LEASE_S)
        assert store.give_up(worker) == 1
    failed = store.get(added.id)
    assert (failed.state, failed.error.code) == ("failed", "worker_lost")
    assert store.claim("c", LEASE_S) is None


def test_a_worker_that_is_told_to_stop_costs_no_attempt(open_store: Callable[..., JobStore]) -> None:
    store = open_store(most_lost=1)
    added = store.add(job())
    for _ in range(3):
        claimed = store.claim("w", LEASE_S)
        assert claimed and store.put_back(claimed)
    assert (store.get(added.id).state, store.get(added.id).num_lost) == ("queued", 0)


def test_to_cancel_what_waits_leaves_what_runs(store: JobStore) -> None:
    store.add(job())
    running = store.claim("w", LEASE_S)
    waiting = store.add(job())
    assert store.cancel(waiting.id).state == "cancelled"
    assert running and store.is_wanted(running)
    assert store.cancel(running.id).error.code == "cancelled"
    assert not store.is_wanted(running) and not store.complete(running, RESULT)
    assert store.get(running.id).state == "cancelled"
    assert store.claim("w", LEASE_S) is None


def test_what_is_done_is_not_cancelled(store: JobStore) -> None:
    store.add(job())
    claimed = store.claim("w", LEASE_S)
    assert claimed and store.complete(claimed, RESULT)
    assert store.cancel(claimed.id).state == "completed"


def test_a_retry_is_out_of_reach_of_the_worker_that_was_told_to_stop(store: JobStore) -> None:
    store.add(job())
    first = store.claim("w", LEASE_S)
    assert first
    with pytest.raises(NotPossible, match="in progress"):
        store.retry(first.id)
    store.cancel(first.id)
    assert store.retry(first.id).state == "queued"
    second = store.claim("v", LEASE_S)
    assert second and second.attempt == 2
    assert not store.complete(first, RESULT) and store.complete(second, RESULT)


def test_only_what_waits_can_be_moved_or_held(store: JobStore) -> None:
    store.add(job())
    running = store.claim("w", LEASE_S)
    waiting = store.add(job())
    assert running
    for change in (
        lambda: store.hold(running.id),
        lambda: store.prioritize(running.id, 1),
        lambda: store.move(running.id, None),
        lambda: store.move(waiting.id, before=running.id),
    ):
        with pytest.raises(NotPossible):
            change()
    with pytest.raises(OpenSoraError, match="there is no video"):
        store.cancel(new_id())


def test_the_same_key_is_the_same_job(store: JobStore) -> None:
    first = store.add(job(), idempotency_key="k")
    assert store.add(job(), idempotency_key="k").id == first.id
    assert len(store.jobs()) == 1
    with pytest.raises(KeyUsed):
        store.add(job("another ball"), idempotency_key="k")
    assert store.add(job(owner="ann"), idempotency_key="k").id != first.id, "keys are each owner's"


def test_no_more_wait_than_may(open_store: Callable[..., JobStore]) -> None:
    store = open_store(most_waiting=3, most_of_owner=2)
    for _ in range(2):
        store.add(job(owner="ann"))
    with pytest.raises(QueueFull, match="of yours"):
        store.add(job(owner="ann"))
    store.add(job(owner="bob"))
    with pytest.raises(QueueFull, match="3 jobs wait"):
        store.add(job(owner="cat"))
    claimed = store.claim("w", LEASE_S)
    assert claimed and store.complete(claimed, RESULT)
    store.add(job(owner="cat"))


def test_whoever_knows_a_version_learns_all_that_changed_since(store: JobStore) -> None:
    first, second = store.add(job()), store.add(job())
    seen = store.summary().version
    assert store.changed(seen) == []
    store.cancel(first.id)
    store.delete(second.id)
    changed = store.changed(seen)
    assert [(one.id, one.state) for one in changed] == [(first.id, "cancelled"), (second.id, "deleted")]
    assert changed[1].request == ClipRequest(""), "of what was deleted nothing is kept"
    assert store.get(second.id) is None and [one.id for one in store.jobs()] == [first.id]


def test_jobs_are_listed_page_by_page(store: JobStore, clock) -> None:
    ids = []
    for number in range(5):
        ids.append(store.add(job(owner="ann" if number % 2 else "bob")).id)
        clock.now += 1
    newest = [one.id for one in store.jobs(limit=2)]
    assert newest == ids[:-3:-1]
    assert [one.id for one in store.jobs(after=newest[-1])] == ids[2::-1]
    assert [one.id for one in store.jobs(newest_first=False, after=ids[3])] == [ids[4]]
    assert [one.id for one in store.jobs(owner="ann", newest_first=False)] == [ids[1], ids[3]]
    assert store.jobs(states=["failed"]) == []
    assert store.jobs(after=new_id()) == []


def test_expired_jobs_are_told_and_forgotten(store: JobStore) -> None:
    store.add(job())
    claimed = store.claim("w", LEASE_S)
    assert claimed and store.complete(claimed, RESULT, keep_s=-1.0)
    assert [one.id for one in store.expired()] == [claimed.id]
    store.delete(claimed.id)
    assert store.expired() == []


@pytest.mark.parametrize("num_workers", [8])
def test_workers_at_once_share_the_jobs(open_store: Callable[..., JobStore], num_workers: int) -> None:
    store = open_store(most_waiting=1000, most_of_owner=1000)
    ids = {store.add(job()).id for _ in range(40)}
    begin, made = threading.Barrier(num_workers), []

    def work(number: int) -> None:
        own = open_store()
        begin.wait()
        while (claimed := own.claim(f"w{number}", LEASE_S)) is not None:
            assert own.complete(claimed, replace(RESULT, file=claimed.id))
            made.append(claimed.id)

    with ThreadPoolExecutor(num_workers) as pool:
        list(pool.map(work, range(num_workers)))
    assert len(made) == len(ids) and set(made) == ids
    versions = [one.version for one in store.changed(0)]
    assert versions == sorted(set(versions))


def test_a_worker_without_work_does_not_wait_for_whoever_writes(store: JobStore) -> None:
    store.hold(store.add(job()).id)
    store.pause()
    store.add(job())
    asked = threading.Thread(target=store.claim, args=("w", LEASE_S), daemon=True)
    with store.writing():
        asked.start()
        asked.join(timeout=10)
        assert not asked.is_alive()


def test_the_same_key_at_once_is_one_job(open_store: Callable[..., JobStore]) -> None:
    stores = [open_store() for _ in range(6)]
    begin = threading.Barrier(len(stores))

    def add(store: JobStore) -> str:
        begin.wait()
        return store.add(job(), idempotency_key="k").id

    with ThreadPoolExecutor(len(stores)) as pool:
        assert len(set(pool.map(add, stores))) == 1


def test_a_store_that_is_none_is_told_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "jobs.sqlite3").write_text("no database" * 1000)
    for url, words in (
        (f"sqlite:///{tmp_path / 'jobs.sqlite3'}", "cannot be used"),
        ("mysql://host/name", "expected postgresql"),
        ("nonsense", "expected postgresql"),
        ("postgresql://nobody:secret@127.0.0.1:1/none", "cannot be used"),
    ):
        with pytest.raises(OpenSoraError, match=words) as error:
            JobStore(url, QueueLimits())
        assert "secret" not in str(error.value) and "\n" not in str(error.value)
