"""A family of networks that this package knows nothing of, brought by one module: this one, as users would write it.

Its text is states and one pooled vector, its guidance has three branches, its autoencoder knows 1, 4, 7, ... frames
only. An installed package declares it under `opensora.families`; here a folder on the search path stands for that.
Nothing of `opensora/` is touched, and everything works: generating, inspecting, planning, converting, training,
resuming, adapters, evaluation; see `docs/extending.md`."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin as ModelMixin
from tiny_pipeline import TEXT_WIDTH, make_text_encoder
from torch import Tensor, nn

from opensora import load_pipeline
from opensora.cli.main import main as opensora
from opensora.generation.engine import Engine
from opensora.generation.record import read_record
from opensora.generation.request import ClipRequest
from opensora.media.read import read_video
from opensora.models.autoencoders.codec import VideoCodec
from opensora.models.autoencoders.posterior import Posterior
from opensora.models.format import Format, TensorShapes
from opensora.models.guidance import GuidanceStep
from opensora.models.network import VideoTransformer
from opensora.models.offload_hooks import apply_offload_hooks
from opensora.models.schedulers.rectified_flow import RectifiedFlowScheduler
from opensora.models.text.conditioner import T5Conditioner, TextStates, TextTokens
from opensora.pipeline import OpenSoraPipeline
from opensora.toybox.captions import MAX_TOKENS, build_tokenizer

PROMPT = "a small red ball rolls left"


class PooledConditioner(T5Conditioner):
    """States of a T5 encoder and their mean; no text is zeros; a third branch reads the mean alone."""

    def encode_tokens(self, tokens: TextTokens) -> TextStates:
        text = super().encode_tokens(tokens)
        return TextStates(text.states, text.mask, pooled=text.states.mean(dim=1))

    def unconditional(self, text: TextStates) -> TextStates:
        assert text.pooled is not None
        return TextStates(text.states * 0, text.mask, pooled=text.pooled * 0)

    def blank_states(self, count: int, device: Any, dtype: torch.dtype) -> TextStates:
        text = super().blank_states(count, device, dtype)
        return TextStates(text.states, pooled=text.states[:, 0])

    def branches(self, text: TextStates, negative: TextStates | None) -> dict[str, TextStates]:
        pooled_alone = TextStates(text.states * 0, text.mask, pooled=text.pooled)
        return {**super().branches(text, negative), "pooled": pooled_alone}


class PooledGuidance:
    """null + s (text - null) + (pooled - null) / 2; the last step asks for the text alone."""

    def __init__(self, guider: Any, cfg_channels: Any, latent_channels: int) -> None:
        self.scale = guider.guidance_scale

    def branches(self, step: GuidanceStep) -> tuple[str, ...]:
        return ("text",) if step.index == step.num_steps - 1 else ("text", "null", "pooled")

    def combine(self, predictions: Mapping[str, Tensor], step: GuidanceStep) -> Tensor:
        if len(predictions) == 1:
            return predictions["text"]
        text, null, pooled = (predictions[name] for name in ("text", "null", "pooled"))
        return null + self.scale * (text - null) + (pooled - null) / 2

    def describe(self) -> dict[str, Any]:
        return {"guidance_scale": self.scale}


class TinyBlock(nn.Module):
    """A residual layer, modulated."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, width)

    def forward(self, hidden_states: Tensor, modulation: Tensor) -> Tensor:
        return hidden_states + torch.tanh(self.proj(hidden_states) + modulation)


