"""Nodes that have an `opensora serve` make clips; of the package they need nothing."""

import base64
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
from comfy_api.latest import Input, InputImpl, io

from .client import Server, Stopped
from .fields import Guidance, clip_fields, clip_inputs
from .media import picture_bytes, temporary_folder

ServerType = io.Custom("OPENSORA_SERVER")

CATEGORY = "Open-Sora/server"


class OpenSoraServer(io.ComfyNode):
    """Says where clips are made."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="OpenSoraServer",
            display_name="Open-Sora Server",
            category=CATEGORY,
            description="The address of an `opensora serve`, and its key.",
            inputs=[
                io.String.Input("url", default="http://127.0.0.1:8000"),
                io.String.Input(
                    "key_file",
                    default="",
                    tooltip="File that holds the key and nothing else; workflows are saved in clips, so no key is "
                    "written into them. Empty for a server that needs none.",
                ),
            ],
            outputs=[ServerType.Output(display_name="server")],
        )

    @classmethod
    def execute(cls, url: str, key_file: str) -> io.NodeOutput:
        key = Path(key_file.strip()).expanduser().read_text(encoding="utf-8").strip() if key_file.strip() else ""
        return io.NodeOutput(Server(url, key))


class OpenSoraServerGenerate(io.ComfyNode):
    """Has a clip made."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="OpenSoraServerGenerate",
            display_name="Open-Sora Server Generate",
            category=CATEGORY,
            description="Puts a clip into the server's queue and waits for it; to stop here cancels it there.",
            inputs=[
                ServerType.Input("server"),
                io.String.Input("prompt", multiline=True),
                io.String.Input("negative_prompt", multiline=True, default=""),
                io.String.Input("model", default="", placeholder="the server's", tooltip="One that the server offers."),
                *clip_inputs(),
                Guidance.Input("guidance", optional=True),
                io.Image.Input("first_image", optional=True, tooltip="The clip begins with it."),
            ],
            outputs=[io.Video.Output(display_name="video"), io.String.Output(display_name="video_id")],
        )

    @classmethod
    def execute(
        cls,
        server: Server,
        prompt: str,
        negative_prompt: str,
        model: str,
        guidance: dict[str, Any] | None = None,
        first_image: Input.Image | None = None,
        **clip: Any,
    ) -> io.NodeOutput:
        fields = {"prompt": prompt, **clip_fields(**clip), **(guidance or {})}
        fields |= {"negative_prompt": negative_prompt} if negative_prompt.strip() else {}
        fields |= {"model": model.strip()} if model.strip() else {}
        if first_image is not None:
            data = base64.b64encode(picture_bytes(first_image)).decode()
            fields["input_reference"] = {"image_url": f"data:image/png;base64,{data}"}
        video_id = server.create(fields)
        bar = comfy.utils.ProgressBar(100)
        try:
            server.wait(video_id, bar.update_absolute, comfy.model_management.processing_interrupted)
        except Stopped:
            comfy.model_management.throw_exception_if_processing_interrupted()
            raise
        path = server.download(video_id, temporary_folder() / f"opensora-{Path(video_id).name}.mp4")
        return io.NodeOutput(InputImpl.VideoFromFile(str(path)), video_id)


SERVER_NODES: list[type[io.ComfyNode]] = [OpenSoraServer, OpenSoraServerGenerate]
