"""The network as guidance sees it: several named branches of one prediction, computed together, by turns or on ranks.

`predict` is the one place where a diffusion transformer is called, in sampling, in training, for held-out losses and
for plans. A `Denoiser` calls it for the branches that a step of guidance needs ("text", "null", ...), which differ in
what the network reads and in nothing else.

Letters: B clips, C latent channels, T latent frames, h, w latent cells.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from opensora.distributed.sampling import SamplingRanks
from opensora.errors import OpenSoraError
from opensora.models.clip_conditions import ClipConditions
from opensora.models.text.conditioner import TextStates


def predict(
    network: Any,
    latents: Tensor,
    timestep: Tensor,
    text: Any,
    clip: ClipConditions,
    frame_mask: Tensor | None = None,
) -> Tensor:
    """What a network says of noisy latents, float32 (B, C or 2 C, T, h, w).

    Args:
        network: a transformer of the family.
        latents: (B, C, T, h, w).
        timestep: (B,), 0 (clean) to 1000 (noise).
        text: `TextStates`, or what the network's own `encode_text` made of them.
        clip: what it is told of the clips.
        frame_mask: (B, T) bool, False for conditioning frames, which are clean; None where all are generated.
    """
    read = text.inputs() if isinstance(text, TextStates) else {"text_context": text}
    return network(latents, timestep, **read, clip_conditions=clip, frame_mask=frame_mask).sample.float()


class Denoiser:
    """A network and the branches that guidance chooses from; made for one run.

    Args:
        network: a transformer of the family.
        branches: name -> text of all clips.
        clip: what the network is told of the clips.
        sequential: branches run one after the other instead of in one batch, which takes less memory.
        ranks: several processes that share the branches; None for one.
    """

    def __init__(
        self,
        network: Any,
        branches: Mapping[str, TextStates],
        clip: ClipConditions,
        *,
        sequential: bool = False,
        ranks: SamplingRanks | None = None,
    ) -> None:
        self.network, self.clip = network, clip
        self._branches, self._sequential, self._ranks = branches, sequential, ranks
        self._contexts: dict[tuple[str, ...], Any] = {}

    def __call__(
        self,
        names: Sequence[str],
        latents: Tensor,
        timestep: Tensor,
        frame_mask: Tensor | None = None,
        *,
        step: int,
        num_steps: int,
    ) -> dict[str, Tensor]:
        """The predictions of some branches for one timestep.

        Args:
            names: of the branches.
            latents: (B, C, T, h, w).
            timestep: of the whole batch.
            frame_mask: see `predict`.
            step, num_steps: where the run is, for caches.

        Returns:
            Name -> float32 prediction; on several ranks each has computed its share and has all of them.

        Raises:
            OpenSoraError: no branch, one twice, or one that there is not.
        """
        if not names or len(set(names)) < len(names) or not set(names) <= set(self._branches):
            known = ", ".join(self._branches)
            raise OpenSoraError(f"guidance asks for the branches {list(names)}; expected one or more of {known}")
        shared = self._ranks is not None and len(names) > 1
        mine = self._ranks.own(names) if shared and self._ranks is not None else tuple(names)
        predictions: dict[str, Tensor] = {}
        for together in [(name,) for name in mine] if self._sequential else [tuple(mine)]:
            # What a cache keeps belongs to the branches of one pass.
            with self.network.cache_context("+".join(together), step_index=step, num_inference_steps=num_steps):
                prediction = predict(
                    self.network,
                    latents.repeat(len(together), 1, 1, 1, 1),
                    timestep.expand(len(together) * len(latents)),
                    self._context(together),
                    self.clip.repeat(len(together)),
                    None if frame_mask is None else frame_mask.repeat(len(together), 1),
                )
            predictions |= dict(zip(together, prediction.split(len(latents)), strict=True))
        if shared and self._ranks is not None:
            return self._ranks.exchange(predictions, names)
        return predictions

    def _context(self, names: tuple[str, ...]) -> Any:
        """Text keys and values of branches that run together, made once."""
        if names not in self._contexts:
            text = TextStates.cat([self._branches[name] for name in names])
            self._contexts[names] = self.network.encode_text(**text.inputs())
        return self._contexts[names]
