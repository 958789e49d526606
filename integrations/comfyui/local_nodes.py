"""Nodes that make clips where ComfyUI runs, by the engine that the command line calls."""

import logging
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import comfy.model_management
import comfy.utils
import folder_paths
from comfy_api.latest import Input, InputImpl, Types, io, ui

from .fields import MODELS_OWN, Guidance, OpenSoraGuidance, clip_fields, clip_inputs
from .media import picture_file, video_file
from .package import the_package

if TYPE_CHECKING:
    from opensora.generation.clip import Clip
    from opensora.generation.engine import Engine
    from opensora.generation.prepared import EncodedText, SampledClip
    from opensora.generation.progress import Progress

Model = io.Custom("OPENSORA_MODEL")
Text = io.Custom("OPENSORA_TEXT")
Frames = io.Custom("OPENSORA_FRAMES")
Latents = io.Custom("OPENSORA_LATENTS")
FinishedClip = io.Custom("OPENSORA_CLIP")

CATEGORY = "Open-Sora"
_USES = {"go on where it ends": "extend", "lead up to where it begins": "extend", "edit it": "edit"}
_BACKWARDS = "lead up to where it begins"
_SHOWN = ("mp4", "webm", "mov")  # formats that a browser plays


@dataclass(frozen=True)
class NodeText:
    """A prompt: fields of a request, and what the text encoder made of them."""

    fields: dict[str, Any]
    encoded: "EncodedText"


class OpenSoraLoadModel(io.ComfyNode):
    """Loads a model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="OpenSoraLoadModel",
            display_name="Open-Sora Load Model",
            category=CATEGORY,
            description="A model of the family, from this machine: `opensora models` says how one is fetched.",
            inputs=[
                io.String.Input("model", default="toybox", tooltip="A name, a folder, or org/name of the Hub."),
                io.Combo.Input(
                    "dtype",
                    options=[MODELS_OWN, "auto", "float32", "bfloat16", "float16", "int8"],
                    default=MODELS_OWN,
                    tooltip="Numbers that the networks compute in.",
                ),
                io.Combo.Input(
                    "offload",
                    options=["nothing", "networks", "blocks"],
                    default="nothing",
                    tooltip="What is in the accelerator's memory only while it works.",
                ),
                io.String.Input("adapter", default="", tooltip="File or folder of a LoRA; empty for none."),
                io.Float.Input("adapter_scale", default=1.0, min=-10.0, max=10.0, step=0.05),
            ],
            outputs=[Model.Output(display_name="model")],
        )

    @classmethod
    def execute(cls, model: str, dtype: str, offload: str, adapter: str, adapter_scale: float) -> io.NodeOutput:
        import torch

        opensora = the_package()
        from opensora.generation.request import Adapter

        request = opensora.ClipRequest(
            "",
            model=model.strip(),
            device=str(comfy.model_management.get_torch_device()),
            dtype=None if dtype == MODELS_OWN else dtype,
            adapters=(Adapter(Path(adapter.strip()), adapter_scale),) if adapter.strip() else (),
        )
        comfy.model_management.unload_all_models()  # ComfyUI's own leave the accelerator to this one
        with torch.inference_mode(False):  # weights outlive the graph that they are loaded for
            engine = opensora.Engine.load(request, offload=None if offload == "nothing" else offload)
        return io.NodeOutput(engine)


class OpenSoraEncodeText(io.ComfyNode):
    """Reads a prompt."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="OpenSoraEncodeText",
            display_name="Open-Sora Encode Text",
            category=CATEGORY,
            description="The prompt as the model reads it. Encoded once for all clips that are made of it.",
            inputs=[
                Model.Input("model"),
                io.String.Input("prompt", multiline=True),
                io.String.Input("negative_prompt", multiline=True, default=""),
                io.Float.Input(
                    "fps",
                    default=0.0,
                    min=0.0,
                    max=240.0,
                    step=0.1,
                    tooltip="Frames per second that the model is told, some among the words; 0 for its own.",
                ),
            ],
            outputs=[Text.Output(display_name="text")],
        )

    @classmethod
    def execute(cls, model: "Engine", prompt: str, negative_prompt: str, fps: float) -> io.NodeOutput:
        fields: dict[str, Any] = {"prompt": prompt}
        fields |= {"negative_prompt": negative_prompt} if negative_prompt.strip() else {}
        fields |= {"fps": fps} if fps else {}
        prepared = model.prepare([the_package().ClipRequest(**fields)])[0]
        return io.NodeOutput(NodeText(fields, model.encode_text(prepared)))


