"""What comes out of every pipeline, its copies, its files, and its autoencoder by its other name."""

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import dynamic_modules_utils, export_to_video, export_utils
from published_pipelines import OTHER, PIPELINES, PROMPT, equal, near, pipeline_of, refusal, sample
from tiny_pipeline import seeded

from opensora.checkpoints.loading import load_pipeline
from opensora.models.autoencoders.causal import CausalVideoAutoencoder
from opensora.pipeline import OpenSoraPipeline

# ---- what comes out -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_output_types_hold_the_same_video(kept):
    video, array, images, latents = (sample(kept, output_type=kind) for kind in ("pt", "np", "pil", "latent"))
    assert video.shape == (1, kept.config.num_frames, 3, 32, 48) and video.dtype == torch.float32
    assert isinstance(array, np.ndarray)
    equal(torch.tensor(array).movedim(-1, 2), video)
    pixels = np.stack([np.asarray(image) for image in images[0]])
    assert np.array_equal(pixels, (array[0] * 255).round().astype(np.uint8))
    equal(kept.decode(latents, kept.config.num_frames), video)
    as_tuple = sample_tuple(kept)
    assert isinstance(as_tuple, tuple) and len(as_tuple) == 1
    assert "output_type is 'mp4'" in refusal(kept, output_type="mp4")


def sample_tuple(pipe: OpenSoraPipeline) -> Any:
    return pipe(PROMPT, generator=seeded(1), return_dict=False)


@pytest.mark.parametrize("output_type", [None, "np"])
def test_export_to_video_is_given_the_pixels_of_the_video(kept, output_type, monkeypatch):
    """Up to the codec, which is another program."""
    written: list[np.ndarray] = []

    class Writer:
        def append_data(self, frame: np.ndarray) -> None:
            written.append(np.asarray(frame))

        def __enter__(self) -> "Writer":
            return self

        def __exit__(self, *_: object) -> None:
            pass

    plugins = SimpleNamespace(ffmpeg=SimpleNamespace(get_exe=lambda: "ffmpeg"))
    fake = SimpleNamespace(plugins=plugins, get_writer=lambda *_, **__: Writer())
    monkeypatch.setitem(sys.modules, "imageio", fake)
    monkeypatch.setattr(export_utils, "is_imageio_available", lambda: True)
    kinds = {} if output_type is None else {"output_type": output_type}
    frames = kept(PROMPT, generator=seeded(1), **kinds).frames[0]
    export_to_video(frames, "clip.mp4", fps=8)
    exact = sample(kept, output_type="np")[0] * 255
    assert len(written) == len(exact) and all(frame.dtype == np.uint8 for frame in written)
    # diffusers rounds arrays down.
    assert np.abs(np.stack(written) - exact).max() <= (0.5 if output_type is None else 1) + 1e-4


# ---- copies and files -----------------------------------------------------------------------------------------------


def defaults_of(pipe: OpenSoraPipeline) -> dict[str, Any]:
    return {name: value for name, value in dict(pipe.config).items() if not name.startswith("_")}


CHANGED: dict[str, Any] = {"guidance_scale": 2.5, "cfg_channels": [0, 2], "height": 16, "num_frames": 0, "fps": 9}


def changed(kind: str) -> dict[str, Any]:
    """For a pipeline of this kind, at a number of frames that its autoencoder makes."""
    return CHANGED | {"num_frames": {"1.3, flow": 17, "2.0, flow": 9, "2.0, DC-AE": 4}.get(kind, 3)}


def with_own_defaults(kind: str) -> OpenSoraPipeline:
    """A pipeline none of whose defaults are those of the class."""
    name, sampler = PIPELINES[kind]
    pipe = pipeline_of(name, sampler, **changed(kind))
    space = pipe.autoencoder.latent_space.to_dict()
    pipe.register_to_config(trained_on={"latent_space": space, "autoencoder": "a" * 64})
    return pipe


COPIES: dict[str, Callable[[OpenSoraPipeline], OpenSoraPipeline]] = {
    "components": lambda pipe: OpenSoraPipeline(**pipe.components),
    "from_pipe": OpenSoraPipeline.from_pipe,
    "from_pipe and back": lambda pipe: OpenSoraPipeline.from_pipe(OpenSoraPipeline.from_pipe(pipe)),
}


