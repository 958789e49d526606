"""What one step of a diffusion transformer learns from."""

from dataclasses import dataclass, replace

import torch
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

    def repeated(self, times: int) -> "DiffusionBatch":
        """All clips so often, one whole batch after the other; their text is encoded."""
        clips, text, channels = self.clips, self.text, self.channels
        assert isinstance(text, TextStates)

        def again(value: Tensor | None) -> Tensor | None:
            return None if value is None else torch.cat([value] * times)

        return replace(
            self,
            clips=replace(
                clips,
                latents=torch.cat([clips.latents] * times),
                captions=clips.captions * times,
                conditions=clips.conditions.repeat(times),
                object_mask=again(clips.object_mask),
            ),
            noise=torch.cat([self.noise] * times),
            t=torch.cat([self.t] * times),
            text=TextStates.cat([text] * times),
            drop_text=again(self.drop_text),
            frame_mask=again(self.frame_mask),
            channels=None if channels is None else ChannelConditioning.cat([channels] * times),
        )
