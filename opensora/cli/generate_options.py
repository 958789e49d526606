"""The groups of options of `opensora generate`, some of which `opensora plan` has as well.

What they say is a `generation.request.ClipRequest`, whose fields have the same names; it is checked there.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import UseAppendAction

from opensora.cli.options import FLAG, given_options, option
from opensora.errors import OpenSoraError
from opensora.generation.loading import parse_adapter
from opensora.generation.request import DEFAULT_MODEL, split_paths
from opensora.models.guiders import GUIDERS
from opensora.models.schedulers import SAMPLERS
from opensora.sampling.forecast_plan import FAST

if TYPE_CHECKING:
    from opensora.refinement import Refiner

PARTS = ("transformer", "autoencoder", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
"""Of a model, each of which can be replaced by an option of that name."""


@dataclass(frozen=True)
class ModelOptions:
    """What `opensora models` lists, or a folder; each part of it can be replaced."""

    model: Annotated[str | None, option("NAME|PATH", DEFAULT_MODEL)] = None
    """toybox, opensora-1.0, ..., a model's folder, a training run (RUN, RUN@STEP), or what is on the Hub (ORG/NAME,
    ORG/NAME@REVISION)."""
    download: Annotated[bool, FLAG] = False
    """Fetch what this machine lacks of a published model or of a repository."""
    transformer: Annotated[Path | None, option("PATH", aliases=["--ckpt-path"])] = None
    """Weights (file, folder, RUN@STEP, or FILE@WHICH of several) in place of the model's diffusion transformer."""
    autoencoder: Annotated[Path | None, option("PATH", aliases=["--vae-path"])] = None
    """Likewise, its autoencoder."""
    text_encoder: Annotated[Path | None, option("PATH", aliases=["--text-encoder-path"])] = None
    """Likewise, its text encoder."""
    tokenizer: Annotated[Path | None, option("PATH", aliases=["--tokenizer-path"])] = None
    """Likewise, its tokenizer."""
    text_encoder_2: Annotated[Path | None, option("PATH")] = None
    """Likewise, the second text encoder of 2.0 (CLIP)."""
    tokenizer_2: Annotated[Path | None, option("PATH")] = None
    """Likewise, its tokenizer."""
    adapter: Annotated[UseAppendAction[tuple[str, ...]], option("PATH[:SCALE]", "none")] = ()
    """Fine-tuning beside the transformer's weights (LoRA), half as strong with :0.5; may be given several times."""

    def wishes(self) -> dict[str, Any]:
        """As fields of a request."""
        parts = {name: getattr(self, name) for name in PARTS}
        components = {name: path for name, path in parts.items() if path is not None}
        model = {} if self.model is None else {"model": self.model}
        return {**model, "components": components, "adapters": tuple(map(parse_adapter, self.adapter))}


@dataclass(frozen=True)
class SizeOptions:
    """A size is height x width; what was made stands in the closing line."""

    num_frames: Annotated[str | None, option("N|4s|2x")] = None
    """Frames (of each loop), seconds, or for 1.2 clips of 51 frames; an edited clip keeps its own number."""
    resolution: Annotated[str | None, option("NAME")] = None
    """Named number of pixels: 144p, 240p, 256, 360p, 480p, 512, 720p, ...; 256px, 768px, ... for 2.0."""
    aspect_ratio: Annotated[str | None, option("A:B")] = None
    """Width to height, 16:9 is landscape; for 1.1 and 1.2 height to width as in their tables: 9:16 is landscape."""
    height: Annotated[int | None, option("PX")] = None
    """Height in pixels."""
    width: Annotated[int | None, option("PX")] = None
    """Width in pixels."""
    image_size: Annotated[tuple[int, int] | None, option("H W")] = None
    """Both at once, rounded down to what the model can make, as Open-Sora's scripts do."""
    fps: Annotated[float | None, option("F")] = None
    """Frames per second that the model is told."""
    frame_interval: Annotated[int | None, option("N")] = None
    """The file plays at the model's frames per second divided by this."""
    save_fps: Annotated[float | None, option("F")] = None
    """The file plays at this many frames per second instead."""

    @property
    def names_a_size(self) -> bool:
        """Whether the size was said in words that a user may read otherwise than the model."""
        return any(said is not None for said in (self.resolution, self.aspect_ratio, self.image_size))


@dataclass(frozen=True)
class GuidanceOptions:
    """How strongly the prompt is followed."""

    guidance_scale: Annotated[float | None, option("S", aliases=["--cfg-scale"])] = None
    """How strongly the prompt is followed; 1 switches guidance off."""
    channel_scales: Annotated[str | None, option("0-2:S,3:S|[S,...]")] = None
    """In its place a scale for each latent channel; 1 leaves it unguided."""