@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.parametrize("kind", PIPELINES)
def test_copies_keep_the_models_defaults_and_share_its_networks(kind, copy):
    pipe = with_own_defaults(kind)
    made = COPIES[copy](pipe)
    made.set_progress_bar_config(disable=True)
    assert defaults_of(made) == defaults_of(pipe)
    assert {name: dict(made.config)[name] for name in CHANGED} == changed(kind)
    assert all(made.networks[name] is part for name, part in pipe.networks.items())
    equal(sample(made), sample(pipe))


def test_a_copy_may_differ_and_leaves_the_first_as_it_was(kept):
    before, expected = defaults_of(kept), sample(kept)
    made = OpenSoraPipeline.from_pipe(kept, guidance_scale=1.0)
    assert defaults_of(made) == before | {"guidance_scale": 1.0} and defaults_of(kept) == before
    made.set_progress_bar_config(disable=True)
    equal(sample(made), sample(kept, guidance_scale=1.0))
    equal(sample(kept), expected)


def test_a_copy_of_an_offloaded_pipeline_is_offloaded(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    away = load_pipeline(tmp_path, offload=True)
    away.sequential_guidance = True
    made = OpenSoraPipeline.from_pipe(away)
    made.set_progress_bar_config(disable=True)
    assert made.sequential_guidance
    near(sample(made), sample(pipe))


@pytest.mark.parametrize("kind", PIPELINES)
@pytest.mark.parametrize("way", ["from_pretrained", "DiffusionPipeline", "load_pipeline"])
def test_saved_and_loaded(kind, way, tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    pipe = with_own_defaults(kind)
    folder = tmp_path / "saved"
    pipe.save_pretrained(folder)
    ways: dict[str, Callable[..., Any]] = {
        "from_pretrained": OpenSoraPipeline.from_pretrained,
        "DiffusionPipeline": lambda path, **how: DiffusionPipeline.from_pretrained(path, trust_remote_code=True, **how),
        "load_pipeline": lambda path, torch_dtype=None: load_pipeline(path, dtype=torch_dtype),
    }
    loaded = ways[way](folder)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is OpenSoraPipeline and type(loaded.scheduler) is type(pipe.scheduler)
    assert defaults_of(loaded) == defaults_of(pipe)
    near(sample(loaded), sample(pipe))
    half = ways[way](folder, torch_dtype=torch.bfloat16)
    half.set_progress_bar_config(disable=True)
    dtypes = {name: getattr(half, name).dtype for name in ("transformer", "autoencoder", "text_encoder")}
    assert dtypes == dict.fromkeys(dtypes, torch.bfloat16) and half.dtype == torch.bfloat16
    latents = sample(half)
    assert latents.dtype == torch.float32 and torch.isfinite(latents).all()


def test_cast_as_a_whole(pipe):
    expected = sample(pipe)
    latents = sample(pipe.to(torch.bfloat16))
    assert pipe.dtype == torch.bfloat16 and latents.dtype == torch.float32
    assert 0 < (latents - expected).abs().max() < expected.abs().max()


# ---- the autoencoder ------------------------------------------------------------------------------------------------


def test_the_autoencoder_is_also_the_vae(pipe):
    assert pipe.vae is pipe.autoencoder
    prompts, seeds = [PROMPT, OTHER], (1, 2)
    whole = sample(pipe, prompts, output_type="pt", generator=seeded(*seeds))
    pipe.enable_vae_slicing()
    assert pipe.vae.use_slicing
    near(sample(pipe, prompts, output_type="pt", generator=seeded(*seeds)), whole)
    pipe.disable_vae_slicing()
    if isinstance(pipe.vae, CausalVideoAutoencoder):  # its convolutions work in portions, without tiles
        return
    pipe.enable_vae_tiling()
    assert pipe.vae.use_tiling
    tiles = sample(pipe, prompts, output_type="pt", generator=seeded(*seeds))
    assert tiles.shape == whole.shape and torch.isfinite(tiles).all()
    pipe.disable_vae_tiling()
    assert not pipe.vae.use_tiling and not pipe.vae.use_slicing
    equal(sample(pipe, prompts, output_type="pt", generator=seeded(*seeds)), whole)