class OpenSoraConditioningFrames(io.ComfyNode):
    """Says which frames a clip is made from."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="OpenSoraConditioningFrames",
            display_name="Open-Sora Conditioning Frames",
            category=CATEGORY,
            description="Frames that a clip begins or ends with, goes on from, leads up to, or edits.",
            inputs=[
                io.Image.Input("first_image", optional=True, tooltip="The clip begins with it."),
                io.Image.Input("last_image", optional=True, tooltip="The clip ends with it."),
                io.Video.Input("video", optional=True, tooltip="What to do with it says `use_of_video`."),
                io.Combo.Input("use_of_video", options=list(_USES), default=next(iter(_USES))),
                io.Float.Input(
                    "strength",
                    default=0.6,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Of an edit, from 0 (the video is kept) to 1 (generated from noise).",
                ),
            ],
            outputs=[Frames.Output(display_name="frames")],
        )

    @classmethod
    def execute(
        cls,
        use_of_video: str,
        strength: float,
        first_image: Input.Image | None = None,
        last_image: Input.Image | None = None,
        video: Input.Video | None = None,
    ) -> io.NodeOutput:
        fields: dict[str, Any] = {}
        if first_image is not None:
            fields["image"] = picture_file(first_image)
        if last_image is not None:
            fields["last_image"] = picture_file(last_image)
        if video is not None:
            fields[_USES[use_of_video]] = video_file(video)
            fields |= {"backwards": True} if use_of_video == _BACKWARDS else {}
            fields |= {"strength": strength} if _USES[use_of_video] == "edit" else {}
        if not fields:
            raise ValueError("no frames are given; connect a picture or a video, or leave this node out")
        return io.NodeOutput(fields)


class OpenSoraSample(io.ComfyNode):
    """Makes the latents of a clip."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="OpenSoraSample",
            display_name="Open-Sora Sample",
            category=CATEGORY,
            description="From noise to the latents of a clip.",
            inputs=[
                Model.Input("model"),
                Text.Input("text"),
                *clip_inputs(),
                io.Combo.Input(
                    "sampler",
                    options=[MODELS_OWN, "ancestral", "ddim", "dpm-solver++"],
                    default=MODELS_OWN,
                    tooltip="Of models that predict noise; rectified flow has one.",
                    advanced=True,
                ),
                io.Combo.Input(
                    "fast",
                    options=["no", "quality", "balanced", "draft"],
                    default="no",
                    tooltip="How much of the network's work is forecast instead.",
                    advanced=True,
                ),
                Guidance.Input("guidance", optional=True),
                Frames.Input("frames", optional=True),
            ],
            outputs=[Latents.Output(display_name="latents")],
        )

    @classmethod
    def execute(
        cls,
        model: "Engine",
        text: NodeText,
        sampler: str,
        fast: str,
        guidance: dict[str, Any] | None = None,
        frames: dict[str, Any] | None = None,
        **clip: Any,
    ) -> io.NodeOutput:
        fields = {**text.fields, **clip_fields(**clip), **(guidance or {}), **(frames or {})}
        fields |= {} if sampler == MODELS_OWN else {"sampler": sampler}
        fields |= {} if fast == "no" else {"fast": fast}
        prepared = model.prepare([the_package().ClipRequest(**fields)])[0]
        for note in prepared.notes:
            logging.info("Open-Sora: %s", note)
        return io.NodeOutput(_sampled(model, prepared, text.encoded))


def _sampled(model: "Engine", prepared: Any, text: "EncodedText") -> "SampledClip":
    """The latents; ComfyUI is told of every step, and may stop it there."""
    from opensora.generation.progress import Cancelled

    bar = comfy.utils.ProgressBar(prepared.sampling.num_inference_steps)

    def tell(progress: "Progress") -> None:
        if progress.stage == "denoising":
            bar.update_absolute(progress.step, progress.num_steps)

    try:
        return model.sample(prepared, text, on_progress=tell, cancelled=comfy.model_management.processing_interrupted)
    except Cancelled:
        comfy.model_management.throw_exception_if_processing_interrupted()
        raise


class OpenSoraDecode(io.ComfyNode):
    """Makes frames of latents."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="OpenSoraDecode",
            display_name="Open-Sora Decode",
            category=CATEGORY,
            description="From latents to frames.",
            inputs=[Model.Input("model"), Latents.Input("latents")],
            outputs=[
                FinishedClip.Output(display_name="clip"),
                io.Image.Output(display_name="images"),
                io.Float.Output(display_name="fps"),
                io.Video.Output(display_name="video"),
            ],
        )

    @classmethod
    def execute(cls, model: "Engine", latents: "SampledClip") -> io.NodeOutput:
        import torch

        clip = model.decode(latents)
        images = torch.from_numpy(clip.frames).float() / 255
        rate = Fraction(clip.fps).limit_denominator(1001)
        video = InputImpl.VideoFromComponents(Types.VideoComponents(images=images, frame_rate=rate))
        return io.NodeOutput(clip, images, float(clip.fps), video)


class OpenSoraSaveClip(io.ComfyNode):
    """Writes a clip with its record, so that the command line can make it again."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="OpenSoraSaveClip",
            display_name="Open-Sora Save Clip",
            category=CATEGORY,
            description="Writes the clip with its record: `opensora generate --from FILE` makes the same frames again.",
            inputs=[
                FinishedClip.Input("clip"),
                io.String.Input("filename_prefix", default="opensora/clip"),
                io.Combo.Input("format", options=["mp4", "webm", "mov", "mkv", "gif", "webp", "png"], default="mp4"),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, clip: "Clip", filename_prefix: str, format: str) -> io.NodeOutput:
        height, width = clip.frames.shape[1:3]
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
            filename_prefix, folder_paths.get_output_directory(), width, height
        )
        path = clip.save(Path(folder) / f"{name}_{counter:05}_.{format}")
        saved = [ui.SavedResult(path.name, subfolder, io.FolderType.output)]
        return io.NodeOutput(ui=ui.PreviewVideo(saved) if format in _SHOWN else ui.SavedImages(saved, format != "png"))


LOCAL_NODES: list[type[io.ComfyNode]] = [
    OpenSoraLoadModel,
    OpenSoraEncodeText,
    OpenSoraConditioningFrames,
    OpenSoraGuidance,
    OpenSoraSample,
    OpenSoraDecode,
    OpenSoraSaveClip,
]