@dataclass(frozen=True)
class SamplingOptions(GuidanceOptions):
    """How noise becomes a clip."""

    num_inference_steps: Annotated[str | None, option("N", aliases=["--num-sampling-steps"])] = None
    """Sampling steps; for IDDPM models also a respacing such as ddim50."""
    image_guidance_scale: Annotated[float | None, option("S", aliases=["--image-cfg-scale", "--guidance-img"])] = None
    """How strongly pictures and clips are followed that are given, by models that are guided by them."""
    cfg_channels: Annotated[str | None, option("K|0,2|all", aliases=["--cfg-channel"])] = None
    """Latent channels that guidance touches: the first K, indices ("2," for one), or all."""
    equivalent_to: Annotated[str | None, option("K|0,2|all", "none")] = None
    """Guide these channels instead, at the scale of equal strength: 7 on 3 of 4 channels becomes 5.5 on all."""
    guider: Annotated[str | None, option("|".join(GUIDERS))] = None
    """How predictions with and without the text are combined, with options of diffusers: apg:eta=0."""
    sampler: Annotated[str | None, option("|".join(SAMPLERS))] = None
    """For models that predict noise; dpm-solver++ guides all channels unless told otherwise."""
    time_shift: Annotated[float | None, option("S")] = None
    """For rectified flow: above 1 more of the steps are spent at noisier times, 1 spreads them evenly."""
    fast: Annotated[str | None, option("|".join(FAST), "exact")] = None
    """Compute fewer predictions of the network and forecast the others; what that costs says docs/performance.md."""
    calibration: Annotated[Path | None, option("FILE", "the model's own, if it fits")] = None
    """File of opensora calibrate, which says what --fast forecasts."""
    latent_space: Annotated[str | None, option("X|JSON", "as declared")] = None
    """Take latents for other numbers than the autoencoder declares: a scaling factor, or fields of its latent_space."""


@dataclass(frozen=True)
class ScoreOptions:
    """What the captions that a model was trained on ended in; "none" switches a default off."""

    aes: Annotated[str | None, option("SCORE")] = None
    """How beautiful, about 4 to 7; for 1.3 also in words, from "terrible" to "excellent"."""
    flow: Annotated[str | None, option("SCORE")] = None
    """How much moves, 0 and up; for 1.3 also in words, from "very low" to "extremely high"."""
    camera_motion: Annotated[str | None, option("WORDS")] = None
    """How the camera moves: "pan left", "zoom in", "static", ..."""
    motion: Annotated[str | None, option("SCORE", aliases=["--motion-score"])] = None
    """For 2.0, how much moves, about 1 to 15."""

    def parse(self) -> dict[str, float | str | None]:
        """What was given, by the names that pipelines know.

        Raises:
            OpenSoraError: a score that is no number.
        """
        given: dict[str, float | str | None] = {}
        for name, text in given_options(self):
            is_off = text.strip().lower() == "none"
            given["aesthetic" if name == "aes" else name] = (
                None if is_off else text if name == "camera_motion" else _score(name, text)
            )
        return given


def _score(name: str, text: str) -> float | str:
    from opensora.models.text.prompts import SCORE_SCALES, score_word

    scale = {"aes": "aesthetic"}.get(name, name)
    with contextlib.suppress(ValueError):
        if abs(score := float(text)) < float("inf"):
            return score
    with contextlib.suppress(OpenSoraError, KeyError):
        return score_word(scale, text)
    words = f", a word such as {SCORE_SCALES[scale][-1][1]!r}" if scale in SCORE_SCALES else ""
    raise OpenSoraError(f"`{name}` is {text!r}, expected a number such as 6.5{words}, or none")


@dataclass(frozen=True)
class FrameOptions:
    """Resized and cropped to the clip's size. Photos of cameras and phones, and any video, told by their content."""

    image: Annotated[Path | None, option("FILE")] = None
    """The clip begins with this picture."""
    text_to_image: Annotated[str | None, option("NAME|PATH")] = None
    """First make that picture of the prompt: flux.1-dev, or the folder of a text-to-image pipeline of diffusers."""
    last_image: Annotated[Path | None, option("FILE")] = None
    """The clip ends with this picture; with --image it connects the two."""
    extend: Annotated[Path | None, option("FILE")] = None
    """The clip goes on where this video ends, repeating its last frames."""
    backwards: Annotated[bool, FLAG] = False
    """With --extend: the clip ends where the video begins."""
    edit: Annotated[Path | None, option("FILE")] = None
    """This video is denoised again after the prompt; needs --strength."""
    strength: Annotated[float | None, option("S")] = None
    """Denoising strength of the edited video: 0 keeps it, 1 generates from noise."""
    input_fps: Annotated[float | None, option("N", "every frame, by time where its rate varies")] = None
    """Take frames of a video by time, so many a second."""


