"""The whole way from nothing on a real clip: 2D, time on its latents, pixels; and what comes out beats small pictures.

The clip is learnt by heart, which is what a test of the machinery can ask for in minutes; docs/vae_training.py measures
several clips, and frames that were held out.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from opensora.checkpoints.components import load_component
from opensora.data.batch import DataContext
from opensora.data.clips import ManifestClips
from opensora.distributed.seeding import BatchKey
from opensora.evaluation.psnr import frame_psnr
from opensora.manifest import ClipRow, write_manifest
from opensora.models.autoencoders.video import VideoAutoencoder
from opensora.training.config import LoopConfig, Recipe
from opensora.training.optimizer import OptimizerConfig
from opensora.training.trainer import Trainer
from opensora.training.vae.clips import Cut
from opensora.training.vae.config import VAETaskConfig
from opensora.training.vae.losses import bilinear_reconstruction

AUTOENCODER: dict[str, Any] = {
    "spatial": {"block_out_channels": [64, 96], "layers_per_block": 1, "norm_num_groups": 16},
    "spatial_patch_size": 4,
    "temporal": {"type": "folded", "dim": 96, "encoder_depth": 1, "decoder_depth": 2},
}


@pytest.mark.slow
def test_stage_3_beats_bilinear_pictures_by_3_db_on_a_real_clip(real_clips: list[Path], tmp_path: Path) -> None:
    clip = next(path for path in real_clips if path.name == "carphone_pristine.mp4")
    write_manifest(tmp_path / "clips.csv", [ClipRow(clip, "", 120, 144, 193, 30.0)])

    def clips(num_frames: int, batch_size: int) -> ManifestClips:
        buckets = {"72x88": {str(num_frames): (1.0, batch_size)}}
        return ManifestClips(buckets, tmp_path / "clips.csv", text_required=False)

    def train(name: str, steps: int, before: str | None, **options: Any) -> Path:
        config = VAETaskConfig(
            autoencoder=AUTOENCODER,
            init_from=before and str(tmp_path / before / "model"),
            mse_weight=2.0,
            kl_weight=1e-5,
            num_clips=16,
            **options,
        )
        optimizer = OptimizerConfig(muon_lr=0.02, lr=2e-3, betas=(0.9, 0.99), warmup_steps=10, decay=0.6)
        loop = LoopConfig(steps=steps, ema_decay=0.9, optimizer=optimizer)
        return Trainer(Recipe(name, config, loop), tmp_path / name).run()

    train("frames", 80, None, stage="frames", data=clips(2, 8), frames_per_clip=1)
    cut = Cut(image_share=0.2)
    train("identity", 25, "frames", stage="latents", data=clips(17, 4), cut=cut, identity_weight=1.0)
    train("latents", 25, "identity", stage="latents", data=clips(17, 4), cut=cut)
    lengths = Cut(random_lengths=True)
    model = train("pixels", 40, "latents", stage="pixels", data=clips(34, 1), cut=lengths, frames_per_clip=8)

    autoencoder = load_component(model, VideoAutoencoder)
    source = clips(17, 1).open(DataContext())
    found = []
    for position in range(6):
        video = source.batch(BatchKey(7, position)).video[..., :72, :88]
        with torch.no_grad():
            made = autoencoder.decode_latents(autoencoder.encode_video(video), 17)
        found.append((frame_psnr(made, video).mean(), frame_psnr(bilinear_reconstruction(video, 8), video).mean()))
    ours, bilinear = torch.tensor(found).mean(dim=0).tolist()
    assert ours > bilinear + 3, f"{ours:.2f} dB, bilinear {bilinear:.2f} dB"
    print(f"{ours:.2f} dB, bilinear {bilinear:.2f} dB")
