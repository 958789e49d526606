"""Every training objective at a size at which a step takes milliseconds."""

import dataclasses
from pathlib import Path
from typing import Any

from tiny_pipeline import make_autoencoder

from opensora.data.clips import ManifestClips
from opensora.data.toybox import ToyboxClips, ToyboxLatents, ToyboxVideos
from opensora.manifest import ClipRow, write_manifest
from opensora.media.write import write_video
from opensora.recipes import debug, v2_0
from opensora.toybox.captions import plain_caption
from opensora.toybox.specs import sample_specs
from opensora.toybox.world import render
from opensora.training.diffusion.config import DiffusionTaskConfig
from opensora.training.diffusion.noise import IDDPM, Flow
from opensora.training.diffusion.previews import JudgedPrompts
from opensora.training.diffusion.text import TrainedText
from opensora.training.parts import Untrained
from opensora.training.vae.config import VAETaskConfig

CLIPS = ToyboxClips(num_frames=5, height=16, width=24)
AUTOENCODER: dict[str, Any] = {
    "spatial": {"block_out_channels": [8, 8], "layers_per_block": 1, "norm_num_groups": 4},
    "spatial_patch_size": 4,
    "temporal": {"type": "folded", "dim": 16, "encoder_depth": 1, "decoder_depth": 1},
}
TRANSFORMER = {"hidden_size": 48, "depth": 1, "num_heads": 2, "caption_channels": 16, "model_max_length": 24}
TEXT_ENCODER = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
DEFAULTS = {"num_inference_steps": 2}


def diffusion_config(kind: str, folder: Path, **changes: Any) -> DiffusionTaskConfig:
    """ "flow" or "iddpm", on the latents of an autoencoder saved in `folder`."""
    autoencoder = folder / "autoencoder"
    if not autoencoder.exists():
        make_autoencoder().save_pretrained(autoencoder)
    options: dict[str, Any] = {
        "data": ToyboxLatents(CLIPS, num_clips=6, batch_size=3),
        "diffusion": Flow() if kind == "flow" else IDDPM(),
        "autoencoder": str(autoencoder),
        "text": TrainedText(TEXT_ENCODER),
        "transformer": TRANSFORMER | {"learn_null_text": True},
        "drop_text": 0.5,
        "object_weight": 5.0,
        "preview": JudgedPrompts(2),
        "export_dtype": "float32",
        "defaults": DEFAULTS,
    }
    return DiffusionTaskConfig(**options | changes)


FAMILY = {
    "1.0": ("opensora-1.0-16x256x256", IDDPM()),
    "1.1": ("opensora-1.1-stage3", IDDPM(float32_tables=True)),
    "1.2": ("opensora-1.2", Flow(time_shift=True)),
    "1.3": ("opensora-1.3", Flow(time_shift=True, shift_frames="after_first")),
    "2.0": ("opensora-2.0", v2_0.DIFFUSION),
    "2.0-dc": ("opensora-2.0-dc-ae", v2_0.DIFFUSION_DC_AE),
}


def write_clips(folder: Path, num_clips: int = 3, num_frames: int = 9) -> Path:
    """Small mp4 files of the toybox and one picture, in a manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    specs = sample_specs(num_clips, 7)
    videos, _ = render(specs, num_frames, 64, 64)
    for number, (spec, video) in enumerate(zip(specs, videos, strict=True)):
        path = write_video(folder / f"{number}.mp4", video, 12)
        rows.append(ClipRow(path, plain_caption(spec), num_frames, 64, 64, 12.0))
    picture = write_video(folder / "picture.png", videos[0, :, :1], 1)
    rows.append(ClipRow(picture, "a small red ball", 1, 64, 64, None))
    manifest = folder / "clips.csv"
    write_manifest(manifest, rows)
    return manifest


def family_config(version: str, manifest: Path | None, **changes: Any) -> DiffusionTaskConfig:
    """A generation of the family with tiny networks of its classes, on clips of a manifest."""
    model, diffusion = FAMILY[version]
    frames = "8" if version == "2.0-dc" else "5"  # of two latent frames
    buckets = {"64x64": {frames: (1.0, 2), "1": (1.0, 2)}}
    data = ManifestClips(buckets, manifest, batches_in_a_row=1, num_workers=0)
    transformer = {"input_size": [5, 8, 8]} if version == "1.0" else None
    clips = dataclasses.replace(debug.CLIPS, num_frames=16 if version == "2.0-dc" else 17)
    task = debug.debug_task(model, diffusion, transformer, clips, data=data)
    if version == "1.3":  # chunks of 5 frames in place of 17, and windows that are smaller than a frame
        assert isinstance(task.autoencoder, Untrained) and task.transformer is not None
        small = dataclasses.replace(task.autoencoder, options={**task.autoencoder.options, "micro_frame_size": 5})
        windows = {**task.transformer, "kernel_size": [2, 2, -1]}
        task = dataclasses.replace(
            task,
            autoencoder=small,
            transformer=windows,
            known_frames={"none": 1.0, "i2v_head": 1.0, "other": 1.0},
            drop_of_known={"text": 0.25, "frames": 0.25, "both": 0.25},
        )
    if version.startswith("2.0"):  # frames are known beside the noise alone
        changes.pop("frame_masks", None)
        known: Any = {"none": 1.0, "i2v_head": 1.0, "i2v_tail": 1.0}
        task = dataclasses.replace(task, known_frames=known, drop_text=0.5, drop_pooled=0.5)
    return dataclasses.replace(task, **changes)


def vae_config(stage: str, **changes: Any) -> VAETaskConfig:
    """One stage of autoencoder training, from scratch."""
    options: dict[str, Any] = {"stage": stage, "data": ToyboxVideos(CLIPS, batch_size=2), "autoencoder": AUTOENCODER}
    return VAETaskConfig(**options | {"num_clips": 4, "frames_per_clip": 2} | changes)
