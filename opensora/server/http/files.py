"""What was made, and what it looks like while it is made."""

from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query
from fastapi.responses import FileResponse
from starlette.types import Message, Receive, Scope, Send

from opensora.server.database import NoJob
from opensora.server.http.access import Owner, Service
from opensora.server.http.errors import answers, envelope
from opensora.server.service import Variant

router = APIRouter(prefix="/v1/videos/{video_id}", tags=["files"])

TYPES = {
    "mp4": "video/mp4",
    "mov": "video/quicktime",
    "webm": "video/webm",
    "mkv": "video/matroska",
    "gif": "image/gif",
    "webp": "image/webp",
    "png": "image/png",
    "jpg": "image/jpeg",
    "json": "application/json",
}
_BINARY = {"schema": {"type": "string", "format": "binary"}}
_OF_VARIANTS = dict.fromkeys(TYPES.values(), _BINARY)


class MediaFile(FileResponse):
    """A file, or the bytes of it that are asked for; what cannot be is said as all errors are."""

    def __init__(self, path: Path, caching: str) -> None:
        super().__init__(
            path,
            media_type=TYPES[path.suffix[1:]],
            filename=path.name,
            content_disposition_type="inline",
            headers={"cache-control": caching, "x-content-type-options": "nosniff"},
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends it."""
        refused: dict[str, Any] = {}

        async def checked(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] in (400, 416):
                refused.update(message)
            elif not refused:
                await send(message)

        await super().__call__(scope, receive, checked)
        if refused:
            status = refused["status"]
            ranges = {key.decode(): value.decode() for key, value in refused["headers"] if key == b"content-range"}
            message = "`Range` asks for bytes that the file does not have; ask for others, or for all of it"
            await envelope(status, "invalid_range", message, param="Range", headers=ranges)(scope, receive, send)


@router.get(
    "/content",
    response_class=FileResponse,
    responses=answers(404, 409, 416)
    | {
        200: {"content": _OF_VARIANTS, "description": "The file."},
        206: {"content": _OF_VARIANTS, "description": "Bytes of it."},
    },
)
def download_content(
    video_id: str, service: Service, owner: Owner, variant: Annotated[Variant, Query()] = "video"
) -> FileResponse:
    """Fetch the clip, its middle frame, a sheet of its frames, its latent channels in grey, or how it was made."""
    path = service.content(owner, video_id, variant)
    if not path.is_file():  # removed meanwhile
        raise NoJob(video_id)
    return MediaFile(path, "private, max-age=86400, immutable")


@router.get(
    "/preview",
    response_class=FileResponse,
    responses=answers(404, 409, 416)
    | {200: {"content": {"image/webp": _BINARY}, "description": "An animated picture."}}
    | {206: {"content": {"image/webp": _BINARY}, "description": "Bytes of it."}},
)
def preview_video(video_id: str, service: Service, owner: Owner) -> FileResponse:
    """See what a clip looks like that is being made."""
    return MediaFile(service.preview(owner, video_id), "no-store")
