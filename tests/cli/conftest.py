"""A pipeline that paints seeded noise, in place of loading a model."""

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from opensora.checkpoints import loading
from opensora.checkpoints.source import ModelSource
from opensora.errors import OpenSoraError
from opensora.geometry import SizeRule
from opensora.sampling.prompting import PromptingMixin


class NoisePipeline:
    """What `generate` asks of a pipeline; every call is kept."""

    rated_scores = PromptingMixin.rated_scores

    def __init__(self):
        self.config = SimpleNamespace(
            fps=8,
            num_frames=5,
            height=16,
            width=16,
            num_inference_steps=3,
            guidance_scale=3.0,
            guidance_options=None,
            cfg_channels=None,
            frame_interval=1,
            distilled_from=None,
            nominal_size=None,
            aspect_ratio_order="width:height",
            clip_frames=None,
            clip_s=2,
            scores=None,
            frame_alignment=None,
            condition_frames=2,
        )
        self.rule = SizeRule(spatial_multiple=8, frame_multiple=4, frame_offset=1, max_frames=65)
        self.device = torch.device("cpu")
        self.autoencoder = SimpleNamespace(latent_frames=lambda num_frames: num_frames, latent_channels=4)
        self.transformer = SimpleNamespace(known_frames_alone=False, carries_latents=False, reads_guidance=False)
        self.text_conditioner = SimpleNamespace(check_words=lambda texts: None)
        self.num_timesteps = 3
        self.sequential_guidance = False
        self.calls = []
        self.fail_at_step = None
        self.nan = False
        self.error = None

    @property
    def default_cfg_channels(self):
        return self.config.cfg_channels

    def on_device(self, name):
        return contextlib.nullcontext()

    def size_rule(self):
        return self.rule

    def set_progress_bar_config(self, **_):
        pass

    def spell(self, prompts, scores=None):
        return list(prompts)

    def spell_negative(self, negatives):
        return list(negatives)

    def text_notes(self, prompts, negatives=(), scores=None):
        return []

    def encode_prompt(self, prompts, negative_prompt, *, scores):
        return SimpleNamespace(prompt=prompts[0], scores=scores), negative_prompt

    def __call__(
        self, *, prompt_embeds, negative_prompt_embeds, generator, output_type, callback_on_step_end, **sampling
    ):
        self.calls.append(SimpleNamespace(**vars(prompt_embeds), negative_prompt=negative_prompt_embeds, **sampling))
        assert output_type == "pt"
        if self.error:
            raise self.error
        for step in range(3):
            if step == self.fail_at_step:
                raise KeyboardInterrupt
            callback_on_step_end(self, step, step, {})
        size = (1, sampling["num_frames"], 3, sampling["height"], sampling["width"])
        frames = torch.rand(size, generator=generator[0])
        frames = frames * (np.nan if self.nan else 1)
        return SimpleNamespace(frames=frames, settings={"dtype": "float32"}, num_evaluations=6, num_forecast=0)


@pytest.fixture
def pipe(monkeypatch, tmp_path):
    """The fake, in place of loading; the current folder is a fresh one."""
    fake = NoisePipeline()

    def find(name, components=None, *, download=False):
        if name not in ("toybox", "toybox-iddpm", "other", "/home/somebody/other"):
            raise OpenSoraError(f"unknown model {name!r}; known are toybox, toybox-iddpm")
        return SimpleNamespace(hash=lambda: fake.hash, folder=None)

    def load_pipeline(name, *, device, dtype, override_latent_space, components, adapters, offload):
        fake.asked = SimpleNamespace(name=name, device=str(device), dtype=dtype, components=components)
        return fake

    fake.hash = "a" * 64
    monkeypatch.setattr(ModelSource, "find", find)
    monkeypatch.setattr(loading, "load_pipeline", load_pipeline)
    monkeypatch.chdir(tmp_path)
    return fake