@dataclass(frozen=True)
class LoopOptions:
    """A long video is made of clips (loops) that go on from one another; a prompt for each: "|0|a cat|2|a dog"."""

    loop: Annotated[int | None, option("N", "1")] = None
    """Number of loops."""
    condition_frame_length: Annotated[int | None, option("K")] = None
    """Latent frames carried over from loop to loop, or taken over from --extend."""
    condition_frame_edit: Annotated[float | None, option("E", "0")] = None
    """Denoising strength of the frames carried over, 0 to 1."""


@dataclass(frozen=True)
class ReferenceOptions:
    """Frame conditioning as Open-Sora's scripts name it; a prompt may also end in a JSON object with these two."""

    reference_path: Annotated[str | None, option("A;B")] = None
    """Pictures and videos, separated by semicolons."""
    mask_strategy: Annotated[str | None, option("L,R,S,T,N,E;...")] = None
    """Each entry: N latent frames of reference R, from frame S on, at frame T of loop L, with denoising strength E."""
    align: Annotated[int | None, option("N")] = None
    """Starts move to the nearest multiple of so many latent frames."""
    cond_type: Annotated[str | None, option("i2v_head|i2v_tail|i2v_loop|v2v_head|v2v_tail|...")] = None
    """Where frames of references go, in the words of 1.3 and 2.0 (there also v2v_head_easy, v2v_tail_easy)."""

    def wishes(self) -> dict[str, Any]:
        """As fields of a request."""
        return {"reference_path": split_paths(self.reference_path or "")}


@dataclass(frozen=True)
class RefinementOptions:
    """A language model of your choice writes the prompt out first; off unless an endpoint is named."""

    refine_endpoint: Annotated[str | None, option("URL")] = None
    """Server that speaks OpenAI's chat completions, such as http://localhost:8000/v1."""
    refine_model: Annotated[str | None, option("NAME")] = None
    """Name of the language model there."""
    refine_key_file: Annotated[Path | None, option("FILE")] = None
    """File that holds the key, if one is needed; it is never shown or recorded."""
    refine_key_env: Annotated[str | None, option("NAME")] = None
    """Environment variable that holds the key instead."""

    def refiner(self, closed_vocabulary: str | None) -> "Refiner | None":
        """What refines prompts; None if that was not asked for."""
        from opensora.refinement import refiner_of

        said = (self.refine_endpoint, self.refine_model, self.refine_key_file, self.refine_key_env)
        return refiner_of(*said, closed_vocabulary=closed_vocabulary) if any(given_options(self)) else None


@dataclass(frozen=True)
class MachineOptions:
    """Where it runs, and in which numbers."""

    device: Annotated[str | None, option("NAME", "an accelerator if there is one, else cpu")] = None
    """cpu, cuda, cuda:1, mps."""
    dtype: Annotated[str | None, option("NAME", "float32 on the cpu, else bfloat16")] = None
    """Numbers the networks compute in: float32, bfloat16, float16; int8: bfloat16 with weights in eight bits;
    auto: the faster of the first two, measured once on this machine."""


@dataclass(frozen=True)
class MemoryOptions:
    """For what would not fit otherwise; `opensora plan` says what a clip needs, `--max-memory` chooses it."""

    max_memory: Annotated[str | None, option("8GB")] = None
    """Choose what makes the clip fit into so much memory of its device, what costs least first."""
    offload: Annotated[Literal["networks", "blocks"] | None, option("[networks|blocks]")] = None
    """Each network is in memory only while it works; blocks: of the large ones besides only the block that works."""
    sequential_guidance: Annotated[bool, FLAG] = False
    """The branches of guidance one after the other instead of at once."""
    micro_batch_size: Annotated[int | None, option("N")] = None
    """Frames that the 2D autoencoder works on at once."""
    tile_frames: Annotated[int | None, option("N", "the model's")] = None
    """Frames that an autoencoder of 2.0 works on at once, in tiles that overlap; not quite the same video."""

    @property
    def choices(self) -> dict[str, Any]:
        """What `Engine.load` takes."""
        return {name: value for name, value in vars(self).items() if name != "max_memory"}
