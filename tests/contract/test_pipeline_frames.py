"""Frames that a call is given as people hold them, in every pipeline: what `condition` makes of them, or a refusal."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipeline import seeded
from tiny_published import pipeline_of
from torch import Tensor

from opensora.conditioning.frames import FrameConditioning, condition
from opensora.errors import OpenSoraError
from opensora.geometry import VideoSize
from opensora.media.transforms import clips_of
from opensora.models.schedulers.rectified_flow import RectifiedFlowScheduler
from opensora.pipeline import OpenSoraPipeline

PROMPTS = ["a red ball", "rain in the hills"]
PIPELINES = {
    "1.0": ("opensora-1.0-hq-16x256x256", None),
    "1.1": ("opensora-1.1-stage3", "ddim"),
    "1.2": ("opensora-1.2", None),
}


@pytest.fixture(scope="module", params=PIPELINES)
def pipe(request: pytest.FixtureRequest) -> OpenSoraPipeline:
    name, sampler = PIPELINES[request.param]
    # Two chunks, so that there is something to make between the ends; 1.0 makes 16 frames and no others.
    return pipeline_of(name, sampler, num_frames=16 if request.param == "1.0" else 18)


def size_of(pipe: OpenSoraPipeline) -> VideoSize:
    return VideoSize(pipe.config.num_frames, 32, 48)


def pixels(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


def as_video(array: np.ndarray) -> Tensor:
    """uint8 (T, H, W, 3) as `condition` takes it."""
    return torch.tensor(array).movedim(-1, 0).float() / 127.5 - 1


def sample(pipe: OpenSoraPipeline, prompts: Any = PROMPTS[0], **options: Any) -> Tensor:
    how: dict[str, Any] = {"generator": seeded(1), "output_type": "latent", "num_inference_steps": 2}
    return pipe(prompts, **how | options).frames


def near(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def forms(array: np.ndarray) -> dict[str, Any]:
    """The same picture (H, W, 3) or clip (T, H, W, 3) in every way in which it may be held."""
    tensor = torch.tensor(array).movedim(-1, -3)
    one: dict[str, Any] = {
        "array": array,
        "tensor": tensor,
        "numbers": array / np.float32(255),
        "doubles": torch.tensor(array / 255).movedim(-1, -3),
    }
    if array.ndim == 3:
        return {**one, "image": Image.fromarray(array)}
    frames = [Image.fromarray(frame) for frame in array]
    return {**one, "images": frames, "tuple": tuple(frames), "arrays": list(array), "tensors": list(tensor)}


@pytest.mark.parametrize("name", ["image", "last_image"])
def test_a_picture_in_every_form(pipe, name):
    picture = pixels(1, 32, 48)
    conditioning = condition(pipe.autoencoder, size_of(pipe), **{name: as_video(picture[None])})
    expected = sample(pipe, conditioning=conditioning)
    assert not torch.allclose(sample(pipe), expected, atol=1e-2)
    for form in forms(picture).values():
        near(sample(pipe, **{name: form}), expected)
        near(sample(pipe, **{name: [form]}), expected)


def test_a_video_in_every_form(pipe):
    clip = pixels(2, pipe.config.num_frames, 32, 48)
    conditioning = condition(pipe.autoencoder, size_of(pipe), edit=as_video(clip), strength=0.6)
    expected = sample(pipe, conditioning=conditioning)
    for form in forms(clip).values():
        near(sample(pipe, video=form, strength=0.6), expected)
        near(sample(pipe, video=[form], strength=0.6), expected)


def test_both_ends(pipe):
    first, last = pixels(1, 32, 48), pixels(2, 32, 48)
    image, last_image = as_video(first[None]), as_video(last[None])
    expected = sample(pipe, conditioning=condition(pipe.autoencoder, size_of(pipe), image=image, last_image=last_image))
    near(sample(pipe, image=Image.fromarray(first), last_image=last), expected)


@pytest.mark.parametrize("copies", [1, 2])
def test_one_per_prompt(pipe, copies):
    pictures, shared = pixels(1, 2, 32, 48), pixels(3, 32, 48)
    seeds = [1, 2, 3, 4][: 2 * copies]
    alone = [
        sample(pipe, PROMPTS[k // copies], image=pictures[k // copies], last_image=shared, generator=seeds[k])
        for k in range(len(seeds))
    ]
    for several in (list(pictures), pictures, torch.tensor(pictures).movedim(-1, -3)):
        options = {"last_image": [shared], "num_videos_per_prompt": copies, "generator": seeds}
        near(sample(pipe, PROMPTS, image=several, **options), torch.cat(alone))


def test_a_video_per_prompt(pipe):
    clips = pixels(1, 2, pipe.config.num_frames, 32, 48)
    alone = [sample(pipe, PROMPTS[k], video=clips[k], strength=0.5, generator=k) for k in range(2)]
    images = [[Image.fromarray(frame) for frame in clip] for clip in clips]
    for several in (images, list(clips), clips, torch.tensor(clips).movedim(-1, -3)):
        near(sample(pipe, PROMPTS, video=several, strength=0.5, generator=[0, 1]), torch.cat(alone))


def test_strength(pipe):
    """0 keeps the clip as it is (almost, where the last step is not the end), 1 makes one that has nothing of it."""
    clip = pixels(2, pipe.config.num_frames, 32, 48)
    if isinstance(pipe.scheduler, RectifiedFlowScheduler):
        kept = condition(pipe.autoencoder, size_of(pipe), edit=as_video(clip), strength=0)
        near(sample(pipe, video=clip, strength=0), kept.latents)
    near(sample(pipe, video=clip, strength=1), sample(pipe, video=clip[::-1].copy(), strength=1))


def test_pictures_are_filled():
    """Of another size, they are resized and cropped, whatever holds them."""
    picture, clip = pixels(1, 64, 64), pixels(2, 5, 64, 64)
    for form in forms(picture).values():
        (video,) = clips_of(form, 32, 48, pictures=True)
        assert video.shape == (3, 1, 32, 48)
        torch.testing.assert_close(video, clips_of(picture, 32, 48, pictures=True)[0])
    for form in forms(clip).values():
        (video,) = clips_of(form, 32, 48)
        assert video.shape == (3, 5, 32, 48)
        torch.testing.assert_close(video, clips_of(clip, 32, 48)[0], atol=1e-5, rtol=1e-5)


PICTURE, CLIP = pixels(1, 32, 48), pixels(1, 18, 32, 48)
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a file": ({"image": "ball.png"}, "image: got str; expected PIL images"),
    "nothing": ({"image": []}, "image: got a list of nothing"),
    "a list of files": ({"video": ["a.png", "b.png"], "strength": 0.5}, "video: got a list of str"),
    "grey": ({"image": PICTURE[..., 0]}, "image: got ndarray (32, 48); expected"),
    "channels last": ({"image": torch.tensor(PICTURE)}, "image: got Tensor (32, 48, 3); expected"),
    "other numbers": ({"image": PICTURE.astype(np.float32)}, "image: got pictures of float32 from 0 to 255"),
    "signed": ({"last_image": PICTURE / 255 - 1}, "last_image: got pictures of float64 from -1 to 0"),
    "whole": ({"image": PICTURE.astype(np.int64)}, "image: got pictures of int64"),
    "a clip as a picture": ({"image": [CLIP]}, "image: got a list of ndarray (18, 32, 48, 3)"),
    "frames of two sizes": ({"video": [PICTURE, PICTURE[1:]], "strength": 0.5}, "video: got a list of ndarray"),
    "two for one": ({"image": [PICTURE, PICTURE]}, "image: got 2 for 1 prompts; give one, or one each"),
    "too short": ({"video": CLIP[:3], "strength": 0.5}, "video: got 3 frames for a clip of"),
    "no strength": ({"video": CLIP}, "give strength, from 0"),
    "no video": ({"strength": 0.5}, "got strength=0.5 and no video"),
    "strength of a picture": ({"image": PICTURE, "strength": 0.5}, "got strength=0.5 and no video"),
    "too strong": ({"video": CLIP, "strength": 1.5}, "outside of 0 (kept) to 1"),
    "a clip and a picture": ({"video": CLIP, "strength": 0.5, "image": PICTURE}, "leave out image, last_image"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_anything_else_is_refused_in_one_line(pipe, why):
    options, message = REFUSED[why]
    with pytest.raises(OpenSoraError) as error:
        sample(pipe, **options)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_two_ways_at_once_are_refused(pipe):
    with pytest.raises(OpenSoraError, match="given in two ways"):
        sample(pipe, image=PICTURE, conditioning=FrameConditioning.none(pipe.autoencoder, size_of(pipe)))
