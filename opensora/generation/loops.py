"""Videos longer than a model makes at once: clip after clip, each beginning with the end of the one before.

Every loop is one call of the pipeline. It is conditioned on the last frames of the previous clip, and may have a text
of its own (`|0|a cat|2|a dog`, see `models.text.prompts.split_loops`) and references of its own (mask strategies name a
loop). The frames carried over are shown once.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from opensora.conditioning.frames import FrameConditioning, encode_in_place
from opensora.errors import OpenSoraError
from opensora.geometry import VideoSize
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
        As the pipeline, with frames (B, T, 3, H, W) of the whole videos and the settings of the first loop, but for
        `prompt` and `negative_prompt`, which are as given here.

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
    clips: list[Tensor] = []
    settings: dict[str, Any] = {}
    for loop in range(num_loops):
        if on_loop is not None:
            on_loop(loop)
        texts = texts_of_loop[loop]
        if texts not in encoded:  # a text that several loops show is encoded once, and the negative one for all
            encoded[texts], found = pipeline.encode_prompt(texts, None if encoded else negative_prompt, scores=scores)
            negative = found if negative is None else negative
        frames = conditioning(loop) if conditioning else None
        if clips:
            end = clips[-1][:, -repeated:].transpose(1, 2) * 2 - 1
            with pipeline.on_device("autoencoder"):
                latents = encode_in_place(autoencoder, end, size.num_frames, 0, carried)
            frames = (frames or FrameConditioning.none(autoencoder, size)).put(latents, 0, condition_strength)
        output = pipeline(
            prompt_embeds=encoded[texts],
            negative_prompt_embeds=negative,
            height=size.height,
            width=size.width,
            num_frames=size.num_frames,
            conditioning=frames,
            generator=generators,
            output_type="pt",
            **options,
        )
        clips.append(output.frames)
        settings = settings or output.settings
    frames = torch.cat([clips[0], *(clip[:, repeated:] for clip in clips[1:])], dim=1)
    said = {"prompt": prompts, "negative_prompt": negative_prompt}
    return OpenSoraPipelineOutput(frames, {**settings, **said})
