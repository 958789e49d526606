"""What one step of a diffusion transformer learns from."""

from dataclasses import dataclass

from torch import Tensor

from opensora.data.batch import LatentBatch


@dataclass(frozen=True)
class DiffusionBatch:
    """Clips, and all that was drawn for them, on the device.

    Letters: B clips, C latent channels, T latent frames, h, w latent cells, L text tokens, D width of the text.

    Attributes:
        clips: with clean latents (B, C, T, h, w).
        noise: like the latents.
        t: (B,) times, in the unit of the noise process.
        text: (B, L, D) text states; or, where the encoder is trained along, (B, L) token ids.
        text_mask: (B, L), 1 = token.
        drop_text: (B,) bool, True where the network reads its null text.
        frame_mask: (B, T) bool, True = generated; None = all are.
    """

    clips: LatentBatch
    noise: Tensor
    t: Tensor
    text: Tensor
    text_mask: Tensor
    drop_text: Tensor
    frame_mask: Tensor | None = None
