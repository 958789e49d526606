"""Where jobs are kept: a database that many processes share, and that none of them can leave in half a state.

SQLite in the server's folder, or PostgreSQL for workers on several hosts; the statements are the same. Every change of
a job is one transaction, and takes the next number of the queue's counter, so that whoever knows the last number it has
seen can ask for what changed since. A worker holds a job by a lease and by the number of its attempt: whoever lost
either changes nothing any more.
"""

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import sqlalchemy as sql

from opensora.errors import OpenSoraError
from opensora.generation.request import ClipRequest
from opensora.server.database import (
    JOBS,
    QUEUE,
    Database,
    job_of,
    values_of,
)
from opensora.server.jobs import WAITING, Job, JobError, JobProgress, JobResult, QueueLimits, QueueSummary, State
from opensora.server.settings import ServerSettings

TOMBSTONES_S = 86_400.0
"""For so long what was deleted is told to those who ask what changed."""
_RUNS = JOBS.c.state == "in_progress"
_MAY_BEGIN = (JOBS.c.state == "queued") & ~JOBS.c.is_held & ~sql.select(QUEUE.c.is_paused).scalar_subquery()


class QueueFull(OpenSoraError):
    """As many jobs wait as may."""


class KeyUsed(OpenSoraError):
    """An idempotency key came with another request before."""


class NotPossible(OpenSoraError):
    """A job is in no state to have that done to it."""


def new_id() -> str:
    """Of a job: microseconds of now, so that jobs of one second are in order by their ids, and 72 random bits."""
    return f"video_{time.time_ns() // 1000:014x}{secrets.token_hex(9)}"


