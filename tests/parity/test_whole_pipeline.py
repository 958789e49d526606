"""Whole pipelines of 1.0, 1.1 and 1.2, from files as they were published to frames, against plain formulas in float64.

The expected clips come from `plain_transformers`, `plain_samplers` and `plain_autoencoder`, which know nothing of the
package and are themselves held against the fixtures (`test_plain_reference.py`); the text encoder and the 2D
autoencoder are the libraries' own, in float64.

Noise is handed over. A clip begins as `latents`; then its generator is asked for standard normal numbers of the clip's
shape (1, C, T, H, W) in every step: once if frames are conditioned on, and once for the step itself where that adds
noise, which is in every step of IDDPM but the last.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import plain_autoencoder, plain_samplers, plain_transformers, published_files
from parity.plain_transformers import double
from torch import Tensor

from opensora.checkpoints.loading import load_pipeline
from opensora.conditioning.frames import FrameConditioning
from opensora.conditioning.references import place_references
from opensora.models.text.prompts import parse_mask_strategy
from opensora.pipeline import OpenSoraPipeline

# Of the largest value; float32 against float64, for tables of either precision.
TOLERANCE = 1e-4


def assert_near(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=TOLERANCE * float(expected.abs().max()))


def noise_of(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def drawing(seed: int, clip: Tensor) -> Callable[[], Tensor]:
    """The numbers that the pipeline draws for this clip, one after the other."""
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn((1, *clip.shape), generator=generator)[0].double()


def run(pipeline: OpenSoraPipeline, prompt: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
    """Latents after the last step (B, C, T, H, W), and frames (B, T, 3, H, W) unless only latents are asked for."""
    seen: list[Tensor] = []
    options = {"output_type": "pt", **options}
    output = pipeline(
        prompt, callback_on_step_end=lambda _pipe, _i, _t, state: seen.append(state["latents"]), **options
    )
    return seen[-1], None if options["output_type"] == "latent" else output.frames


def pixels(video: Tensor) -> Tensor:
    """(3, T, H, W) in [-1, 1] to (T, 3, H, W) in [0, 1]; most of it inside, so that little is hidden by the ends."""
    frames = (video / 2 + 0.5).transpose(0, 1)
    assert ((frames > 0) & (frames < 1)).double().mean() > 0.5
    return frames.clamp(0, 1)


def clip_of(seed: int, num_frames: int, height: int, width: int) -> Tensor:
    """(3, T, H, W) in [-1, 1]."""
    return torch.rand(3, num_frames, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def sized(size: tuple[int, int], num_frames: int) -> dict[str, int]:
    return {"height": size[0], "width": size[1], "num_frames": num_frames}


def frame_conditioning(
    pipeline: OpenSoraPipeline, clip: Tensor, videos: list[Tensor], strategy: str, alignment: int | None = None
) -> FrameConditioning:
    """References placed as a user of the package places them."""
    references = [pipeline.autoencoder.encode_video(video[None])[0] for video in videos]
    placed, strength = place_references(clip, references, parse_mask_strategy(strategy), alignment=alignment)
    return FrameConditioning(placed[None], strength[None])


class Text:
    """A prompt's states and the null text, in float64, no longer than the prompt."""

    def __init__(self, encoder: Any, pieces: Any) -> None:
        self.encoder, self.pieces = encoder, pieces

    def __call__(self, spelled: str) -> Tensor:
        tokens = torch.tensor([[*self.pieces.encode(spelled), 1]])  # 1 ends a text
        return self.encoder(input_ids=tokens)[0][0]


def branches(function: Any, w: dict[str, Tensor], text: Tensor, **told: Any) -> plain_samplers.Network:
    """The network with a prompt, and with as many tokens of the null text."""
    null_text = w["y_embedder.y_embedding"][: len(text)]
    return lambda x, timestep, frames: (
        function(w, x, timestep, text, frames, **told),
        function(w, x, timestep, null_text, frames, **told),
    )


@pytest.fixture(scope="module")
def text_files(tmp_path_factory) -> tuple[Path, Text]:
    folder = tmp_path_factory.mktemp("text") / "t5"
    return folder, Text(*published_files.write_text_encoder(folder))


