"""Videos longer than a model makes at once: clip after clip, each beginning with the end of the one before.

Every loop is one call of the pipeline. It is conditioned on the last frames of the previous clip, and may have a text
of its own (`|0|a cat|2|a dog`, see `models.text.prompts.split_loops`) and references of its own (mask strategies name a
loop). The frames carried over are shown once. Open-Sora 1.3 goes on from latents, and the video is decoded at the end.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from opensora.conditioning.frames import FrameConditioning, encode_known, frames_taken_over
from opensora.errors import OpenSoraError
from opensora.geometry import VideoSize
from opensora.models.channel_conditioning import ChannelConditioning
from opensora.models.text.conditioner import TextStates
from opensora.models.text.prompts import as_prompt_list, prompt_of_loop
from opensora.pipeline import OpenSoraPipeline, OpenSoraPipelineOutput
from opensora.sampling.generators import generators_per_video


def generate_loops(
    pipeline: OpenSoraPipeline,
    prompt: str | Sequence[str],
    negative_prompt: str | Sequence[str] | None = None,
    *,
    num_loops: int,
    size: VideoSize,
    condition_frames: int | None = None,
    condition_strength: float = 0.0,
    scores: Mapping[str, float | str | None] | None = None,
    conditioning: Callable[[int], FrameConditioning | None] | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    on_loop: Callable[[int], None] | None = None,
    **options: Any,
) -> OpenSoraPipelineOutput:
    """Make one long video per prompt.

    Args:
        pipeline: makes the clips.
        prompt: a sentence or a list of them, each for all loops or with texts for loops.
        negative_prompt: as the pipeline's.
        num_loops: clips, 1 or more.
        size: of each clip.
        condition_frames: latent frames carried over from clip to clip; None for the model's default.
        condition_strength: their denoising strength, 0 to 1.
        scores: as the pipeline's.
        conditioning: loop -> frames to condition on besides; where they overlap with those carried over, those stay.
        generator: as the pipeline's; the noise of a later loop is drawn where that of the one before ended.
        on_loop: called with the number of each loop before it begins.
        **options: the pipeline's other arguments, but for `latents`, `num_videos_per_prompt`, `output_type` and
            `return_dict`.

    Returns:
        As the pipeline, with frames (B, T, 3, H, W) of the whole videos, without `still_frames`, evaluations of all
        loops, and the settings of the first, but for `prompt` and `negative_prompt`, which are as given here.

    Raises:
        OpenSoraError: as the pipeline; fewer than one loop, or more frames carried over than a clip has to spare.
    """
    for name in ("latents", "num_videos_per_prompt", "output_type", "return_dict"):
        if name in options:
            raise OpenSoraError(f"a video of several loops takes no {name}; leave it out, or call the pipeline")
    if num_loops < 1:
        raise OpenSoraError(f"num_loops is {num_loops}; expected 1 or more")
    prompts, autoencoder = as_prompt_list(prompt), pipeline.autoencoder
    texts_of_loop = [tuple(prompt_of_loop(text, loop) for text in prompts) for loop in range(num_loops)]
    encoded: dict[tuple[str, ...], TextStates] = {}
    negative: TextStates | None = None
    carried = pipeline.config.condition_frames if condition_frames is None else condition_frames
    latent_frames = autoencoder.latent_frames(size.num_frames)
    if num_loops > 1 and latent_frames < 2:
        raise OpenSoraError("a clip of one latent frame has nothing to carry over to the next loop; expected 1 loop")
    if num_loops > 1 and not 0 < carried < latent_frames:
        raise OpenSoraError(
            f"{carried} latent frames to be carried over from clip to clip, of {latent_frames}; "
            f"expected 1 to {latent_frames - 1}"
        )
    repeated = autoencoder.frames_before(carried, size.num_frames) if num_loops > 1 else 0
    generators = generators_per_video(generator, len(prompts))
    in_latents = num_loops > 1 and goes_on_in_latents(pipeline, size, carried)
    clips: list[Tensor] = []
    given: list[FrameConditioning | None] = []
    settings: dict[str, Any] = {}
    num_evaluations = num_forecast = 0
    for loop in range(num_loops):
        if on_loop is not None:
            on_loop(loop)
        texts = texts_of_loop[loop]
        if texts not in encoded:  # a text that several loops show is encoded once, and the negative one for all
            encoded[texts], found = pipeline.encode_prompt(texts, None if encoded else negative_prompt, scores=scores)
            negative = found if negative is None else negative
        frames = conditioning(loop) if conditioning else None
        given.append(frames)
        if clips:
            end = clips[-1][:, :, -carried:] if in_latents else _end_of(pipeline, clips[-1], size, carried)
            frames = (frames or FrameConditioning.none(autoencoder, size)).put(end, 0, condition_strength)
        output = pipeline(
            prompt_embeds=encoded[texts],
            negative_prompt_embeds=negative,
            height=size.height,
            width=size.width,
            num_frames=size.num_frames,
            conditioning=frames,
            generator=generators,
            output_type="latent" if in_latents else "pt",
            **options,
        )
        clips.append(output.frames)
        settings = settings or output.settings
        num_evaluations, num_forecast = num_evaluations + output.num_evaluations, num_forecast + output.num_forecast
    if in_latents:
        latents = torch.cat([clips[0], *(clip[:, :, carried:] for clip in clips[1:])], dim=2)
        frames = _decoded(pipeline, latents, latent_frames)
    else:
        frames = torch.cat([clips[0], *(clip[:, repeated:] for clip in clips[1:])], dim=1)
    head, tail = still_frames(pipeline, size, given)
    frames = frames[:, head : frames.shape[1] - tail]
    said = {"prompt": prompts, "negative_prompt": negative_prompt}
    return OpenSoraPipelineOutput(frames, {**settings, **said}, num_evaluations, num_forecast)


def goes_on_in_latents(pipeline: OpenSoraPipeline, size: VideoSize, carried: int) -> bool:
    """Whether a clip is given the last latents of the one before as they are.

    They must be whole chunks of the autoencoder, for a latent frame means something else at another place of one.

    Args:
        pipeline: makes the clips.
        size: of each.
        carried: latent frames.
    """
    if not pipeline.transformer.carries_latents:
        return False
    autoencoder, num_frames = pipeline.autoencoder, size.num_frames
    first, _ = autoencoder.frame_span(autoencoder.latent_frames(num_frames) - carried, num_frames)
    return autoencoder.chunk_start(first, num_frames) == first


def _decoded(pipeline: OpenSoraPipeline, latents: Tensor, length: int) -> Tensor:
    """Frames (B, T, 3, H, W) of latents, whole chunks of the autoencoder, as if they were decoded at once.

    `length` latent frames at a time, so that a long video takes no more memory on the device than a clip. Of a frame
    that two chunks share both must be there, so each piece has the next one's first chunk besides.
    """
    autoencoder, pieces = pipeline.autoencoder, []
    chunk = autoencoder.latent_frames(autoencoder.micro_frame_size or 1)
    shared = 2 * autoencoder.shortest_clip(chunk) - autoencoder.shortest_clip(2 * chunk)
    for start in range(0, latents.shape[2], length):
        piece = latents[:, :, start : start + length + chunk]
        frames = pipeline.decode(piece, autoencoder.shortest_clip(piece.shape[2]))
        end = autoencoder.shortest_clip(min(length, piece.shape[2]))
        pieces.append(frames[:, shared if start else 0 : end])
    return torch.cat(pieces, dim=1)


def _end_of(pipeline: OpenSoraPipeline, clip: Tensor, size: VideoSize, carried: int) -> Tensor:
    """Latents of the last frames of a clip (B, T, 3, H, W), as those of the next one's first frames."""
    autoencoder, alone = pipeline.autoencoder, pipeline.transformer.known_frames_alone
    taken = frames_taken_over(autoencoder, size.num_frames, 0, carried, alone=alone)
    end = clip[:, -taken:].transpose(1, 2) * 2 - 1
    with pipeline.on_device("autoencoder"):
        return encode_known(autoencoder, end, size.num_frames, 0, carried, alone=alone)


def still_frames(
    pipeline: OpenSoraPipeline, size: VideoSize, given: Sequence[FrameConditioning | None]
) -> tuple[int, int]:
    """How many frames at the beginning and at the end of a video only repeat a picture that it was given there.

    They come of autoencoders of which the first latent frame stands for several, and so does a picture that was encoded
    alone; such models make a video that is so much shorter.

    Args:
        pipeline: makes the clips.
        size: of each.
        given: for each loop.
    """
    if not pipeline.transformer.known_frames_alone:
        return 0, 0
    first, end = pipeline.autoencoder.frame_span(0, size.num_frames)
    repeats = [
        end - first - 1 if frames is not None and _pictures(frames)[:, at].all() else 0
        for frames, at in ((given[0], 0), (given[-1], -1))
    ]
    return repeats[0], repeats[1]


def _pictures(frames: FrameConditioning) -> Tensor:
    """(B, T) bool, where a latent frame is a picture."""
    return ChannelConditioning(frames.latents, frames.strength == 0).single_frames
