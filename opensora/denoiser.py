"""The network as guidance sees it: several named branches of one prediction, computed together, by turns or on ranks.

`predict` is the one place where a diffusion transformer is called, in sampling, in training, for held-out losses and
for plans. A `Denoiser` calls it for the branches that a step of guidance needs ("text", "null", ...), which differ in
what the network reads (`BranchInputs`) and in nothing else. Of branches that read the same, one is computed.

Letters: B clips, C latent channels, T latent frames, h, w latent cells.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opensora.distributed.sampling import SamplingRanks
from opensora.errors import OpenSoraError
from opensora.models.channel_conditioning import ChannelConditioning
from opensora.models.clip_conditions import ClipConditions
from opensora.models.text.conditioner import TextStates

UNCONDITIONAL = "unconditional"
"""The branch that reads no known frames; its text is that of "null", unless there is one of its own name."""


def predict(
    network: Any,
    latents: Tensor,
    timestep: Tensor,
    text: Any,
    clip: ClipConditions,
    frame_mask: Tensor | None = None,
    channels: ChannelConditioning | None = None,
    guidance_scale: float | None = None,
) -> Tensor:
    """What a network says of noisy latents, float32 (B, C or 2 C, T, h, w).

    Args:
        network: a transformer of the family.
        latents: (B, C, T, h, w).
        timestep: (B,), 0 (clean) to 1000 (noise).
        text: `TextStates`, or what the network's own `encode_text` made of them.
        clip: what it is told of the clips.
        frame_mask: (B, T) bool, False for conditioning frames, which are clean; None where all are generated.
        channels: known frames in channels beside the noise, of networks that read them; None for none.
        guidance_scale: that a network is told which has guidance distilled into it; None for any other.
    """
    read: dict[str, Any] = text.inputs() if isinstance(text, TextStates) else {"text_context": text}
    if channels is not None:
        read["channel_conditioning"] = channels
    if guidance_scale is not None:
        read["guidance"] = guidance_scale
    return network(latents, timestep, **read, clip_conditions=clip, frame_mask=frame_mask).sample.float()


@dataclass(frozen=True)
class BranchInputs:
    """What the network reads in one branch.

    Attributes:
        text: one row per clip.
        channels: known frames in channels beside the noise; None for none.
    """

    text: TextStates
    channels: ChannelConditioning | None

    def equals(self, other: "BranchInputs") -> bool:
        """Whether the network reads the same in both, value by value."""
        return _equal(self.text, other.text) and _equal(self.channels, other.channels)


class Denoiser:
    """A network and the branches that guidance chooses from; made for one run.

    There is a branch for every text, which reads the known frames, by the name of the text, and one that reads neither:
    `UNCONDITIONAL`.

    Attributes:
        num_evaluations: clips that went through the network so far, on this rank, each branch counted by itself.

    Args:
        network: a transformer of the family.
        texts: name -> text of all clips, "null" for none among them.
        clip: what the network is told of the clips.
        channels: known frames in channels beside the noise; None for none.
        guidance_scale: see `predict`.
        sequential: branches run one after the other instead of in one batch, which takes less memory.
        ranks: several processes that share the branches; None for one.
    """

    def __init__(
        self,
        network: Any,
        texts: Mapping[str, TextStates],
        clip: ClipConditions,
        *,
        channels: ChannelConditioning | None = None,
        guidance_scale: float | None = None,
        sequential: bool = False,
        ranks: SamplingRanks | None = None,
    ) -> None:
        self.network, self.clip, self.guidance_scale = network, clip, guidance_scale
        self.num_evaluations = 0
        self._sequential, self._ranks = sequential, ranks
        unread = None if channels is None else network.without_known_frames(channels)
        self._branches = {name: BranchInputs(text, channels) for name, text in texts.items()}
        self._branches[UNCONDITIONAL] = BranchInputs(texts.get(UNCONDITIONAL, texts["null"]), unread)
        self._computed = {
            name: next(first for first, other in self._branches.items() if other.equals(inputs))
            for name, inputs in self._branches.items()
        }
        """Name of each branch -> name of the first one that reads the same."""
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
            Name -> float32 prediction, of branches that read the same the same tensor; on several ranks each has
            computed its share and has all of them.

        Raises:
            OpenSoraError: no branch, one twice, or one that there is not.
        """
        if not names or len(set(names)) < len(names) or not set(names) <= set(self._branches):
            known = ", ".join(self._branches)
            raise OpenSoraError(f"guidance asks for the branches {list(names)}; expected one or more of {known}")
        predictions = self._compute(self._different(names), latents, timestep, frame_mask, step, num_steps)
        return {name: predictions[self._computed[name]] for name in names}

    def num_computed(self, names: Sequence[str]) -> int:
        """How often each clip goes through the network, on this rank, for the predictions of these branches."""
        return len(self._own(self._different(names)))

    def _different(self, names: Sequence[str]) -> tuple[str, ...]:
        """Of branches that read the same, the first."""
        return tuple(dict.fromkeys(self._computed[name] for name in names))

    def _own(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Those of them that this rank computes."""
        return self._ranks.own(names) if self._ranks is not None and len(names) > 1 else names

    def _compute(
        self,
        names: tuple[str, ...],
        latents: Tensor,
        timestep: Tensor,
        frame_mask: Tensor | None,
        step: int,
        num_steps: int,
    ) -> dict[str, Tensor]:
        """Predictions of branches that differ."""
        mine = self._own(names)
        predictions: dict[str, Tensor] = {}
        for together in [(name,) for name in mine] if self._sequential else [mine]:
            # What a cache keeps belongs to the branches of one pass.
            with self.network.cache_context("+".join(together), step_index=step, num_inference_steps=num_steps):
                prediction = predict(
                    self.network,
                    latents.repeat(len(together), 1, 1, 1, 1),
                    timestep.expand(len(together) * len(latents)),
                    self._context(together),
                    self.clip.repeat(len(together)),
                    None if frame_mask is None else frame_mask.repeat(len(together), 1),
                    self._known_frames(together),
                    self.guidance_scale,
                )
            self.num_evaluations += len(prediction)
            predictions |= dict(zip(together, prediction.split(len(latents)), strict=True))
        return predictions if self._ranks is None or len(names) == 1 else self._ranks.exchange(predictions, names)

    def _context(self, names: tuple[str, ...]) -> Any:
        """Text keys and values of branches that run together, made once."""
        if names not in self._contexts:
            text = TextStates.cat([self._branches[name].text for name in names])
            self._contexts[names] = self.network.encode_text(**text.inputs())
        return self._contexts[names]

    def _known_frames(self, names: tuple[str, ...]) -> ChannelConditioning | None:
        """What branches that run together read beside the noise."""
        known = [channels for name in names if (channels := self._branches[name].channels) is not None]
        return ChannelConditioning.cat(known) if known else None


def _equal(first: Any, second: Any) -> bool:
    """Whether two dataclasses of tensors hold the same; a plan's tensors, without data, equal themselves alone."""
    if first is None or second is None:
        return first is second
    return all(_equal_tensors(value, vars(second)[name]) for name, value in vars(first).items())


def _equal_tensors(first: Tensor | None, second: Tensor | None) -> bool:
    if first is second or first is None or second is None:
        return first is second
    has_data = type(first) is type(second) is Tensor and not first.is_meta
    return has_data and first.shape == second.shape and first.dtype == second.dtype and torch.equal(first, second)