@pytest.fixture(scope="module")
def frame_autoencoder_files(tmp_path_factory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("vae") / "sd-vae-ft-ema"
    weights = double(published_files.write_frame_autoencoder(folder))
    return folder, plain_autoencoder.frame_autoencoder(weights, **published_files.FRAMES_1_1)


def load(name: str, **components: Path) -> OpenSoraPipeline:
    pipeline = load_pipeline(name, components=components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# --- 1.0 --------------------------------------------------------------------------------------------------------------

# As the reference cleans them (the fixtures of text cleaning have more).
PROMPTS = {
    "A small  DOG runs <b>over</b> the grass #42": "a small dog runs over the grass",
    "Two people dance — in the “rain”": 'two people dance - in the "rain"',
}


@pytest.mark.parametrize("moving_average", [False, True])
def test_1_0(golden_json, tmp_path, text_files, frame_autoencoder_files, moving_average):
    """Two prompts in one batch; position tables of the files are not read; 3 of 4 channels are guided."""
    keys = golden_json("checkpoint_keys/stdit_xl2_v1_0_16x256x256")["keys"]
    path = tmp_path / "OpenSora-v1-HQ-16x256x256.pth"
    w = double(published_files.write_transformer_1_0(path, keys, moving_average=moving_average))
    (text_folder, text), (autoencoder_folder, kl) = text_files, frame_autoencoder_files
    pipeline = load("opensora-1.0", transformer=path, autoencoder=autoencoder_folder, text_encoder=text_folder)

    noise = noise_of(1, 2, 4, 5, 4, 6)
    latents, frames = run(
        pipeline,
        list(PROMPTS),
        height=32,
        width=48,
        num_frames=5,
        num_inference_steps=6,
        latents=noise,
        generator=[torch.Generator().manual_seed(seed) for seed in (7, 8)],
    )
    assert frames is not None
    for row, (spelled, seed) in enumerate(zip(PROMPTS.values(), (7, 8), strict=True)):
        told: dict[str, Any] = {"num_heads": 16, "space_scale": 0.5, "time_scale": 1.0}
        expected = plain_samplers.iddpm(
            branches(plain_transformers.stdit, w, text(spelled), **told),
            noise[row].double(),
            drawing(seed, noise[row]),
            num_steps=6,
            scale=7.0,
            channels=3,
            float32_tables=False,
        )
        assert_near(latents[row], expected)
        assert_near(frames[row], pixels(plain_autoencoder.decode_frames(kl, expected)))


# --- 1.1 --------------------------------------------------------------------------------------------------------------

HEADS = 4
PROMPT, SPELLED = next(iter(PROMPTS.items()))
# (height, width) made, of an odd number of latent rows and columns, and what the network is told instead.
SIZE, NOMINAL_SIZE = (24, 40), (24, 43)


@pytest.fixture(scope="module")
def version_1_1(golden_json, tmp_path_factory, text_files, frame_autoencoder_files) -> tuple[OpenSoraPipeline, Any]:
    """The pipeline, and a function that gives the expected latents of a clip."""
    keys = golden_json("checkpoint_keys/stdit2_xl2_v1_1")["keys"]
    folder = tmp_path_factory.mktemp("1.1") / "OpenSora-STDiT-v2-stage3"
    config = {"model_max_length": 50, "input_sq_size": 64, "no_temporal_pos_emb": False, "freeze": None}
    w = double(published_files.write_transformer(folder, keys, "STDiT2", HEADS, **config))
    text_folder, text = text_files

    def expected(clip: Tensor, nominal: tuple[int, int], **options: Any) -> Tensor:
        height, width = nominal
        told: dict[str, Any] = {"height": height, "width": width, "ratio": height / width, "fps": 24}
        told |= {"num_frames": clip.shape[1], "num_heads": HEADS, "input_sq_size": 64}
        network = branches(plain_transformers.stdit2, w, text(SPELLED), **told)
        return plain_samplers.iddpm(network, clip.double(), **options, scale=7.0, channels=3, float32_tables=True)

    files = {"transformer": folder, "autoencoder": frame_autoencoder_files[0], "text_encoder": text_folder}
    return load("opensora-1.1", **files), expected


def test_1_1(version_1_1, frame_autoencoder_files):
    pipeline, expected_latents = version_1_1
    noise = noise_of(2, 1, 4, 6, 3, 5)
    latents, frames = run(
        pipeline,
        PROMPT,
        **sized(SIZE, 6),
        nominal_size=NOMINAL_SIZE,
        num_inference_steps=8,
        latents=noise,
        generator=torch.Generator().manual_seed(9),
    )
    assert frames is not None
    expected = expected_latents(noise[0], NOMINAL_SIZE, draw=drawing(9, noise[0]), num_steps=8)
    assert_near(latents[0], expected)
    assert_near(frames[0], pixels(plain_autoencoder.decode_frames(frame_autoencoder_files[1], expected)))


def test_1_1_with_conditioning_frames(version_1_1, frame_autoencoder_files):
    """The end of one clip, made anew for 0.3 of the way, begins this one; a picture, kept, ends it."""
    strategy = "0,0,-2,0,2,0.3;0,1,0,-1,1"
    pipeline, expected_latents = version_1_1
    videos = [clip_of(3, 4, *SIZE), clip_of(4, 1, *SIZE)]
    noise = noise_of(5, 1, 4, 6, 3, 5)
    latents, frames = run(
        pipeline,
        PROMPT,
        **sized(SIZE, 6),
        nominal_size=NOMINAL_SIZE,
        num_inference_steps=10,
        latents=noise,
        conditioning=frame_conditioning(pipeline, noise[0], videos, strategy),
        generator=torch.Generator().manual_seed(10),
    )
    assert frames is not None
    kl = frame_autoencoder_files[1]
    references = [plain_autoencoder.encode_frames(kl, video.double()) for video in videos]
    clip, mask = plain_samplers.place(noise[0].double(), references, strategy)
    assert mask == [0.3, 0.3, 1, 1, 1, 0]
    expected = expected_latents(clip, NOMINAL_SIZE, draw=drawing(10, clip), num_steps=10, mask=mask)
    assert_near(latents[0], expected)
    assert_near(frames[0], pixels(plain_autoencoder.decode_frames(kl, expected)))


@pytest.mark.slow
def test_1_1_at_its_default_size(version_1_1):
    """Whatever is left out is as released: 16 frames of 240x424, which the network is told are 240x426."""
    pipeline, expected_latents = version_1_1
    noise = noise_of(6, 1, 4, 16, 30, 53)
    latents, _ = run(
        pipeline,
        PROMPT,
        num_inference_steps=2,
        latents=noise,
        generator=torch.Generator().manual_seed(11),
        output_type="latent",
    )
    assert_near(latents[0], expected_latents(noise[0], (240, 426), draw=drawing(11, noise[0]), num_steps=2))


# --- 1.2 --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def version_1_2(golden_json, tmp_path_factory, text_files) -> tuple[OpenSoraPipeline, Any]:
    """The pipeline, and a function that gives the expected latents of a clip."""
    keys = golden_json("checkpoint_keys/stdit3_xl2_v1_2")["keys"]
    folder = tmp_path_factory.mktemp("1.2")
    config = {"model_max_length": 80, "input_sq_size": 64, "skip_y_embedder": False, "only_train_temporal": False}
    transformer, autoencoder = folder / "OpenSora-STDiT-v3", folder / "OpenSora-VAE-v1.2"
    w = double(published_files.write_transformer(transformer, keys, "STDiT3", HEADS, **config))
    vae_keys = golden_json("checkpoint_keys/opensora_vae_v1_2")["keys"]
    spatial, temporal = (double(part) for part in published_files.write_video_autoencoder(autoencoder, vae_keys))
    text_folder, text = text_files

    def expected(
        clip: Tensor, nominal: tuple[int, int], num_frames: int, num_steps: int, spelled: str, **options: Any
    ) -> Tensor:
        height, width = nominal
        told: dict[str, Any] = {"height": height, "width": width, "fps": 24 if num_frames > 1 else 120}
        network = branches(plain_transformers.stdit3, w, text(spelled), num_heads=HEADS, input_sq_size=64, **told)
        times = [plain_samplers.shifted_time(1 - i / num_steps, height, width, num_frames) for i in range(num_steps)]
        timesteps = [1000 * t for t in times]
        return plain_samplers.rectified_flow(
            network, clip.double(), timesteps=timesteps, scale=7.0, channels=4, **options
        )

    files = {"transformer": transformer, "autoencoder": autoencoder, "text_encoder": text_folder}
    return load("opensora-1.2", **files), (expected, VideoFormulas(spatial, temporal))


class VideoFormulas:
    """The autoencoder of 1.2."""

    def __init__(self, spatial: dict[str, Tensor], temporal: dict[str, Tensor]) -> None:
        self.kl = plain_autoencoder.frame_autoencoder(spatial, **published_files.FRAMES_1_2)
        self.temporal = temporal
        self.shift, self.scale = (
            torch.tensor(values).double().view(4, 1, 1, 1) for values in (published_files.SHIFT, published_files.SCALE)
        )

    def encode(self, video: Tensor) -> Tensor:
        frames = plain_autoencoder.encode_frames(self.kl, video.double())
        z = plain_autoencoder.encode_time(frames, self.temporal, published_files.GROUPS_1_2)
        return plain_autoencoder.normalised(z, self.shift, self.scale)

    def decode(self, z: Tensor, num_frames: int) -> Tensor:
        z = plain_autoencoder.denormalised(z, self.shift, self.scale)
        frames = plain_autoencoder.decode_time(z, self.temporal, published_files.GROUPS_1_2, num_frames)
        return plain_autoencoder.decode_frames(self.kl, frames)


def no_noise() -> Tensor:
    raise AssertionError("rectified flow draws no noise where no frames are conditioned on")


@pytest.mark.parametrize(
    ("num_frames", "latent_frames", "scores", "spelled"),
    [
        (51, 15, {}, "a small dog runs over the grass aesthetic score: 6.5."),
        (1, 1, {"flow": 3.0}, "a small dog runs over the grass aesthetic score: 6.5. motion score: 3.0."),
    ],
)
def test_1_2(version_1_2, num_frames, latent_frames, scores, spelled):
    """A clip of three chunks, and an image; all channels are guided, times are shifted, scores are appended."""
    pipeline, (expected_latents, autoencoder) = version_1_2
    noise = noise_of(12, 1, 4, latent_frames, 3, 5)
    latents, frames = run(
        pipeline,
        PROMPT,
        **sized(SIZE, num_frames),
        nominal_size=NOMINAL_SIZE,
        num_inference_steps=5,
        latents=noise,
        scores=scores,
    )
    assert frames is not None
    expected = expected_latents(noise[0], NOMINAL_SIZE, num_frames, num_steps=5, spelled=spelled, draw=no_noise)
    assert_near(latents[0], expected)
    assert_near(frames[0], pixels(autoencoder.decode(expected, num_frames)))


def test_1_2_with_conditioning_frames(version_1_2):
    """A chunk kept at the beginning, and one made anew for 0.4 of the way that moves to where a chunk begins."""
    strategy = "0,0,0,0,5,0;0,1,4,8,5,0.4"
    pipeline, (expected_latents, autoencoder) = version_1_2
    videos = [clip_of(13, 17, *SIZE), clip_of(14, 34, *SIZE)]
    noise = noise_of(15, 1, 4, 15, 3, 5)
    latents, frames = run(
        pipeline,
        PROMPT,
        **sized(SIZE, 51),
        nominal_size=NOMINAL_SIZE,
        num_inference_steps=5,
        latents=noise,
        conditioning=frame_conditioning(
            pipeline, noise[0], videos, strategy, alignment=pipeline.config.frame_alignment
        ),
        generator=torch.Generator().manual_seed(16),
    )
    assert frames is not None
    clip, mask = plain_samplers.place(noise[0].double(), [autoencoder.encode(v) for v in videos], strategy, align=5)
    assert mask == [0] * 5 + [1] * 5 + [0.4] * 5
    spelled = "a small dog runs over the grass aesthetic score: 6.5."
    draw = drawing(16, clip)
    expected = expected_latents(clip, NOMINAL_SIZE, 51, num_steps=5, spelled=spelled, draw=draw, mask=mask)
    assert_near(latents[0], expected)
    assert_near(frames[0], pixels(autoencoder.decode(expected, 51)))


@pytest.mark.slow
def test_1_2_at_its_default_size(version_1_2):
    """Whatever is left out is as released: 51 frames of 240x424, which the network is told are 240x426."""
    pipeline, (expected_latents, _) = version_1_2
    noise = noise_of(17, 1, 4, 15, 30, 53)
    latents, _ = run(pipeline, PROMPT, num_inference_steps=2, latents=noise, output_type="latent")
    spelled = "a small dog runs over the grass aesthetic score: 6.5."
    expected = expected_latents(noise[0], (240, 426), 51, num_steps=2, spelled=spelled, draw=no_noise)
    assert_near(latents[0], expected)