class JobStore(Database):
    """The jobs of one server, or of several that share a database.

    Args:
        url, clock: see `Database`.
        limits: how much may wait.

    Raises:
        OpenSoraError: see `Database`.
    """

    def __init__(self, url: str, limits: QueueLimits | None = None, clock: Callable[[], float] = time.time) -> None:
        super().__init__(url, clock)
        self.limits = limits or QueueLimits()

    # What users do.

    def add(self, job: Job, idempotency_key: str | None = None) -> Job:
        """Takes a job; at its end of the queue unless it says a position.

        Args:
            job: new, of `new_id`.
            idempotency_key: whoever sends the same once more gets the first job back.

        Raises:
            QueueFull: of this owner, or of all.
            KeyUsed: it came with another request.
        """
        with self.writing() as connection:
            now = self.now(connection)
            self.lock_queue(connection)  # so that what is counted stays so until the job is in
            if idempotency_key is not None:
                same = (JOBS.c.owner == job.owner) & (JOBS.c.idempotency_key == idempotency_key)
                row = connection.execute(sql.select(JOBS).where(same)).one_or_none()
                if row is not None:
                    earlier = job_of(row)
                    if _asked(earlier) != _asked(job):
                        raise KeyUsed(
                            "this Idempotency-Key came with another request before; use a new key for a new request"
                        )
                    return earlier
            self._check_room(connection, job.owner)
            job = replace(job, created_at=now)
            connection.execute(sql.insert(JOBS).values(values_of(job) | {"idempotency_key": idempotency_key}))
            return self.put(connection, job)

    def get(self, job_id: str) -> Job | None:
        """The job, unless there is none or it was deleted."""
        with self.reading() as connection:
            row = connection.execute(sql.select(JOBS).where(JOBS.c.id == job_id)).one_or_none()
        return None if row is None or row.state == "deleted" else job_of(row)

    def attempts(self, ids: Sequence[str]) -> dict[str, int | None]:
        """Of ids, those that jobs have, each with the attempt that has made its clip, or is about to; None for none."""
        query = sql.select(JOBS.c.id, JOBS.c.state, JOBS.c.attempt).where(JOBS.c.id.in_(ids), JOBS.c.state != "deleted")
        with self.reading() as connection:
            rows = connection.execute(query).all()
        return {row.id: row.attempt if row.state in ("completed", "in_progress") else None for row in rows}

    def jobs(
        self,
        *,
        owner: str | None = None,
        states: Sequence[State] = (),
        after: str | None = None,
        limit: int = 20,
        newest_first: bool = True,
    ) -> list[Job]:
        """Jobs by the time they came.

        Args:
            owner: whose; None for everybody's.
            states: of those only.
            after: begin behind this job.
            limit: as many at most.
            newest_first: or the oldest.
        """
        order = (JOBS.c.created_at, JOBS.c.id)
        query = sql.select(JOBS).where(JOBS.c.state != "deleted")
        if owner is not None:
            query = query.where(JOBS.c.owner == owner)
        if states:
            query = query.where(JOBS.c.state.in_(states))
        with self.reading() as connection:
            if after is not None:
                known = connection.execute(sql.select(*order).where(JOBS.c.id == after)).one_or_none()
                if known is None:
                    return []
                here, there = sql.tuple_(*order), sql.tuple_(*known)
                query = query.where(here < there if newest_first else here > there)
            query = query.order_by(*(column.desc() if newest_first else column for column in order)).limit(limit)
            return [job_of(row) for row in connection.execute(query)]

    def queue(self, owner: str | None = None) -> list[Job]:
        """Jobs that wait or are being made, in the order in which they are begun."""
        query = sql.select(JOBS).where(JOBS.c.state.in_(WAITING))
        if owner is not None:
            query = query.where(JOBS.c.owner == owner)
        order = (JOBS.c.state, JOBS.c.priority.desc(), JOBS.c.position, JOBS.c.id)  # in_progress before queued
        with self.reading() as connection:
            return [job_of(row) for row in connection.execute(query.order_by(*order))]

    def changed(self, since: int, limit: int = 1000) -> list[Job]:
        """Jobs that changed after a version, as they are now, deleted ones included, in the order of their versions."""
        query = sql.select(JOBS).where(JOBS.c.version > since).order_by(JOBS.c.version).limit(limit)
        with self.reading() as connection:
            return [job_of(row) for row in connection.execute(query)]

    def head(self) -> tuple[int, bool]:
        """Version of the last change, and whether the queue is paused."""
        with self.reading() as connection:
            queue = connection.execute(sql.select(QUEUE)).one()
            return queue.version, queue.is_paused

    def summary(self) -> QueueSummary:
        """The queue at a glance."""
        counts = sql.select(JOBS.c.state, sql.func.count()).group_by(JOBS.c.state)
        oldest = sql.select(sql.func.min(JOBS.c.created_at)).where(JOBS.c.state == "queued")
        with self.reading() as connection:
            states = {state: number for state, number in connection.execute(counts) if state != "deleted"}
            queue = connection.execute(sql.select(QUEUE)).one()
            return QueueSummary(states, queue.is_paused, connection.execute(oldest).scalar(), queue.version)

    def cancel(self, job_id: str) -> Job:
        """Whoever makes it stops at the next step; a job that is done stays as it is.

        Raises:
            NoJob: there is none.
        """
        error = JobError("cancelled", "the job was cancelled")

        def cancelled(job: Job, now: float) -> Job:
            return replace(job, state="cancelled", error=error, finished_at=now) if job.is_waiting else job

        return self.change(job_id, cancelled)

    def retry(self, job_id: str) -> Job:
        """A job that failed or was cancelled waits again.

        Raises:
            NotPossible: it waits already, or there is a clip.
        """

        def again(job: Job, now: float) -> Job:
            if job.state not in ("failed", "cancelled"):
                raise NotPossible(f"the job is {job.state.replace('_', ' ')}; only one that failed can be tried again")
            fresh = Job(job.id, job.request, job.owner, job.kind, job.format, job.parent, priority=job.priority)
            # The number of attempts goes on, so that a worker that has not noticed yet cannot finish this one.
            return replace(fresh, attempt=job.attempt, created_at=job.created_at)

        return self.change(job_id, again)

    def hold(self, job_id: str, is_held: bool = True) -> Job:
        """A waiting job is left until it is let go.

        Raises:
            NotPossible: it is being made, or is done.
        """
        return self.change(job_id, lambda job, now: replace(_queued(job, "held"), is_held=is_held))

    def prioritize(self, job_id: str, priority: int) -> Job:
        """Jobs of higher priority are begun first.

        Raises:
            NotPossible: it is being made, or is done.
        """
        return self.change(job_id, lambda job, now: replace(_queued(job, "moved"), priority=priority))

    def move(self, job_id: str, before: str | None) -> Job:
        """A waiting job is begun before another one, at whose priority, or as the last.

        Raises:
            NotPossible: one of them is being made, or is done.
        """
        queue = [job for job in self.queue() if job.state == "queued" and job.id != job_id]
        if before is None:
            priority = queue[-1].priority if queue else 0
            return self.change(
                job_id, lambda job, now: replace(_queued(job, "moved"), priority=priority, position=None)
            )
        place = next((number for number, job in enumerate(queue) if job.id == before), None)
        if place is None:
            raise NotPossible(f"the job {before} does not wait; name one that does")
        behind = queue[place]
        end = behind.position or 0.0
        ahead = queue[place - 1] if place and queue[place - 1].priority == behind.priority else None
        position = end - 1 if ahead is None else ((ahead.position or 0.0) + end) / 2
        return self.change(
            job_id, lambda job, now: replace(_queued(job, "moved"), priority=behind.priority, position=position)
        )

    def pause(self, is_paused: bool = True) -> None:
        """Nothing is begun until the queue goes on; what is being made is finished."""
        with self.writing() as connection:
            self.next_version(connection)
            connection.execute(sql.update(QUEUE).values(is_paused=is_paused))

    def delete(self, job_id: str) -> Job:
        """Forgets a job, what was asked for included; whoever makes it stops. Files are the caller's to remove.

        Returns:
            The job as it was.
        """
        before: list[Job] = []

        def deleted(job: Job, now: float) -> Job:
            before.append(job)
            gone = Job(job.id, ClipRequest(""), job.owner, state="deleted", attempt=job.attempt)
            return replace(gone, created_at=job.created_at, finished_at=now, expires_at=now + TOMBSTONES_S)

        self.change(job_id, deleted)
        return before[0]

    # What workers do.

    def claim(self, worker: str, lease_s: float, models: Sequence[str] | None = None) -> Job | None:
        """The next job, held for so many seconds; None if there is none.

        A job whose lease is over is begun again, or fails if too many workers were lost over it.

        Args:
            worker: who takes it.
            lease_s: how long nobody else will, unless it says that it lives.
            models: only clips of these; None for all.
        """
        if not self._has_work():  # idle workers ask often, and only one at a time may write
            return None
        with self.writing() as connection:
            now = self.now(connection)
            self._give_up_lost(connection, now, _is_lost(now))
            query = sql.select(JOBS).where(_MAY_BEGIN)
            query = query.order_by(JOBS.c.priority.desc(), JOBS.c.position, JOBS.c.id)
            for row in connection.execute(query.with_for_update(skip_locked=True).limit(1 if models is None else 100)):
                job = job_of(row)
                if models is not None and job.request.model_name not in models:
                    continue
                taken = replace(
                    job,
                    state="in_progress",
                    worker=worker,
                    attempt=job.attempt + 1,
                    lease_until=now + lease_s,
                    started_at=now,
                    progress=JobProgress("loading"),
                )
                return self.put(connection, taken)
            return None

    def _has_work(self) -> bool:
        """Whether a job may begin, or was lost: what `claim` changes."""
        with self.reading() as connection:
            work = sql.exists().where(_MAY_BEGIN | _is_lost(self.now(connection)))
            return bool(connection.execute(sql.select(work)).scalar())

    def renew(self, job: Job, lease_s: float, progress: JobProgress | None = None) -> bool:
        """Puts off the end of a lease, and tells how far the job is.

        Returns:
            Whether it is still this worker's to make: nobody cancelled it, and nobody else has taken it.
        """

        def renewed(held: Job, now: float) -> Job:
            return replace(held, lease_until=now + lease_s, progress=progress or held.progress)

        return self.change_held(job, renewed) is not None

    def is_wanted(self, job: Job) -> bool:
        """Whether it is still this worker's to make, asked without changing anything."""
        with self.reading() as connection:
            query = sql.select(JOBS.c.state, JOBS.c.attempt).where(JOBS.c.id == job.id)
            row = connection.execute(query).one_or_none()
        return row is not None and (row.state, row.attempt) == ("in_progress", job.attempt)

    def complete(self, job: Job, result: JobResult, keep_s: float | None = None) -> bool:
        """The clip is there: its file must be on the disk. It expires after `keep_s`, or never.

        Returns:
            Whether it is this worker's clip that the job has.
        """

        def completed(held: Job, now: float) -> Job:
            progress = replace(held.progress, stage="completed")
            done = replace(held, state="completed", result=result, progress=progress, lease_until=None)
            return replace(done, finished_at=now, expires_at=None if keep_s is None else now + keep_s)

        if self.change_held(job, completed) is not None:
            return True
        there = self.get(job.id)  # it may have been done, and the answer lost on its way
        return there is not None and there.result == result

    def fail(self, job: Job, error: JobError) -> bool:
        """No clip can be made of it. Returns False if the job is not this worker's any more."""

        def failed(held: Job, now: float) -> Job:
            return replace(held, state="failed", error=error, lease_until=None, finished_at=now)

        return self.change_held(job, failed) is not None

    def put_back(self, job: Job) -> bool:
        """A worker that is told to stop leaves it to others."""
        return self.change_held(job, lambda held, now: _waiting_again(held)) is not None

    def give_up(self, worker: str) -> int:
        """What a worker that is gone held waits again, at once; returns how many jobs that are."""
        with self.writing() as connection:
            return self._give_up_lost(connection, self.now(connection), _RUNS & (JOBS.c.worker == worker))

    # What keeps the store small.

    def expired(self, limit: int = 100) -> list[Job]:
        """Jobs that are done and whose time is over."""
        with self.reading() as connection:
            over = (JOBS.c.expires_at < self.now(connection)) & (JOBS.c.state != "deleted")
            return [job_of(row) for row in connection.execute(sql.select(JOBS).where(over).limit(limit))]

    def forget_deleted(self) -> None:
        """Removes what tells of deleted jobs, when nobody can have missed it."""
        with self.writing() as connection:
            over = (JOBS.c.state == "deleted") & (JOBS.c.expires_at < self.now(connection))
            connection.execute(sql.delete(JOBS).where(over))

    def _check_room(self, connection: sql.Connection, owner: str) -> None:
        count = sql.select(sql.func.count()).where(JOBS.c.state.in_(WAITING))
        if connection.execute(count).scalar_one() >= self.limits.most_waiting:
            raise QueueFull(f"{self.limits.most_waiting} jobs wait already, as many as may; try again later")
        if connection.execute(count.where(JOBS.c.owner == owner)).scalar_one() >= self.limits.most_of_owner:
            raise QueueFull(f"{self.limits.most_of_owner} jobs of yours wait already, as many as may; try again later")

    def _give_up_lost(self, connection: sql.Connection, now: float, which: sql.ColumnElement[bool]) -> int:
        query = sql.select(JOBS).where(which).order_by(JOBS.c.id)
        lost = [job_of(row) for row in connection.execute(query.with_for_update(skip_locked=True))]
        for job in lost:
            again = replace(_waiting_again(job), num_lost=job.num_lost + 1)
            if again.num_lost >= self.limits.most_lost:
                lost_it = f"{again.num_lost} workers were lost over it, perhaps for memory; ask for a smaller clip"
                again = replace(again, state="failed", error=JobError("worker_lost", lost_it), finished_at=now)
            self.put(connection, again)
        return len(lost)


