"""What a program does with OpenAI's client, whichever version is on its path: `python openai_client.py URL FOLDER`.

Prints what it saw as JSON.
"""

import json
import sys
import warnings
from pathlib import Path

import openai

PROMPT = "a red ball rolls left over the grass"
OTHER_PROMPT = "a blue ball rolls left over the grass"


def main(url: str, folder: Path) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="a" * 24, max_retries=0)
    seen: dict[str, object] = {"version": openai.__version__}
    few = {"num_inference_steps": 1}

    video = client.videos.create_and_poll(prompt=PROMPT, model="toybox", seconds="2", size="64x64", extra_body=few)
    seen["created"] = [video.status, video.progress, video.seconds, video.size, video.model, video.error]
    content = client.videos.download_content(video.id)
    content.write_to_file(folder / "clip.mp4")
    seen["file"] = [(folder / "clip.mp4").stat().st_size, content.response.headers["content-type"]]
    seen["variants"] = [
        len(client.videos.download_content(video.id, variant=variant).read())
        for variant in ("thumbnail", "spritesheet")
    ]

    nested = {"num_inference_steps": 1, "cfg_channels": [0, 1], "forecast": {"steps": "all"}, "seed": 7}
    with (folder / "first.png").open("rb") as picture:
        given = client.videos.create(prompt=PROMPT, input_reference=picture, extra_body=nested)
    seen["given"] = [given.to_dict()["inputs"], given.to_dict()["request"]]
    seen["given_status"] = client.videos.poll(given.id, poll_interval_ms=100).status
    remix = client.videos.remix(given.id, prompt=OTHER_PROMPT)
    seen["remix"] = [remix.remixed_from_video_id == given.id, remix.prompt, client.videos.poll(remix.id).status]

    listed = [each.id for each in client.videos.list(limit=2)]
    seen["listed"] = [listed == [remix.id, given.id, video.id], client.videos.list(order="asc").data[0].id == video.id]
    if hasattr(client.videos, "extend"):
        by_id = {**few, "video": {"id": video.id}}  # the client itself sends files only
        edit = client.videos.edit(prompt=OTHER_PROMPT, video=openai.omit, extra_body=by_id)
        extended = client.videos.extend(prompt=PROMPT, seconds="2", video=content.content, extra_body=few)
        seen["made_of_it"] = [client.videos.poll(each.id).status for each in (edit, extended)]

    seen["deleted"] = client.videos.delete(video.id).to_dict() == {
        "id": video.id,
        "object": "video.deleted",
        "deleted": True,
    }
    seen["errors"] = [
        said_by(lambda: client.videos.retrieve(video.id)),
        said_by(lambda: client.videos.create(prompt=PROMPT, extra_body={"sed": 1})),
        said_by(lambda: client.videos.create(prompt=PROMPT, model="sora-2")),
        said_by(lambda: client.with_options(api_key="wrong").videos.list()),
    ]
    waiting = client.videos.create(prompt=PROMPT, extra_body={"num_inference_steps": 500})
    seen["errors"].append(said_by(lambda: client.videos.download_content(waiting.id)))  # type: ignore[attr-defined]
    client.post(f"/videos/{waiting.id}/cancel", cast_to=object)
    cancelled = client.videos.poll(waiting.id)
    seen["cancelled"] = [cancelled.status, cancelled.error and cancelled.error.code]
    client.videos.delete(waiting.id)
    for each in client.videos.list():
        client.videos.delete(each.id)
    seen["left"] = len(client.videos.list().data)
    print(json.dumps(seen))


def said_by(call) -> list[object]:
    """Class and code of the error that it ends in, and whether the message tells anything."""
    try:
        call()
    except openai.APIStatusError as error:
        return [type(error).__name__, error.code, error.param, len(str(error)) > 40]
    return ["none"]


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # OpenAI has given its own service up
    main(sys.argv[1], Path(sys.argv[2]))
