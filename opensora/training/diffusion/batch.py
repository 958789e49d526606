"""What one step of a diffusion transformer learns from."""

from dataclasses import dataclass

from torch import Tensor

from opensora.data.batch import LatentBatch
from opensora.models.channel_conditioning import ChannelConditioning
from opensora.models.text.conditioner import TextStates, TextTokens


@dataclass(frozen=True)
class DiffusionBatch:
    """Clips, and all that was drawn for them, on the device.

    Letters: B clips, C latent channels, T latent frames, h, w latent cells.

    Attributes:
        clips: with clean latents (B, C, T, h, w).
        noise: like the latents.
        t: (B,) times, in the unit of the noise process.
        text: of the captions; tokens where the encoder is trained along.
        drop_text: (B,) bool, True where the network reads its learned null text; None for networks whose null text is
            an encoded one, which lies in `text` then.
        frame_mask: (B, T) bool, True = generated; None = all are.
        channels: known frames beside the noise, of networks that read them.
        worse: latents that are corrupted in place of the clean ones, of clips that were made worse; None for those.
    """

    clips: LatentBatch
    noise: Tensor
    t: Tensor
    text: TextStates | TextTokens
    drop_text: Tensor | None
    frame_mask: Tensor | None = None
    channels: ChannelConditioning | None = None
    worse: Tensor | None = None