class TinyNet(VideoTransformer):
    """Every latent cell by itself, told the time, the frame rate, the mean of the text and its pooled vector."""

    text_conditioner = PooledConditioner
    guidance_rule = PooledGuidance

    @register_to_config
    def __init__(
        self, in_channels: int = 3, width: int = 8, depth: int = 2, caption_channels: int = 16,
        model_max_length: int = MAX_TOKENS, pred_sigma: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.cell_in, self.told = nn.Linear(in_channels, width), nn.Linear(2, width)
        self.text_in, self.pooled_in = nn.Linear(caption_channels, width), nn.Linear(caption_channels, width)
        self.blocks = nn.ModuleList(TinyBlock(width) for _ in range(depth))
        self.cell_out = nn.Linear(width, in_channels)

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor | None = None, *_: Any,
        clip_conditions: Any, pooled_projections: Tensor | None = None, drop_text: Tensor | None = None,
        text_context: Any = None, **__: Any,
    ) -> Any:  # fmt: skip
        if text_context is not None:
            return self(hidden_states, timestep, **text_context, clip_conditions=clip_conditions)
        assert encoder_hidden_states is not None and pooled_projections is not None
        dtype = self.cell_in.weight.dtype
        kept = 1.0 if drop_text is None else (~drop_text)[:, None].to(dtype)
        text = self.text_in(encoder_hidden_states.mean(1).to(dtype) * kept)
        text = text + self.pooled_in(pooled_projections.to(dtype) * kept)
        fps = torch.as_tensor(clip_conditions.fps, device=hidden_states.device).expand(len(hidden_states))
        told = self.told(torch.stack([timestep.expand(len(fps)) / 1000, fps / 24], dim=1).to(dtype))
        cells = self.cell_in(hidden_states.movedim(1, -1).to(dtype))
        for block in self.blocks:
            cells = block(cells, (text + told)[:, None, None, None])
        return Transformer2DModelOutput(sample=self.cell_out(cells).movedim(-1, 1))


class TinyFormat(Format):
    """How its files are known, and what adapters change."""

    cls, kind, summary = TinyNet, "transformer", "transformer of a tiny family"
    prefixes, lora_targets = ("cell_in.", "pooled_in."), ("proj",)

    def read_shapes(self, shapes: TensorShapes) -> tuple[dict[str, Any], dict[str, str]]:
        config = {"width": shapes.size("cell_in.weight", 0), "caption_channels": shapes.size("text_in.weight", 1)}
        return {**config, "depth": shapes.count("blocks")}, {"model_max_length": "shapes do not tell"}


class Thirds(VideoCodec):
    """The first frame, then means of three, in cells of 8 x 8 pixels."""

    frame_multiple, frame_offset = 3, 1

    @register_to_config
    def __init__(self, gain: float = 1.5) -> None:
        super().__init__()
        self.latent_channels, self.spatial_factor, self.temporal_factor = 3, 8, 3
        self.factor = nn.Parameter(torch.tensor(gain))

    def latent_frames(self, num_frames: int) -> int:
        return 1 + (self.size_rule().frames_from(num_frames) - 1) // 3

    @apply_offload_hooks
    def posterior(self, video: Tensor) -> Posterior:
        before = video[:, :, :1].expand(-1, -1, 2, -1, -1)  # so that the first frame is a third of its own
        mean = F.avg_pool3d(torch.cat([before, video], dim=2).float(), (3, 8, 8)) * self.factor.float()
        return Posterior(mean, torch.full_like(mean, -6.0))

    @apply_offload_hooks
    def decode_latents(self, latents: Tensor, num_frames: int) -> Tensor:
        return F.interpolate(latents.float() / self.factor.float(), scale_factor=(3, 8, 8))[:, :, 2:]


class ThirdsFormat(Format):
    """A codec with one number for weights."""

    cls, kind, summary, prefixes = Thirds, "autoencoder", "autoencoder of a tiny family", ("factor",)


