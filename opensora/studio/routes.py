"""What the page asks for besides the API: sketches of clips, figures of two, training runs. It changes nothing."""

from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool

from opensora.errors import OpenSoraError
from opensora.server.http.access import Owner, Service
from opensora.studio.runs import NoRun, describe_run, list_runs, preview_of

router = APIRouter(prefix="/studio", include_in_schema=False)


class SketchQuestion(BaseModel):
    """A clip, as it would be asked for, prompt and files aside."""

    request: dict[str, Any] = Field(max_length=50)
    known_frames: bool = False


@router.post("/sketch")
async def sketch(question: SketchQuestion, request: Request, service: Service, owner: Owner) -> dict[str, Any]:
    """Tell what a clip comes to and what it takes, see `answers.sketch`."""
    settings = service.settings
    if question.request.get("model") not in settings.models:
        raise OpenSoraError(f"unknown `model`; this server has {', '.join(settings.models)}")
    return await request.app.state.asking.ask(
        "sketch", **question.model_dump(), device=settings.devices[0], max_memory_bytes=settings.max_memory_bytes
    )


@router.get("/fidelity")
async def fidelity(
    request: Request, service: Service, owner: Owner, made: Annotated[str, Query()], reference: Annotated[str, Query()]
) -> dict[str, float]:
    """Tell how close a video is to another one."""
    clips = [await run_in_threadpool(service.content, owner, video_id) for video_id in (made, reference)]
    return await request.app.state.asking.ask("fidelity", made=str(clips[0]), reference=str(clips[1]))


@router.get("/runs")
def runs(service: Service, owner: Owner) -> dict[str, list[str]]:
    """List training runs."""
    folder = service.settings.runs
    return {"data": [] if folder is None else list_runs(folder)}


@router.get("/runs/{name:path}/previews/{file}")
def preview(name: str, file: str, service: Service, owner: Owner) -> FileResponse:
    """Fetch a preview of a training run."""
    return FileResponse(preview_of(_runs(service.settings.runs), name, file), headers={"cache-control": "no-cache"})


@router.get("/runs/{name:path}")
def run(name: str, service: Service, owner: Owner) -> dict[str, Any]:
    """Tell the curves of a training run, and which previews it has."""
    return describe_run(_runs(service.settings.runs), name)


def _runs(folder: Path | None) -> Path:
    if folder is None:
        raise NoRun("this server has no folder of training runs")
    return folder
