"""What was made for the witnesses, said so that it can be made again; and the few calls that making it needs."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

HERE = Path(__file__).parent
BALL, RING = "a small red ball rolls left", "a large blue ring grows over the grass"
SMALL: dict[str, Any] = {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 6}


# --- latents ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LatentsCase:
    """One call of a pipeline, with `image` the first frame given, with `sampler` another sampler."""

    model: str
    prompts: tuple[str, ...] = (BALL,)
    seeds: tuple[int, ...] = (0,)
    options: dict[str, Any] = field(default_factory=dict)
    image: bool = False
    sampler: str | None = None


LATENTS = {
    "flow": LatentsCase("toybox"),
    "flow_other": LatentsCase("toybox", (RING,), (7,), {"num_inference_steps": 10}),
    "flow_batch": LatentsCase("toybox", (BALL, RING), (1, 2), SMALL),
    "flow_negative": LatentsCase("toybox", options={**SMALL, "negative_prompt": RING}),
    "flow_unguided": LatentsCase("toybox", options={**SMALL, "guidance_scale": 1.0}),
    "flow_channels": LatentsCase("toybox", options={**SMALL, "cfg_channels": [0, 2], "guidance_scale": 6.0}),
    "flow_image": LatentsCase("toybox", options={"num_inference_steps": 8}, image=True),
    "flow_34": LatentsCase("toybox", (RING,), (3,), {**SMALL, "num_frames": 34}),
    "flow_fps": LatentsCase("toybox", options={**SMALL, "fps": 12, "height": 48}),
    "iddpm": LatentsCase("toybox-iddpm", options={"num_inference_steps": 20}),
    "iddpm_other": LatentsCase("toybox-iddpm", (RING,), (7,), SMALL),
    "iddpm_batch": LatentsCase("toybox-iddpm", (BALL, RING), (1, 2), SMALL),
    "iddpm_negative": LatentsCase("toybox-iddpm", options={**SMALL, "negative_prompt": RING}),
    "iddpm_unguided": LatentsCase("toybox-iddpm", options={**SMALL, "guidance_scale": 1.0}),
    "iddpm_all_channels": LatentsCase("toybox-iddpm", options={**SMALL, "cfg_channels": None}),
    "iddpm_ddim": LatentsCase("toybox-iddpm", options=SMALL, sampler="ddim"),
    "iddpm_respaced": LatentsCase("toybox-iddpm", options={**SMALL, "num_inference_steps": "ddim10"}),
    "iddpm_image": LatentsCase("toybox-iddpm", options={"num_inference_steps": 8}, image=True),
    "iddpm_34": LatentsCase("toybox-iddpm", (RING,), (3,), {**SMALL, "num_frames": 34}),
    "dpm_solver": LatentsCase("toybox-iddpm", options={"num_inference_steps": 10}, sampler="dpm-solver++"),
    "dpm_solver_negative": LatentsCase(
        "toybox-iddpm", options={**SMALL, "negative_prompt": RING}, sampler="dpm-solver++"
    ),
    "dpm_solver_image": LatentsCase("toybox-iddpm", options=SMALL, image=True, sampler="dpm-solver++"),
}
for _family in ("1.0", "1.1", "1.2"):  # saved in `models/`
    LATENTS |= {
        f"saved_{_family}": LatentsCase(_family),
        f"saved_{_family}_other": LatentsCase(_family, (BALL, RING), (4, 5), {"height": 24, "num_frames": 6}),
        f"saved_{_family}_image": LatentsCase(_family, image=True),
    }
MODELS = {case.model: HERE / "models" / case.model for case in LATENTS.values() if case.model[0].isdigit()}
LOOPS = {"loops_flow": ("toybox", "|0|" + BALL + "|1|" + RING), "loops_iddpm": ("toybox-iddpm", BALL)}


def load(model: str) -> Any:
    from opensora import load_pipeline

    pipeline = load_pipeline(MODELS.get(model, model))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_latents(case: LatentsCase) -> Tensor:
    """(B, C, T', H', W')"""
    pipeline = load(case.model)
    if case.sampler:
        pipeline.use_sampler(case.sampler)
    options = dict(case.options)
    if case.image:
        options |= image_conditioning(pipeline, options)
    generators = [torch.Generator().manual_seed(seed) for seed in case.seeds]
    return pipeline(list(case.prompts), generator=generators, output_type="latent", **options).frames


def picture(height: int, width: int) -> Tensor:
    """A red disc on blue, (3, 1, height, width) in [-1, 1]."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    disc = (x.square() + y.square() < 0.3).float() * 2 - 1
    return torch.stack([disc, torch.full_like(disc, -0.8), -disc])[:, None]


# The two below name what is called; should that change, they change, and the witnesses stay.


def image_conditioning(pipeline: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Keywords of a call that begins with `picture`."""
    from opensora.conditioning.frames import condition
    from opensora.geometry import VideoSize

    told = [options.get(name, pipeline.config[name]) for name in ("num_frames", "height", "width")]
    size = VideoSize(*told)
    return {"conditioning": condition(pipeline.autoencoder, size, image=picture(size.height, size.width))}


def make_loops(model: str, prompt: str) -> Tensor:
    """Two clips of 5 frames, of which the second goes on from the first; (1, T, 3, H, W) in 0..1."""
    from opensora.generation.loops import generate_loops
    from opensora.geometry import VideoSize

    generator = torch.Generator().manual_seed(0)
    size = VideoSize(5, 24, 24)
    options: dict[str, Any] = {"num_loops": 2, "condition_frames": 1, "num_inference_steps": 6}
    return generate_loops(load(model), prompt, size=size, generator=generator, **options).frames


# --- clips of the command line, by the name of their file in `clips/` -------------------------------------------------

_TINY = ("--height", "24", "--width", "32", "--num-frames", "9", "--num-sampling-steps", "6")
_SAVED = ("--num-sampling-steps", "3")
CLIPS: dict[str, tuple[str, ...]] = {
    "plain.png": (BALL, *_TINY),
    "plain.mp4": (RING, "--num-sampling-steps", "6", "--seed", "3"),
    "negative.png": (BALL, "--model", "toybox-iddpm", "--negative-prompt", RING, "--cfg-scale", "2", *_TINY),
    "solver.png": (BALL, "--model", "toybox-iddpm", "--sampler", "dpm-solver++", *_TINY),
    "image.png": (BALL, "--image", "given/picture.png", *_TINY),
    "extended.png": (BALL, "--extend", "given/plain.mp4", *_TINY),
    "edited.png": (RING, "--edit", "given/plain.mp4", "--strength", "0.5", *_TINY),
    "references.png": (
        *(BALL, "--reference-path", "given/picture.png;given/plain.mp4"),
        *("--mask-strategy", "0,0,0,0,1,0;0,1,2,2,1,0.3", *_TINY),
    ),
    "loops.png": (f"|0|{BALL}|1|{RING}", "--loop", "2", "--condition-frame-length", "1", *_TINY),
    "adapter.png": (BALL, "--adapter", "adapter:0.5", *_TINY),
    "scores.png": (BALL, "--model", "models/1.2", "--aes", "6", "--flow", "3", "--camera-motion", "pan left", *_SAVED),
    "scores_off.png": (BALL, "--model", "models/1.2", "--aes", "none", "--frame-interval", "2", *_SAVED),
    "saved_1.0.png": (BALL, "--model", "models/1.0", *_SAVED),
    "saved_1.1.png": (BALL, "--model", "models/1.1", "--fps", "12", *_SAVED),
}
# What a record cannot hold: where files are that a clip was made with.
PLACES = ("--model", "--image", "--extend", "--edit", "--reference-path", "--adapter")


def places(arguments: tuple[str, ...]) -> list[str]:
    """The arguments that say where something is."""
    return [word for pair in pairwise(arguments) if pair[0] in PLACES for word in pair]


# --- runs, by the name of their folder in `runs/` ---------------------------------------------------------------------

_LOOP = ("loop.steps=4", "loop.checkpoint_every=2", "loop.log_every=1", "loop.preview_every=0")
_LOOP += ("loop.optimizer.warmup_steps=1", "objective.export_dtype=float32")
_NETWORK = ("hidden_size=12", "depth=1", "num_heads=1", "mlp_ratio=1", "model_max_length=8")
_NETWORK = tuple(f"objective.transformer.{setting}" for setting in _NETWORK)
_TOYS = ("objective.data.clips.height=16", "objective.data.clips.width=16", "objective.data.num_clips=4")


def _frozen(model: str, text: str = "FrozenText") -> tuple[str, ...]:
    """Settings that take all but the transformer from a saved model: random weights would differ in their bits."""
    origin = f'objective.text={{"type": "{text}", "origin": "{model}"}}'
    return (f"objective.autoencoder={model}", origin, "objective.transformer.caption_channels=16")


_BUCKETS = '"buckets": {"16x16": {"9": [1.0, 1]}}, "batches_in_a_row": 1'
_CLIPS = f'objective.data={{"type": "ManifestClips", "manifest": "clips.csv", "num_workers": 0, {_BUCKETS}}}'
_VAE = {
    "autoencoder": '{"spatial": {"block_out_channels": [4], "layers_per_block": 1, "norm_num_groups": 2}, '
    '"spatial_patch_size": 4, "temporal": {"type": "folded", "dim": 4, "encoder_depth": 1, "decoder_depth": 1}}',
    "num_clips": "4",
    "frames_per_clip": "2",
    "data.batch_size": "1",
    "data.clips.height": "16",
    "data.clips.width": "16",
    "data.clips.num_frames": "5",
}
_VAE = tuple(f"objective.{name}={value}" for name, value in _VAE.items())
PRECOMPUTE = (_CLIPS, *_frozen("models/1.2"), "objective.transformer.model_max_length=8")

RUNS: dict[str, tuple[str, ...]] = {
    "flow": (
        *("v1_2_debug", *_LOOP, *_NETWORK, *_TOYS, *_frozen("models/1.2")),
        "objective.transformer.hidden_size=8",
    ),
    "iddpm": ("v1_1_debug", *_LOOP, *_NETWORK, *_TOYS, *_frozen("models/1.1")),
    "iddpm_1.0": ("v1_0_debug", *_LOOP, *_NETWORK, *_TOYS, *_frozen("models/1.0")),
    "cached": (
        *("v1_2_debug", *_LOOP, *_NETWORK, *_frozen("models/1.2", "CachedText")),
        'objective.data={"type": "CachedLatents", "folder": "cache", "batches_in_a_row": 1}',
    ),
    "autoencoder": ("toybox_vae_frames", *(s for s in _LOOP if "export" not in s), *_VAE, "loop.ema_decay=0"),
    "adapter": (
        *("toybox_lora", *_LOOP, _CLIPS, "loop.precision=fp32"),
        *('objective.train.targets=["attn.proj"]', "objective.train.rank=1"),
    ),
}
STOPPED_RUNS = ("flow", "iddpm_1.0", "autoencoder", "adapter")  # the others are to begin anew
CAPTIONS = {"0.mp4": BALL, "1.mp4": RING, "2.mp4": "a small green square moves up"}


def trained_weights(run: Path) -> Path:
    """The file of what a run trained."""
    (file,) = [*(run / "model" / "transformer").glob("*.safetensors"), *(run / "model").glob("*.safetensors")]
    return file


LOSSES = ("--sizes", "32x32", "--lengths", "1", "9", "--num-clips", "2", "--batch-size", "2", "--device", "cpu")
LOSSES_OF = {"flow.json": "toybox", "iddpm.json": "toybox-iddpm", "saved_1.1.json": "models/1.1"}


# What the weights that come with the package decide; all else is of random weights saved in `models/`, or of none.
OF_WEIGHTS = {
    "latents": [name for name, case in LATENTS.items() if case.model not in MODELS],
    "loops": list(LOOPS),
    "runs": ["adapter"],
    "clips": [name for name, words in CLIPS.items() if not any(word.startswith("models/") for word in words)],
    "losses": [name for name, model in LOSSES_OF.items() if not model.startswith("models/")],
}


# --- the same bits, or nearly -----------------------------------------------------------------------------------------


@contextmanager
def one_thread() -> Iterator[None]:
    """Bits depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().cpu().numpy().tobytes()).hexdigest()


def sha256_of_all(tensors: dict[str, Tensor]) -> str:
    return hashlib.sha256("".join(f"{name} {sha256(tensors[name])} " for name in sorted(tensors)).encode()).hexdigest()


def arithmetic() -> dict[str, str]:
    """What decides the bits besides our code: libraries, and what this processor makes of operations we use."""
    with one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        results = [result.double() for result in _operations()]
    libraries = {name: metadata.version(name) for name in ("torch", "transformers", "diffusers", "av")}
    digest = hashlib.sha256("".join(map(sha256, results)).encode()).hexdigest()
    return {**libraries, "operations": digest, "capability": torch.backends.cpu.get_cpu_capability()}


def _operations() -> Iterator[Tensor]:
    x, weight = torch.randn(2, 80, 192), torch.randn(576, 192) * 0.07
    for rows in (1, 2, 16, 80):
        yield functional.linear(x[:, :rows], weight, torch.randn(576))
        yield functional.linear(torch.randn(2, rows, 768), torch.randn(192, 768))
    yield functional.linear(x.bfloat16(), weight.bfloat16())
    yield functional.layer_norm(x, (192,), eps=1e-6)
    yield functional.gelu(x, approximate="tanh")
    for function in (functional.silu, functional.gelu, torch.exp, torch.sin, torch.cos, torch.sigmoid, torch.tanh):
        yield function(x)
    yield torch.softmax(x, dim=-1)
    yield x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
    for length in (5, 16, 24):
        q, k, v = torch.randn(3, 10, 4, length, 48)
        yield functional.scaled_dot_product_attention(q, k, v)
        yield functional.scaled_dot_product_attention(q, k, v, attn_mask=torch.ones(length, length).tril().bool())
        yield torch.matmul(q, k.transpose(-1, -2))
    yield functional.conv3d(torch.randn(1, 4, 5, 8, 8), torch.randn(16, 4, 3, 3, 3), padding=1)
    for size in (8, 32):
        yield functional.conv2d(torch.randn(9, 32, size, size), torch.randn(64, 32, 3, 3), padding=1)
    yield functional.group_norm(torch.randn(9, 32, 8, 8), 8)
    trained = torch.nn.Sequential(torch.nn.Linear(192, 48), torch.nn.LayerNorm(48), torch.nn.GELU())
    trained(x).square().mean().backward()
    yield from (parameter.grad for parameter in trained.parameters() if parameter.grad is not None)
