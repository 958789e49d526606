"""FLUX's autoencoder, frame by frame through diffusers' layers, against the reference."""

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from opensora.checkpoints.key_maps import adapt_weights
from opensora.models.autoencoders.video import VideoAutoencoder


def close(ours: Tensor, reference: Tensor) -> None:
    torch.testing.assert_close(ours, reference, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_frames(golden):
    fixture = golden("flux_ae_2d_v2_0")
    config = fixture.meta["config"]
    factor, shift, channels = config["scale_factor"], config["shift_factor"], config["z_channels"]
    widths, groups = [config["ch"] * multiplier for multiplier in config["ch_mult"]], 32
    autoencoder = VideoAutoencoder(
        {
            "latent_channels": channels,
            "block_out_channels": widths,
            "layers_per_block": config["num_res_blocks"],
            "norm_num_groups": groups,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
        },
        latent_space={"scaling_factor": factor, "shift": [factor * shift] * channels},
        micro_frame_size=None,
    )
    # This miniature widens in its first block, which no published one does and diffusers' class does not know.
    encoder = autoencoder.spatial_vae.module.encoder
    encoder.conv_in = nn.Conv2d(3, config["ch"], 3, padding=1)
    encoder.down_blocks[0].resnets[0] = ResnetBlock2D(
        in_channels=config["ch"], out_channels=widths[0], temb_channels=None, groups=groups, eps=1e-6
    )
    autoencoder.load_state_dict(dict(adapt_weights(autoencoder, fixture.weights(), "the fixture")))
    autoencoder.eval()
    kinds = {"z_mode", "z_sample", "decode", "decode_of_z_mode", "post_logvar"}
    assert set(fixture.under("out")) == kinds
    video, latents = fixture["in.x"], fixture["out.z_mode"]
    close(autoencoder.encode_video(video), latents)
    close(autoencoder.encode_frames(video).logvar, fixture["out.post_logvar"])
    close(autoencoder.encode_video(video, sample=True, frame_noise=fixture["in.noise"]), fixture["out.z_sample"])
    num_frames = video.shape[2]
    close(autoencoder.decode_latents(latents, num_frames), fixture["out.decode_of_z_mode"])
    close(autoencoder.decode_latents(fixture["in.z"], num_frames), fixture["out.decode"])
