"""What a network is told of a clip whose latents have fewer frames: the same in sampling, in training, and held out."""

from pathlib import Path
from typing import Any

import torch
from tiny_published import network, pipeline_of, tiny
from tiny_tasks import family_config, write_clips

from opensora.data.clips import ManifestClips
from opensora.distributed.seeding import BatchKey
from opensora.evaluation.held_out import manifest_portions
from opensora.evaluation.loss import held_out_losses
from opensora.models.stdit2 import STDiT2
from opensora.pipeline import OpenSoraPipeline
from opensora.training.diffusion.task import DiffusionTask

FRAMES, LATENT_FRAMES = 17, 5


def told(transformer: STDiT2) -> list[tuple[float, ...]]:
    """Latent frames of every call from now on, and the number of frames, height, width and rate that it is told."""
    seen: list[tuple[float, ...]] = []

    def note(_: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        clip = keywords["clip_conditions"]
        values = (clip.num_frames, clip.height, clip.width, clip.fps)
        seen.append((args[0].shape[2], *(float(torch.as_tensor(value).flatten()[0]) for value in values)))

    transformer.register_forward_pre_hook(note, with_kwargs=True)
    return seen


def test_stdit2_is_told_video_frames_wherever_it_is_asked(tmp_path: Path) -> None:
    """With an autoencoder that makes 5 latent frames of 17."""
    manifest = write_clips(tmp_path / "clips", num_frames=20)
    autoencoder = network(tiny("opensora-1.2").autoencoder, 2)
    autoencoder.save_pretrained(tmp_path / "autoencoder")
    clips = ManifestClips({"64x64": {str(FRAMES): (1.0, 2)}}, manifest, batches_in_a_row=1, num_workers=0)
    wanted = (LATENT_FRAMES, FRAMES, 64.0, 64.0, 12.0)

    setup = family_config("1.1", manifest, autoencoder=str(tmp_path / "autoencoder"), data=clips).build("cpu")
    setup.data.open(tmp_path)
    assert isinstance(setup.task, DiffusionTask)
    in_training = told(setup.task.networks.transformer)
    setup.task.loss(setup.task.prepare(BatchKey(0, 0)), BatchKey(0, 0))
    assert in_training == [wanted]

    networks = pipeline_of("opensora-1.1-stage3").networks | {"autoencoder": autoencoder}
    pipe = OpenSoraPipeline(**networks, num_frames=FRAMES, height=64, width=64, fps=12, num_inference_steps=2)
    assert isinstance(pipe.transformer, STDiT2)
    in_sampling = told(pipe.transformer)
    pipe("a red ball", output_type="latent")
    assert in_sampling == [wanted] * 2

    in_sampling.clear()
    held_out_losses(pipe, (portion.load() for portion in manifest_portions(pipe, clips, 2)), num_timesteps=2)
    assert in_sampling == [wanted] * 2
