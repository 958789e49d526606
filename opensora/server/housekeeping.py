"""Keeps the folder of a server small: expired clips, and the oldest beyond the quota."""

from contextlib import suppress

from opensora.files import holding
from opensora.server.database import NoJob
from opensora.server.folder import ServerFolder
from opensora.server.jobs import Job
from opensora.server.settings import ServerSettings
from opensora.server.store import JobStore


def keep_house(store: JobStore, folder: ServerFolder, settings: ServerSettings) -> list[str]:
    """Removes clips whose time is over, or that are too many.

    Of hosts that share a folder one does so at a time, lest each remove as much as is too much for all.

    Returns:
        Ids of jobs that are gone; of none while another host is at it.
    """
    with holding(folder.housekeeping_lock) as is_held:
        return _keep_house(store, folder, settings) if is_held else []


def _keep_house(store: JobStore, folder: ServerFolder, settings: ServerSettings) -> list[str]:
    gone = []
    while expired := store.expired():
        for job in expired:
            with suppress(NoJob):  # somebody removed it meanwhile
                remove_job(store, folder, job)
            gone.append(job.id)
    if settings.quota_bytes is not None:
        gone += _within(settings.quota_bytes, store, folder)
    store.forget_deleted()
    return gone


def remove_job(store: JobStore, folder: ServerFolder, job: Job) -> int:
    """Forgets a job, and removes its files: in this order, so that no job ever names a file that is gone.

    Returns:
        Bytes of its files.
    """
    store.delete(job.id)
    return folder.remove(job)


def _within(quota_bytes: int, store: JobStore, folder: ServerFolder) -> list[str]:
    too_much = folder.num_bytes() - quota_bytes
    gone: list[str] = []
    while too_much > 0:
        oldest = store.jobs(states=["completed", "failed", "cancelled"], newest_first=False, limit=1)
        if not oldest:
            break
        try:
            too_much -= remove_job(store, folder, oldest[0])
        except NoJob:  # somebody removed it meanwhile
            too_much = folder.num_bytes() - quota_bytes
        gone.append(oldest[0].id)
    return gone
