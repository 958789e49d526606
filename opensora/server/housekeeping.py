"""Keeps the folder of a server small: expired clips, the oldest beyond the quota, files that no job knows."""

from opensora.server.folder import ServerFolder
from opensora.server.jobs import Job
from opensora.server.settings import ServerSettings
from opensora.server.store import JobStore


def keep_house(store: JobStore, folder: ServerFolder, settings: ServerSettings) -> list[str]:
    """Does all of it; several hosts may at once.

    Returns:
        Ids of jobs and names of files that are gone.
    """
    gone = []
    for job in store.expired():
        remove_job(store, folder, job)
        gone.append(job.id)
    if settings.quota_bytes is not None:
        gone += _within(settings.quota_bytes, store, folder)
    folder.remove_parts()
    gone += folder.remove_strays(lambda job_id: store.get(job_id) is not None, lambda *of: _is_result(store, *of))
    store.forget_deleted()
    return gone


def remove_job(store: JobStore, folder: ServerFolder, job: Job) -> None:
    """Forgets a job, and removes its files: in this order, so that no job ever names a file that is gone."""
    store.delete(job.id)
    folder.remove(job)


def _within(quota_bytes: int, store: JobStore, folder: ServerFolder) -> list[str]:
    too_much = folder.num_bytes() - quota_bytes
    gone: list[str] = []
    while too_much > 0:
        oldest = store.jobs(states=["completed", "failed", "cancelled"], newest_first=False, limit=1)
        if not oldest:
            break
        remove_job(store, folder, oldest[0])
        gone.append(oldest[0].id)
        too_much = folder.num_bytes() - quota_bytes
    return gone


def _is_result(store: JobStore, job_id: str, attempt: int) -> bool:
    job = store.get(job_id)
    if job is None or job.attempt != attempt:
        return False
    return job.state in ("completed", "in_progress")