def _is_lost(now: float) -> sql.ColumnElement[bool]:
    return _RUNS & (JOBS.c.lease_until < now)


def _waiting_again(job: Job) -> Job:
    return replace(job, state="queued", worker=None, lease_until=None, progress=JobProgress())


def _asked(job: Job) -> tuple[Any, ...]:
    """What tells requests apart; files are named by their content, in a folder of the job's own."""
    return job.kind, job.format, job.parent, job.request.to_json().replace(job.id, "")


def _queued(job: Job, what: str) -> Job:
    if job.state != "queued":
        raise NotPossible(f"the job is {job.state.replace('_', ' ')}; only one that waits can be {what}")
    return job


def store_of(settings: ServerSettings) -> JobStore:
    """The jobs of a server.

    Raises:
        OpenSoraError: see `JobStore`.
    """
    if settings.store is not None:
        return JobStore(settings.store, settings.queue)
    settings.folder.mkdir(parents=True, exist_ok=True)
    return JobStore(f"sqlite:///{_file_of(settings)}", settings.queue)


def existing_store(settings: ServerSettings) -> JobStore:
    """Likewise, of a server that has been started before.

    Raises:
        OpenSoraError: there is none.
    """
    if settings.store is None and not _file_of(settings).is_file():
        raise OpenSoraError(f"{settings.folder} is no folder of a server; name the --folder of opensora serve")
    return store_of(settings)


def _file_of(settings: ServerSettings) -> Path:
    return settings.folder.absolute() / "jobs.sqlite3"
