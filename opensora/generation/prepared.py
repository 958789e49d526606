"""Clips that only have to be sampled, alone or several at once, and what they are on the way."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from opensora.errors import OpenSoraError, is_out_of_memory
from opensora.generation.guidance import pipeline_guidance
from opensora.generation.inputs import Inputs
from opensora.generation.loops import generate_loops
from opensora.generation.progress import Watch
from opensora.generation.record import Sampling
from opensora.generation.request import ClipRequest
from opensora.models.text.conditioner import TextStates

if TYPE_CHECKING:
    from opensora.conditioning.frames import FrameConditioning
    from opensora.pipeline import OpenSoraPipeline, OpenSoraPipelineOutput


@dataclass(frozen=True, eq=False)
class PreparedClip:
    """A request that this model can grant: all that is left is to sample it.

    Attributes:
        pipeline: makes it, with the sampler asked for.
        request: as asked for.
        sampling: completed by the model's defaults.
        num_frames: of the whole video, all loops together.
        inputs: what it is made from besides text, as its record tells it.
        conditioning: the frames of `inputs`, encoded, for each loop.
        spelled: what the text encoder is given for each text of the prompt,
        spelled_negative: and for the negative prompt, if there is one.
        notes: what may be otherwise than the user expects, a sentence each.
    """

    pipeline: "OpenSoraPipeline"
    request: ClipRequest
    sampling: Sampling
    num_frames: int
    inputs: Inputs
    conditioning: "list[FrameConditioning | None]"
    spelled: tuple[str, ...]
    spelled_negative: str | None
    notes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class EncodedText:
    """The text of a clip as the transformer reads it, see `Engine.encode_text`.

    Attributes:
        spelled, spelled_negative: as of the `PreparedClip` that it was made for.
        states: of the prompt.
        negative_states: of the negative prompt, if there is one.
    """

    spelled: tuple[str, ...]
    spelled_negative: str | None
    states: TextStates
    negative_states: TextStates | None


@dataclass(frozen=True, eq=False)
class SampledClip:
    """A clip that is not decoded yet, see `Engine.sample`.

    Attributes:
        prepared: what was asked for.
        output: of the pipeline; its frames are latents (1, C, T', H', W').
    """

    prepared: PreparedClip
    output: "OpenSoraPipelineOutput"


def check_one_batch(prepared: Sequence[PreparedClip]) -> None:
    """Raises `OpenSoraError` unless these clips can be made at once."""
    first = prepared[0]
    for clip in prepared[1:]:
        if clip.sampling != first.sampling:
            raise OpenSoraError("clips of different settings cannot share a batch; make them one by one")
        if (clip.request.negative_prompt is None) != (first.request.negative_prompt is None):
            raise OpenSoraError("clips with and without a negative prompt cannot share a batch; make them one by one")
    if len(prepared) > 1 and any(frames is not None for clip in prepared for frames in clip.conditioning):
        raise OpenSoraError("clips that are made from given frames cannot share a batch; make them one by one")


def sample_batch(prepared: Sequence[PreparedClip], watch: Watch) -> "OpenSoraPipelineOutput":
    """Frames of clips that share a batch, of all their loops.

    Each clip has noise of its own, so that it does not depend on its neighbours.
    """
    first = prepared[0]
    sampling = first.sampling
    negatives = [clip.request.negative_prompt for clip in prepared]
    return generate_loops(
        first.pipeline,
        [clip.request.shown for clip in prepared],
        [text for text in negatives if text is not None] or None,
        num_loops=sampling.num_loops,
        size=sampling.size,
        condition_frames=sampling.condition_frames,
        condition_strength=sampling.condition_strength,
        conditioning=lambda loop: first.conditioning[loop],
        generator=[torch.Generator("cpu").manual_seed(clip.request.seed) for clip in prepared],
        on_loop=watch.loop_begins,
        scores=sampling.scores,
        **_options(sampling, watch),
    )


def sample_latents(prepared: PreparedClip, text: EncodedText, watch: Watch) -> "OpenSoraPipelineOutput":
    """Latents of a clip of one loop."""
    sampling = prepared.sampling
    size = sampling.size
    return prepared.pipeline(
        prompt_embeds=text.states,
        negative_prompt_embeds=text.negative_states,
        height=size.height,
        width=size.width,
        num_frames=size.num_frames,
        conditioning=prepared.conditioning[0],
        generator=[torch.Generator("cpu").manual_seed(prepared.request.seed)],
        output_type="latent",
        **_options(sampling, watch),
    )


def _options(sampling: Sampling, watch: Watch) -> dict[str, Any]:
    """What a call of the pipeline is told besides text, size and frames."""
    return {
        "nominal_size": sampling.nominal_size,
        "fps": sampling.fps,
        "num_inference_steps": sampling.num_inference_steps,
        **pipeline_guidance(sampling),
        "forecast": sampling.forecast,
        "callback_on_step_end": watch.step_done,
    }


@contextmanager
def memory_in_words(sampling: Sampling) -> Iterator[None]:
    """Memory that is not enough is the user's mistake, and is told as such."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OpenSoraError(
            f"out of memory for {sampling.num_frames} frames of {sampling.height}x{sampling.width}; "
            "choose fewer `num_frames`, or a smaller `resolution` or `height` and `width`"
        ) from error