FORMATS = (TinyFormat(), ThirdsFormat())


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A saved pipeline of the family, in the current folder; this module is declared as a package would do it."""
    (declared := tmp_path / "site" / "tiny_family-1.dist-info").mkdir(parents=True)
    (declared / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-family\nVersion: 1\n")
    (declared / "entry_points.txt").write_text("[opensora.families]\ntiny = test_new_family:FORMATS\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.chdir(tmp_path)
    import test_new_family as family

    torch.manual_seed(0)
    pipeline = OpenSoraPipeline(
        family.TinyNet(caption_channels=TEXT_WIDTH), RectifiedFlowScheduler(), family.Thirds(), make_text_encoder(),
        build_tokenizer(), guidance_scale=3.0, num_inference_steps=3, height=16, width=24, num_frames=7, fps=8,
    )  # fmt: skip
    pipeline.save_pretrained("tiny")
    return Path("tiny")


def test_it_generates(folder, capsys):
    made = Engine.load(ClipRequest(prompt=PROMPT, model=str(folder))).generate(ClipRequest(prompt=PROMPT, seed=3))
    assert len(made.frames) == 7
    assert opensora(["generate", PROMPT, "--model", str(folder), "--seed", "3", "--output", "a.png"]) == 0
    assert (read_video("a.png")[0] == made.frames).all()
    assert read_record("a.png").model == "tiny"
    assert opensora(["generate", PROMPT, "--model", str(folder), "--num-frames", "8"]) == 2
    assert "7 or 10" in capsys.readouterr().err
    assert opensora(["generate", "--from", "a.png", "--model", str(folder), "--output", "b.png"]) == 0
    assert (read_video("b.png")[0] == made.frames).all()
    pipe, options = load_pipeline(folder), {"generator": 5, "output_type": "latent"}
    together, pipe.sequential_guidance = pipe(PROMPT, **options).frames, True
    torch.testing.assert_close(pipe(PROMPT, **options).frames, together)


def test_it_is_inspected_planned_and_converted(folder, capsys):
    assert opensora(["inspect", str(folder), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert not report["problems"] and report["components"]["transformer"]["class_name"] == "TinyNet"
    assert opensora(["inspect", f"{folder}/transformer/diffusion_pytorch_model.safetensors"]) == 0
    assert "transformer of a tiny family" in capsys.readouterr().out
    assert opensora(["plan", "--model", str(folder), "--device-memory", "8GB"]) == 0
    assert "denoise" in capsys.readouterr().out
    assert opensora(["convert", str(folder), "converted", "--dtype", "bfloat16"]) == 0
    assert load_pipeline("converted").transformer.config.width == 8


LOOP = ("loop.log_every=1", "loop.checkpoint_every=1", "loop.preview_every=0", "loop.ema_decay=0.5")


def train(*settings: str) -> int:
    data = {"type": "ToyboxLatents", "clips": {"num_frames": 7, "height": 16, "width": 24}, "batch_size": 2}
    parts = ("objective.init_from=tiny", "objective.autoencoder=tiny", "objective.transformer=null")
    text = {"type": "FrozenText", "origin": "tiny"}
    parts += tuple(f"objective.defaults.{name}={value}" for name, value in data["clips"].items())
    given = (f"objective.data={json.dumps(data)}", f"objective.text={json.dumps(text)}", *parts, *LOOP)
    return opensora(["train", "v1_2_debug", *given, *settings, "--device", "cpu"])


@pytest.mark.slow
def test_it_is_trained_resumed_and_evaluated(folder, capsys):
    assert train("loop.steps=2", "--output", "whole") == 0
    shutil.copytree("whole", "parts", ignore=shutil.ignore_patterns("model", "step-*2"))  # as if killed after a step
    assert train("loop.steps=2", "--output", "parts") == 0
    whole, parts = (load_pipeline(f"{run}/model").transformer.state_dict() for run in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    before = load_pipeline(folder).transformer.state_dict()
    assert not all(torch.equal(whole[name], before[name]) for name in whole)
    size = ["--sizes", "16x24", "--lengths", "7", "--num-clips", "2", "--device", "cpu", "--output", "loss.json"]
    assert opensora(["evaluate", "loss", "whole/model", *size]) == 0
    assert json.loads(Path("loss.json").read_text())["figures"]["loss_16x24_7f"]["clips"] == 2


@pytest.mark.slow
def test_an_adapter_is_trained_beside_it(folder):
    lora = json.dumps({"type": "LoRAConfig", "rank": 2})
    assert train("loop.steps=2", f"objective.train={lora}", "--output", "adapted") == 0
    options = {"generator": 5, "output_type": "latent"}
    plain, adapted = (load_pipeline(folder, adapters=a)(PROMPT, **options) for a in ({}, {Path("adapted/model"): 1.0}))
    assert not torch.equal(plain.frames, adapted.frames)
